"""The optimizer: which parameters decay, how it is built, and the learning rate at a step."""

import functools
import math
from collections.abc import Iterable

import torch
from torch import nn

from nanosynth.training import distributed


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and LayerNorm gains do not. Each parameter once."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    weight_decay: float,
    betas: tuple[float, float],
    world: distributed.World,
) -> "torch.optim.Optimizer | Muon":
    """'adamw' over `parameter_groups`, fused, so that a skipped update needs no host wait; or
    'muon', which takes the blocks' matrices from it.
    """
    adamw = functools.partial(torch.optim.AdamW, lr=0.0, betas=betas, fused=True)
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return adamw(groups)
    matrices = [(n, p) for n, p in model.named_parameters() if ".h." in n and p.dim() == 2]
    taken = {id(parameter) for _, parameter in matrices}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    return Muon(matrices, adamw(groups), weight_decay=weight_decay, world=world)


class Muon:
    """Muon on matrices, AdamW on all else, as one optimizer (Jordan et al. 2024).

    A matrix moves by its momentum's nearest semi-orthogonal matrix, scaled as AdamW's updates are
    (Moonlight, arXiv 2502.16982, section 2.2), so one learning rate serves both. q, k and v are
    stored as one matrix and orthogonalised apart. Equal to torch.optim.Muon with
    adjust_lr_fn='match_rms_adamw', but matrices of one shape go in one batch, the ranks share the
    work, and `found_inf` skips an update on the device as fused AdamW does.
    """

    MOMENTUM = 0.95

    def __init__(
        self,
        matrices: list[tuple[str, nn.Parameter]],
        adamw: torch.optim.AdamW,
        *,
        weight_decay: float,
        world: distributed.World,
    ):
        self.adamw, self.world = adamw, world
        self.found_inf: torch.Tensor | None = None
        alike: dict[tuple, list[nn.Parameter]] = {}
        for name, matrix in matrices:
            alike.setdefault((3 if "c_attn" in name else 1, *matrix.shape), []).append(matrix)
        self.groups = [
            {
                "params": params,
                "weight_decay": weight_decay,
                "n_parts": n_parts,
                "momentum": torch.zeros_like(torch.stack([p.detach() for p in params])),
            }
            for (n_parts, *_), params in alike.items()
        ]

    @property
    def param_groups(self) -> list[dict]:
        return self.groups + self.adamw.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Call on every rank."""
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        skipped = torch.zeros_like(self.groups[0]["momentum"][0, 0, 0])
        if self.found_inf is not None:
            skipped += self.found_inf
        for group in self.groups:
            self._step(group, skipped)

    def _step(self, group: dict, skipped: torch.Tensor) -> None:
        momentum, params = group["momentum"], group["params"]
        grads = torch.stack([p.grad for p in params])  # (L, M, N)
        # Where the step is skipped, the momentum stands in for the gradient, and stays as it is.
        grads = torch.where(skipped.bool(), momentum, grads)
        momentum.lerp_(grads, 1 - self.MOMENTUM)
        update = grads.lerp_(momentum, self.MOMENTUM)  # Nesterov's
        rows, columns = update.shape[1] // group["n_parts"], update.shape[2]
        update = self._orthogonalised(update.view(-1, rows, columns)).view_as(momentum)
        rate = group["lr"] * (1 - skipped)
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        update = update.float() * (-0.2 * math.sqrt(max(rows, columns)) * rate)
        torch._foreach_add_(params, list(update))

    def _orthogonalised(self, matrices: torch.Tensor) -> torch.Tensor:
        """`orthogonalise`, of which each rank does its share. Call on every rank."""
        n_share = math.ceil(len(matrices) / self.world.size)
        share = matrices[n_share * self.world.rank :][:n_share]
        missing = n_share - len(share)
        share = nn.functional.pad(share, (0, 0, 0, 0, 0, missing))
        return self.world.gather(orthogonalise(share))[: len(matrices)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.adamw.zero_grad(set_to_none)
        for parameter in (p for group in self.groups for p in group["params"]):
            parameter.grad = None

    def state_dict(self) -> dict:
        momenta = [group["momentum"] for group in self.groups]
        return {"adamw": self.adamw.state_dict(), "momenta": momenta}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for group, momentum in zip(self.groups, state["momenta"], strict=True):
            group["momentum"].copy_(momentum)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Roughly the nearest semi-orthogonal matrices to `matrices` (B, M, N), in bfloat16.

    Five Newton-Schulz steps with the coefficients of Jordan et al. 2024: singular values come out
    between 0.7 and 1.2 or so.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def lr_at(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_learning_rate: float,
    decay: str = "cosine",
) -> float:
    """The learning rate of the update that follows `step` updates.

    Linear warmup, never zero, to `learning_rate` at step warmup_steps - 1; then a cosine or a line
    that reaches `min_learning_rate` at the last update, max_steps - 1.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / (max_steps - warmup_steps)
    weight = 0.5 * (1.0 + math.cos(math.pi * progress)) if decay == "cosine" else 1.0 - progress
    return min_learning_rate + weight * (learning_rate - min_learning_rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """The gradients' total norm before clipping to `max_norm`; 0 clips nothing. No host wait."""
    return nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"), foreach=True)


class SpikeGuard:
    """Tells a loss that stands far above the recent ones, on the device, without a host wait.

    A loss is a spike when it exceeds the mean of the last WINDOW accepted losses by `sigmas` of
    their standard deviations; 0 turns it off. The first WINDOW finite losses are all accepted. What
    is not accepted does not enter the window, which is saved and restored with the run.
    """

    WINDOW = 128

    def __init__(self, sigmas: float, device: torch.device):
        self.sigmas = sigmas
        self.losses = torch.zeros(self.WINDOW, device=device)  # a ring
        self.n_accepted = torch.zeros((), dtype=torch.long, device=device)
        self.n_skipped = torch.zeros((), dtype=torch.long, device=device)  # in a row, until now

    def accepts(self, loss: torch.Tensor) -> torch.Tensor:
        """Whether `loss` () is finite and no spike, as a boolean tensor ()."""
        if not self.sigmas:
            return loss.isfinite()
        limit = self.losses.mean() + self.sigmas * self.losses.std()
        return loss.isfinite() & ((self.n_accepted < self.WINDOW) | (loss <= limit))

    def note(self, loss: torch.Tensor, accepted: torch.Tensor) -> None:
        """Put an accepted loss into the window, or count a skipped step."""
        places = torch.arange(self.WINDOW, device=self.losses.device)
        is_next = (places == self.n_accepted % self.WINDOW) & accepted
        self.losses = torch.where(is_next, loss, self.losses)
        self.n_accepted += accepted
        self.n_skipped = torch.where(accepted, 0, self.n_skipped + 1)

    def state_dict(self) -> dict:
        return {name: getattr(self, name).cpu() for name in ("losses", "n_accepted", "n_skipped")}

    def load_state_dict(self, state: dict) -> None:
        for name in self.state_dict():
            getattr(self, name).copy_(state[name])
