"""How likely a model finds continuations of contexts."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from model import GPT
from nanosynth import tokenizer

MAX_TARGETS = 8192  # scored at once: their float32 logits take 1.6 GB
WIDTH_STEP = 32  # a batch's width is a multiple of it: few shapes, and little padding

Pair = tuple[list[int], list[int]]  # (context, continuation), neither empty


def fit(pair: Pair, block_size: int) -> Pair:
    """The context cut on the left, so that the model can score the whole continuation.

    The last token is a target only, so context and continuation may have block_size + 1 together.
    """
    context, continuation = pair
    assert context and continuation, "wanted a context and a continuation"
    room = block_size + 1 - len(continuation)
    assert room > 0, f"a continuation of {len(continuation)} tokens exceeds the context"
    return context[-room:], continuation


def batches(pairs: Sequence[Pair], batch_size: int) -> list[list[int]]:
    """The pairs' numbers, longest first, at most `batch_size` and MAX_TARGETS tokens together."""
    order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
    groups: list[list[int]] = []
    n_targets = 0
    for number in order:
        n_targets += len(pairs[number][1])
        if not groups or len(groups[-1]) == batch_size or n_targets > MAX_TARGETS:
            groups.append([])
            n_targets = len(pairs[number][1])
        groups[-1].append(number)
    return groups


@torch.inference_mode()
def score(model: GPT, pairs: Sequence[Pair], batch_size: int) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether greedy decoding gives it) of each continuation.

    Longest first, so that a batch that does not fit in memory is the first one.
    """
    fitted = [fit(pair, model.config.block_size) for pair in pairs]
    results: list[tuple[float, bool]] = [(0.0, False)] * len(fitted)
    work = batches(fitted, batch_size)
    for numbers in tqdm(work, unit="batch", disable=None, desc="score"):
        batch = _score_batch(model, [fitted[number] for number in numbers])
        for number, result in zip(numbers, batch, strict=True):
            results[number] = result
    return results


def _score_batch(model: GPT, pairs: list[Pair]) -> list[tuple[float, bool]]:
    device = next(model.parameters()).device
    longest = max(len(context) + len(continuation) for context, continuation in pairs) - 1
    width = min(math.ceil(longest / WIDTH_STEP) * WIDTH_STEP, model.config.block_size)
    inputs = np.full((len(pairs), width), tokenizer.END_OF_TEXT, dtype=np.int64)  # (B, T)
    index: list[int] = []
    for row, (context, continuation) in enumerate(pairs):
        ids = context + continuation
        inputs[row, : len(ids) - 1] = ids[:-1]  # padding stands on the right: never attended to
        # A token is predicted at the place before it.
        index += range(row * width + len(context) - 1, row * width + len(ids) - 1)
    targets = torch.tensor([id for _, continuation in pairs for id in continuation]).to(device)
    places = torch.tensor(index).to(device)
    logits = model(torch.from_numpy(inputs).to(device), logit_index=places).float()  # (N, V)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
    is_right = logits.argmax(dim=-1) == targets
    lengths = [len(continuation) for _, continuation in pairs]
    return [
        (-nats.sum().item(), bool(right.all()))
        for nats, right in zip(
            losses.cpu().split(lengths), is_right.cpu().split(lengths), strict=True
        )
    ]
