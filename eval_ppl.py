"""Perplexity of a run on a whole validation split, every token scored once, and by source.

Usage:
    python eval_ppl.py --run=out/demo
    torchrun --standalone --nproc_per_node=8 -- eval_ppl.py --run=out/1b
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from nanosynth import UserError, settings, terminal, tokenizer
from nanosynth.settings import setting

MOST_SOURCES = 20  # that are told apart, the largest; the others stand together
LARGEST_LOSS = 230.0  # in nats; a perplexity of 1e100
N_RESAMPLES = 1000  # of the bootstrap: the ends of a 95% interval then rest on 25 of them each


@dataclass(frozen=True, kw_only=True)
class EvalConfig(settings.Settings):
    """Validation perplexity with its 95% interval, and bits per byte: over all tokens, and over the
    assistant's alone."""

    run: str = setting(
        "out/demo", "a run's folder, or one of its step folders", group="The model", path=True
    )
    step: str = setting("best", "which checkpoint: best, latest or a step's number")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: settings.DTYPE = setting(
        "auto", "of the matrix products; auto: float16 on CUDA, bfloat16 on a CPU that has it"
    )

    data_dir: str = setting(
        "", "prepared bins; empty: the run's own", group="What is scored, and how", path=True
    )
    stride: int = setting(0, "tokens scored a window; 0: the context, so no overlap", at_least=0)
    batch_size: int = setting(8, "windows a GPU takes at once", at_least=1)
    seed: int = setting(42, "of the bootstrap, which gives the intervals", **settings.SEED)
    output_dir: str = setting("", "where eval_ppl.json goes; empty: the run's folder", path=True)


if __name__ == "__main__":
    arguments = settings.from_argv(EvalConfig)  # before torch takes its time

import numpy as np
import torch
from tqdm import tqdm

from model import GPT
from nanosynth.data import bins
from nanosynth.device import autocast, choose_dtype
from nanosynth.files import json_text, writable, write_atomically
from nanosynth.inference.load import load
from nanosynth.table import table
from nanosynth.training import distributed
from nanosynth.training.distributed import World


def windows(n_tokens: int, block_size: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, n_scored): inputs start..end-1 predict the next tokens, the last n_scored count.

    Together they score each token but the first exactly once, with up to block_size - stride tokens
    of context before the window's own.

    >>> windows(8, block_size=4, stride=2)
    [(0, 2, 2), (0, 4, 2), (2, 6, 2), (4, 7, 1)]
    """
    result = []
    for first in range(0, n_tokens - 1, stride):
        end = min(first + stride, n_tokens - 1)
        result.append((max(0, first - (block_size - stride)), end, end - first))
    return result


@torch.inference_mode()
def score(
    model: GPT, ids: np.ndarray, world: World, *, stride: int, batch_size: int, dtype: torch.dtype
) -> np.ndarray:
    """Loss in nats of each token but the first, (n - 1,). Call on every rank."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    losses = torch.zeros(len(ids) - 1, dtype=torch.float32)
    batches = []  # of windows of one shape, which are neighbours: only the first and last differ
    every = windows(len(ids), model.config.block_size, stride)
    for _, group in groupby(every, key=lambda window: (window[1] - window[0], window[2])):
        alike = list(group)
        batches += [alike[n : n + batch_size] for n in range(0, len(alike), batch_size)]
    for batch in tqdm(batches[world.rank :: world.size], unit="batch", disable=None):
        start, end, n_scored = batch[0]
        inputs = torch.stack([tokens[start:end] for start, end, _ in batch])  # (B, T)
        places = torch.arange(inputs.numel()).view(inputs.shape)[:, -n_scored:].flatten()  # (N,)
        # What neighbouring windows score stands side by side, so that it is one slice.
        first, last = end - n_scored, batch[-1][1]
        targets = tokens[first + 1 : last + 1]
        with autocast(world.device, dtype):
            nats = model(*(part.to(world.device) for part in (inputs, targets, places)))
        losses[first:last] = nats.cpu()
    return world.sum(losses).numpy()  # what another rank scored is zero here


def bootstrap(units: np.ndarray, statistic: Callable[..., float], seed: int = 42) -> list[float]:
    """95% interval of `statistic`, which is given the sum of each column of `units` (n, k).

    Whole units are resampled, so what one row has of several models stays paired.
    """
    columns, generator = np.asarray(units, dtype=np.float64), np.random.default_rng(seed)
    n, found = len(columns), []
    for _ in range(N_RESAMPLES):
        times = np.bincount(generator.integers(0, n, n), minlength=n)
        found.append(statistic(*(times @ columns)))
    with np.errstate(invalid="ignore"):  # of a diverged model: infinity less itself
        return np.percentile(found, [2.5, 97.5]).tolist()


def perplexity(loss: float) -> float:
    """exp of a loss in nats; of a diverged model, whose figure nothing could hold, infinity."""
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf * loss  # NaN stays NaN


def documents_of(ids: np.ndarray) -> np.ndarray:
    """The number of each id's document: the id after an end opens one."""
    is_end = ids == tokenizer.END_OF_TEXT
    return np.cumsum(is_end) - is_end


def figures(losses: np.ndarray, ids: np.ndarray, mask: np.ndarray, seed: int) -> dict:
    """Of documents, over all tokens and over the assistant's: (n,) loss of each id, and its mask.

    The intervals resample documents, not tokens: those of a document are hard or easy together,
    and resampled one by one they would make the interval several times too narrow.
    """
    losses, document = losses.astype(np.float64), documents_of(ids)
    found: dict = {}
    counted = {"all": np.ones(len(losses)), "assistant": mask.astype(np.float64)}
    for name, weights in counted.items():
        nats, n_tokens = float(losses @ weights), int(weights.sum())
        if not n_tokens:
            continue
        units = [np.bincount(document, weights=of) for of in (losses * weights, weights)]
        n_bytes = float(tokenizer.token_bytes()[ids] @ weights)
        found[name] = {
            "perplexity": perplexity(nats / n_tokens),
            "perplexity_95": bootstrap(
                np.stack(units, axis=1), lambda nats, n: perplexity(nats / max(n, 1)), seed
            ),
            "loss": nats / n_tokens,
            # Special ids stand for no byte of text: their nats count, so a text's end is paid for.
            "bits_per_byte": nats / math.log(2) / max(1.0, n_bytes),
            "tokens": n_tokens,
        }
    return found | {"documents": int(document.max(initial=-1)) + 1}


def by_label(
    losses: np.ndarray,
    ids: np.ndarray,
    mask: np.ndarray,
    labels: dict[str, tuple[list[str], np.ndarray]],
    seed: int,
) -> dict:
    """'by_source' and 'by_category': the figures of each one's documents, the largest first. `ids`
    and `mask` are of a whole split, whose first token has no loss.
    """
    document, found = documents_of(ids)[1:], {}
    for use, (names, numbers) in labels.items():
        of_token = numbers[document]
        n_tokens = np.bincount(of_token, minlength=len(names))
        order = [n for n in np.argsort(-n_tokens, kind="stable").tolist() if n_tokens[n]]
        groups = {names[n]: [n] for n in order[:MOST_SOURCES]}
        if others := order[MOST_SOURCES:]:
            groups[f"{len(others)} others"] = others
        found[f"by_{use}"] = {}
        for name, members in groups.items():
            inside = np.isin(of_token, members)
            parts = (part[inside] for part in (losses, ids[1:], mask[1:]))
            found[f"by_{use}"][name] = figures(*parts, seed)
    return found


def by_position(losses: np.ndarray, weights: np.ndarray, *, block_size: int, stride: int) -> list:
    """Loss in nats by the tokens of the window before a target: 1, 2, 3 to 4, 5 to 8, ...

    `losses` (n,) and `weights` (n,) are of each token but the first.
    """
    place = np.arange(len(losses))
    window = np.maximum(place // stride * stride - (block_size - stride), 0)  # its first token
    doublings = np.ceil(np.log2(place - window + 1)).astype(np.int64)
    nats, counts = (np.bincount(doublings, weights=w) for w in (losses * weights, weights))
    return [
        {
            "before": [2**n // 2 + 1, min(2**n, block_size)],
            "loss": float(nats[n] / counts[n]),
            "tokens": int(counts[n]),
        }
        for n in np.flatnonzero(counts).tolist()
    ]


def report(result: dict) -> str:
    """The figures for a terminal. Of a run that was trained on answers alone, theirs: over tokens
    that training never had for targets, a perplexity of thousands says nothing about the model.
    """
    on_answers = result["loss_on"] == "assistant" and "assistant" in result
    kinds = ("assistant",) if on_answers else ("all", "assistant")
    rows = [row(f"{kind} tokens", result[kind]) for kind in kinds if kind in result]
    parts = [
        table([["validation", *HEAD], *rows]),
        f"{result['documents']:,} documents of {result['data']}, {result['checkpoint']}, context "
        f"{result['block_size']}, stride {result['stride']}, {result['dtype']}",
    ]
    if on_answers:
        parts.append("no other token was a target in training (loss_on=assistant)")
    for use in ("source", "category"):
        named = {name: of.get(kinds[0]) for name, of in result.get(f"by_{use}", {}).items()}
        rows = [row(terminal.one_line(name)[:40], found) for name, found in named.items() if found]
        if len(rows) > 1:
            parts.append("\n" + table([[f"{kinds[0]} tokens by {use}", *HEAD], *rows]))
    return "\n".join(parts)


HEAD = ["perplexity", "95% interval", "bits/byte", "tokens"]


def row(name: str, found: dict) -> list[str]:
    """A line of a table of figures."""
    low, high = found["perplexity_95"]
    return [
        name,
        f"{found['perplexity']:,.3f}",
        f"{low:,.3f} - {high:,.3f}",
        f"{found['bits_per_byte']:.4f}",
        f"{found['tokens']:,}",
    ]


def main(config: EvalConfig) -> None:
    with distributed.start(config.device) as world:
        dtype = choose_dtype(config.dtype, world.device)
        # In float32 under autocast, as training evaluates, so that the two figures agree.
        model, path, meta = load(
            config.run, config.step, device=world.device, dtype=dtype, cast=False
        )
        block_size = model.config.block_size
        stride = config.stride or block_size
        if stride > block_size:
            config.refuse("stride", f"wanted at most the context, {block_size}")
        data_dir = config.data_dir or meta.get("settings", {}).get("data_dir")
        if not data_dir:
            wanted = "name some with --data_dir=FOLDER"
            raise UserError(f"{path} was not trained on bins of ours; {wanted}")
        folder = world.on_main(
            lambda: writable(Path(config.output_dir or path.parent), "use another --output_dir")
        )
        split = bins.Split(data_dir, "val")
        ids, mask = split.ids(0, split.n_tokens), split.mask(0, split.n_tokens)
        losses = score(model, ids, world, stride=stride, batch_size=config.batch_size, dtype=dtype)
        if not world.is_main:
            return
        result = {
            "checkpoint": str(path),
            "data": str(split.path),
            "data_sha256": split.sha256,
            "block_size": block_size,
            "stride": stride,
            "loss_on": meta["identity"].get("loss_on"),
            "dtype": str(dtype).removeprefix("torch."),
            **figures(losses, ids[1:], mask[1:], config.seed),
            **by_label(losses, ids, mask, split.labels(), config.seed),
        }
        weights = mask[1:] if result["loss_on"] == "assistant" else np.ones(len(losses))
        result["by_position"] = by_position(losses, weights, block_size=block_size, stride=stride)
        terminal.say(report(result))  # first: a disk may fill up meanwhile
        target = folder / "eval_ppl.json"
        write_atomically(target, json_text(result))
        terminal.say(f"all figures: {target}")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
