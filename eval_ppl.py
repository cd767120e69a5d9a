"""Perplexity of a run on a whole validation set, every token scored once.

Usage:
    python eval_ppl.py --run=out/demo
    torchrun --standalone --nproc_per_node=8 eval_ppl.py --run=out/1b
"""

import json
import math
from dataclasses import dataclass
from typing import Literal

from nanosynth import UserError, settings, tokenizer
from nanosynth.settings import setting

N_RESAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class EvalConfig(settings.Settings):
    """Validation perplexity, over all tokens and over assistant tokens, and bits per byte."""

    run: str = setting("out/demo", "a run's folder, or one of its step folders", path=True)
    step: str = setting("best", "which checkpoint: best, latest or a step's number")
    data_dir: str = setting("", "prepared bins; empty: those the run was trained on", path=True)
    stride: int = setting(0, "tokens scored a window; 0: the context, so no overlap", at_least=0)
    batch_size: int = setting(8, "windows a GPU takes at once", at_least=1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = setting(
        "auto", "of the matrix products; auto: float16 on CUDA, bfloat16 on a CPU that has it"
    )
    seed: int = setting(42, "of the bootstrap", at_least=0)


if __name__ == "__main__":
    arguments = settings.from_argv(EvalConfig)  # before torch takes its time

import numpy as np
import torch
from tqdm import tqdm

from model import GPT
from nanosynth import checkpoint
from nanosynth.data import bins
from nanosynth.device import autocast, choose_dtype
from nanosynth.files import write_atomically
from nanosynth.inference.load import load
from nanosynth.training import distributed


def windows(n_tokens: int, block_size: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, n_scored): inputs start..end-1 predict the next tokens, the last n_scored count.

    Together they score each token but the first exactly once, with up to block_size - stride tokens
    of context before the window's own.

    >>> windows(8, block_size=4, stride=2)
    [(0, 2, 2), (0, 4, 2), (2, 6, 2), (4, 7, 1)]
    """
    found = []
    for first in range(0, n_tokens - 1, stride):
        end = min(first + stride, n_tokens - 1)
        found.append((max(0, first - (block_size - stride)), end, end - first))
    return found


@torch.inference_mode()
def score(
    model: GPT,
    ids: np.ndarray,
    world: distributed.World,
    *,
    stride: int,
    batch_size: int,
    dtype: torch.dtype,
) -> np.ndarray:
    """Loss in nats of each token but the first, (n - 1,). Call on every rank."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    losses = torch.zeros(len(ids) - 1, dtype=torch.float32)
    # Windows of one shape are neighbours, so a batch is a slice of equal ones.
    batches: list[list[tuple[int, int, int]]] = []
    for window in windows(len(ids), model.config.block_size, stride):
        shape = (window[1] - window[0], window[2])
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and (last[0][1] - last[0][0], last[0][2]) == shape:
            last.append(window)
        else:
            batches.append([window])
    for batch in tqdm(batches[world.rank :: world.size], unit="batch", disable=None):
        length, n_scored = batch[0][1] - batch[0][0], batch[0][2]
        inputs = torch.stack([tokens[start:end] for start, end, _ in batch])
        targets = torch.cat([tokens[end - n_scored + 1 : end + 1] for _, end, _ in batch])
        place = torch.arange(length - n_scored, length)
        index = (torch.arange(len(batch))[:, None] * length + place).flatten()
        with autocast(world.device, dtype):
            found = model(*(part.to(world.device) for part in (inputs, targets, index)))
        for row, (_, end, _) in enumerate(batch):
            losses[end - n_scored : end] = found[row * n_scored : (row + 1) * n_scored].cpu()
    return world.sum(losses).numpy()


def bootstrap(
    losses: np.ndarray, document: np.ndarray, weights: np.ndarray, seed: int
) -> list[float]:
    """95% interval of the perplexity over tokens of weight 1, resampling whole documents."""
    sums = np.bincount(document, weights=losses * weights)
    counts = np.bincount(document, weights=weights)
    generator = np.random.default_rng(seed)
    n = len(sums)
    perplexities = []
    for _ in range(N_RESAMPLES):
        times = np.bincount(generator.integers(0, n, n), minlength=n)
        perplexities.append(math.exp((times @ sums) / max(times @ counts, 1)))
    return np.percentile(perplexities, [2.5, 97.5]).tolist()


def summarise(losses: np.ndarray, ids: np.ndarray, mask: np.ndarray, seed: int) -> dict:
    """The figures of eval_ppl.json from each token's loss; ids and mask include the first token."""
    losses = losses.astype(np.float64)
    # The token after an end opens a document; the end itself belongs to the one before.
    document = np.cumsum(ids == tokenizer.END_OF_TEXT)[:-1]
    n_bytes = tokenizer.token_bytes()[ids[1:]]
    figures = {}
    counted = {"all": np.ones(len(losses)), "assistant": mask[1:].astype(np.float64)}
    for name, weights in counted.items():
        nats, n_tokens = float(losses @ weights), int(weights.sum())
        if not n_tokens:
            continue
        figures[name] = {
            "perplexity": math.exp(nats / n_tokens),
            "perplexity_95": bootstrap(losses, document, weights, seed),
            "loss": nats / n_tokens,
            "bits_per_byte": nats / math.log(2) / float(n_bytes @ weights),
            "tokens": n_tokens,
        }
    return figures | {"documents": int(document.max()) + 1}


def table(result: dict) -> str:
    lines = [f"{'':<16}{'perplexity':>12}{'95% interval':>24}{'bits/byte':>12}{'tokens':>14}"]
    for name in ("all", "assistant"):
        if figures := result.get(name):
            interval = "{:,.3f} - {:,.3f}".format(*figures["perplexity_95"])
            lines.append(
                f"{name + ' tokens':<16}{figures['perplexity']:>12,.3f}{interval:>24}"
                f"{figures['bits_per_byte']:>12.4f}{figures['tokens']:>14,}"
            )
    lines.append(
        f"{result['documents']:,} documents of {result['data']}, {result['checkpoint']}, context "
        f"{result['block_size']}, stride {result['stride']}, {result['dtype']}"
    )
    if result["loss_on"] == "assistant":
        lines.append("trained with loss_on=assistant: no other token was ever a target")
    return "\n".join(lines)


def main(config: EvalConfig) -> None:
    path = checkpoint.find(config.run, config.step)
    meta = checkpoint.read_meta(path)
    data_dir = config.data_dir or meta["settings"]["data_dir"]
    if not data_dir:
        raise UserError(f"{path} was not trained on bins of ours; name some with --data_dir=FOLDER")
    split = bins.Split(data_dir, "val")
    ids, mask = split.ids(0, split.n_tokens), split.mask(0, split.n_tokens)
    block_size = meta["identity"]["model"]["block_size"]
    stride = config.stride or block_size
    if stride > block_size:
        raise UserError(f"--stride={stride} is more than the context, {block_size}")
    with distributed.start(config.device) as world:
        dtype = choose_dtype(config.dtype, world.device)
        model, *_ = load(str(path), device=world.device, dtype=dtype, cast=False)
        losses = score(model, ids, world, stride=stride, batch_size=config.batch_size, dtype=dtype)
        if world.is_main:
            result = {
                "checkpoint": str(path),
                "data": str(split.path),
                "data_sha256": split.sha256,
                "block_size": model.config.block_size,
                "stride": stride,
                "loss_on": meta["identity"]["loss_on"],
                "dtype": str(dtype).removeprefix("torch."),
                **summarise(losses, ids, mask, config.seed),
            }
            write_atomically(path.parent / "eval_ppl.json", json.dumps(result, indent=2))
            print(table(result))


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
