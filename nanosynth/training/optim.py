"""The optimizer: which parameters decay, the learning rate at a step, clipping, loss spikes."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from nanosynth.training.distributed import World
from nanosynth.training.muon import MuonAdamW


def parameter_groups(
    model: nn.Module, weight_decay: float, embedding_share: float = 1.0
) -> list[dict]:
    """Embeddings and matrices decay; biases and LayerNorm gains do not. Each parameter once.

    `embedding_share` is the embeddings' learning rate as a share of the others'.
    """
    parameters = list(model.named_parameters())
    # In the order of one group of both and one of vectors, which older checkpoints number by.
    embeddings = [p for name, p in parameters if p.dim() == 2 and ".h." not in name]
    matrices = [p for name, p in parameters if p.dim() == 2 and ".h." in name]
    vectors = [p for _, p in parameters if p.dim() < 2]
    return [
        {"params": embeddings, "weight_decay": weight_decay, "lr_share": embedding_share},
        {"params": matrices, "weight_decay": weight_decay, "lr_share": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_share": 1.0},
    ]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    weight_decay: float,
    betas: tuple[float, float],
    world: World,
    embedding_share: float = 1.0,
    is_compiled: bool = False,
) -> torch.optim.Optimizer:
    """'adamw' over `parameter_groups`; or 'muon', which takes the blocks' matrices from it, and may
    be compiled. Both read `found_inf` on the device, so a skipped update needs no host wait.
    """
    groups = parameter_groups(model, weight_decay, embedding_share)
    if name == "muon":
        groups[1]["params"] = []
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    adamw.register_load_state_dict_pre_hook(keep_groups)
    if name == "adamw":
        return adamw
    matrices = [(n, p) for n, p in model.named_parameters() if ".h." in n and p.dim() == 2]
    return MuonAdamW(
        matrices, adamw, weight_decay=weight_decay, world=world, is_compiled=is_compiled
    )


def keep_groups(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Of a checkpoint the moments alone: how parameters are grouped, their decay and their rates
    are the program's and the settings'. Raises ValueError where they are not of the parameters.
    """
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    names = ("step", "exp_avg", "exp_avg_sq")
    found = {n: [own[name].shape for name in names] for n, own in state["state"].items()}
    if found != {n: [(), shape, shape] for n, shape in enumerate(shapes)}:
        raise ValueError("its moments are not of this model's shape")
    return {**state, "param_groups": optimizer.state_dict()["param_groups"]}


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
    """The matrices' and vectors'; the embeddings' goes with it in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_share"]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """The gradients' total norm before clipping to `max_norm`; 0 clips nothing. No host wait."""
    return nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"), foreach=True)


class SpikeGuard:
    """Tells a loss that stands far above the recent ones, on the device, without a host wait.

    A loss is a spike when it exceeds the mean of the last WINDOW accepted losses by `sigmas` of
    their standard deviations; 0 turns it off. The first WINDOW finite losses are all accepted. What
    is not accepted does not enter the window, which is saved and restored with the run.

    Losses of steps are no normal distribution: they fall, and some batches are hard. Five or six
    deviations still happen in a healthy run; at 8, only a step that would do harm is left out.
    """

    WINDOW = 128  # short enough that the falling loss hardly widens it, long enough for a deviation

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
        for name, own in self.state_dict().items():
            if own.shape != state[name].shape:
                raise ValueError(f"{name} of another shape")
            getattr(self, name).copy_(state[name])
