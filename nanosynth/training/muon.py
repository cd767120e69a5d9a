"""Muon on the blocks' matrices, AdamW on all else, as one optimizer (Jordan et al. 2024).

Written by hand beside torch.optim.Muon, which it equals by test: matrices of one shape go in one
batch, each rank has the momenta of its share of them and sends the others its updates, and an
update is skipped on the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanosynth.training.distributed import World


class MuonAdamW(torch.optim.Optimizer):
    """A matrix moves by the semi-orthogonal matrix nearest to its momentum, scaled as AdamW's
    updates are (Moonlight, arXiv 2502.16982, section 2.2), so one learning rate serves both. q, k
    and v are stored as one matrix and orthogonalised apart. `found_inf` skips an update, as of
    fused AdamW.
    """

    def __init__(
        self,
        matrices: list[tuple[str, nn.Parameter]],
        adamw: torch.optim.AdamW,
        *,
        weight_decay: float,
        world: World,
        is_compiled: bool = False,
    ):
        self.adamw, self.world = adamw, world
        self.found_inf = torch.zeros(())  # train.py sets it before each step
        # A graph for each of the four shapes of matrices: one for all would be of symbolic sizes.
        self._direction = torch.compile(direction, dynamic=False) if is_compiled else direction
        alike: dict[tuple, list[nn.Parameter]] = {}
        for name, matrix in matrices:
            alike.setdefault((3 if "c_attn" in name else 1, *matrix.shape), []).append(matrix)
        self.matrix_groups = [
            {
                "params": params,
                "weight_decay": weight_decay,
                "n_parts": n_parts,
                "momentum": torch.stack(self._share(list(map(torch.zeros_like, params)))),
            }
            for (n_parts, *_), params in alike.items()
        ]
        # The very dictionaries of both, so that who sets a learning rate here sets it there.
        super().__init__([*self.matrix_groups, *adamw.param_groups], {"lr": 0.0, "lr_share": 1.0})

    def _share(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """This rank's matrices of those of one shape, as many as any other rank's: where there are
        too few, zeros.
        """
        n_share = math.ceil(len(matrices) / self.world.size)
        share = list(matrices[n_share * self.world.rank :][:n_share])
        return share + [torch.zeros_like(matrices[0])] * (n_share - len(share))

    @torch.no_grad()
    def step(self) -> None:
        """Call on every rank."""
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        for group in self.matrix_groups:
            self._step(group, self.found_inf)

    def _step(self, group: dict, skipped: Tensor) -> None:
        params = group["params"]
        gradients = self._share([p.grad for p in params])
        update = self._direction(group["momentum"], gradients, skipped.bool(), group["n_parts"])
        update = self.world.gather(update)[: len(params)]  # (S, M, N) -> (L, M, N)
        decay = group["lr"] * group["weight_decay"] * (1 - skipped)
        torch._foreach_mul_(params, 1 - decay)
        rows, columns = update.shape[1] // group["n_parts"], update.shape[2]
        # 0.2 is the root mean square of AdamW's updates (Moonlight, section 2.2).
        scale = 0.2 * math.sqrt(max(rows, columns))
        torch._foreach_add_(params, list(update), alpha=-scale * group["lr"])

    def state_dict(self) -> dict:
        """The same for any number of ranks; the momenta are rank 0's alone. Call on every rank."""
        momenta = []
        for group in self.matrix_groups:  # one at a time, as they may not fit all at once
            whole = self.world.gather(group["momentum"])[: len(group["params"])]
            momenta += [whole.cpu()] if self.world.is_main else []
        return {"adamw": self.adamw.state_dict(), "momenta": momenta}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])  # which makes new groups
        self.param_groups = [*self.matrix_groups, *self.adamw.param_groups]
        for group, momentum in zip(self.matrix_groups, state["momenta"], strict=True):
            group["momentum"].copy_(torch.stack(self._share(momentum)))


MOMENTUM = 0.95


def direction(momentum: Tensor, gradients: list[Tensor], skipped: Tensor, n_parts: int) -> Tensor:
    """Where S matrices go, in bfloat16 (S, M, N), from their gradients (M, N) each, which their
    momentum (S, M, N) takes in; nowhere, and it takes in nothing, where the step is `skipped` ().
    A matrix is `n_parts` on top of one another.
    """
    # Where the step is skipped, the momentum stands in for the gradient, and stays as it is.
    grads = torch.where(skipped, momentum, torch.stack(gradients))
    momentum.lerp_(grads, 1 - MOMENTUM)
    update = grads.lerp(momentum, MOMENTUM)  # Nesterov's
    matrices = update.view(-1, update.shape[1] // n_parts, update.shape[2])
    return orthogonalise(matrices).view_as(update) * ~skipped


def orthogonalise(matrices: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices to `matrices` (B, M, N), in bfloat16.

    Five Newton-Schulz steps with the coefficients of Jordan et al. 2024, which trade exactness for
    speed: singular values come out between 0.7 and 1.2 or so, and that serves as well as 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).bfloat16()  # the small side's products are cheaper
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # singular values of 1 at most
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
