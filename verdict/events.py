"""The steps at which a run's training went wrong, by bounds that were fixed before the runs."""

import math
from typing import NamedTuple

import torch

from nanosynth.training.optim import SpikeGuard

SPIKE_SIGMAS = 8.0  # train.py's default; fixed here, so that a run's setting can't soften it
MAX_RISE = 0.3  # nats: a perplexity a third higher
MAX_OVERFLOWS = 3  # in a row: a loss scale up to 8 times too high


class Events(NamedTuple):
    """The steps at which training went wrong; a skipped step of no other kind overflowed."""

    not_finite: list[int]
    spikes: list[int]  # with the steps at which the mean first stood MAX_RISE above its lowest
    skipped: list[int]


def find_events(train: list[dict]) -> Events:
    """Replays the losses of metrics.jsonl through the guard that training itself uses."""
    guard = SpikeGuard(SPIKE_SIGMAS, torch.device("cpu"))
    not_finite, spikes, skipped = [], [], []
    lowest, risen, n_overflows = math.inf, False, 0
    for record in train:
        step, is_finite = record["step"], record["grad_norm"] is not None
        loss = torch.tensor(math.nan if record["loss"] is None else float(record["loss"]))
        accepted = guard.accepts(loss)
        n_overflows = 0 if is_finite else n_overflows + 1
        is_overflow = record["loss_scale"] > 1 and n_overflows <= MAX_OVERFLOWS
        if record["loss"] is None:
            not_finite.append(step)
        elif not accepted or (is_finite and record["skipped"]):
            spikes.append(step)
        elif not is_finite and not is_overflow:
            not_finite.append(step)
        if record["skipped"]:
            skipped.append(step)
        guard.note(loss, accepted & (not record["skipped"]))
        if guard.n_accepted >= guard.WINDOW:
            mean = guard.losses.mean().item()
            lowest = min(lowest, mean)
            if mean > lowest + MAX_RISE and not risen:
                spikes.append(step)
            risen = mean > lowest + MAX_RISE
    return Events(not_finite, spikes, skipped)
