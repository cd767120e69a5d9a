"""Speed of scoring a validation split: eval_ppl.py's loop beside the same loop in transformers.

The same weights, windows, batches and dtype; transformers holds its weights in that dtype, ours are
float32 under autocast, as eval_ppl.py has them. Both print the mean loss they found.

Usage:
    python -m benchmarks.compare_evaluation
    python -m benchmarks.compare_evaluation --device=cuda --config=config/500m.py
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers

import eval_ppl
from benchmarks import alternate
from benchmarks.alternate import Contender
from benchmarks.compare_sampling import SHAPE, ModelConfig, as_transformers, gpt_config
from benchmarks.step import random_bins
from model import GPT
from nanosynth import settings
from nanosynth.data import bins
from nanosynth.device import choose_device, choose_dtype
from nanosynth.inference.speed import speed_up_inference
from nanosynth.settings import setting
from nanosynth.training import distributed


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(ModelConfig):
    """Tokens/s of evaluation, ours against transformers'."""

    data_dir: str = setting(
        "", "prepared bins; empty: random tokens", group="The comparison", path=True
    )
    n_rows: int = setting(8, "rows of val.bin that are scored", at_least=1)
    batch_size: int = setting(8, "windows at once", at_least=1)
    pairs: int = setting(5, "turns of each side", at_least=1)
    json: str = setting("", "file for the figures", path=True)

    worker: Literal["", "ours", "transformers"] = setting(
        "", "which side this process is", group="Set by this program for its own processes"
    )
    weights: str = setting("", "file of the weights that both sides have", path=True)


def ours(config: EvaluationConfig, ids: np.ndarray) -> Callable[[], float]:
    """A function that scores `ids` and gives their mean loss."""
    device = choose_device(config.device)
    world = distributed.World(rank=0, size=1, device=device)
    model = GPT(gpt_config(config))
    model.load_state_dict(torch.load(config.weights))
    model.to(device).eval()
    speed_up_inference(model, choose_dtype(config.dtype, device))

    def score() -> float:
        losses = eval_ppl.score(
            model,
            ids,
            world,
            stride=config.block_size,
            batch_size=config.batch_size,
            dtype=choose_dtype(config.dtype, device),
        )
        return float(losses.astype(np.float64).mean())

    return score


def peer(config: EvaluationConfig, ids: np.ndarray) -> Callable[[], float]:
    device = choose_device(config.device)
    model = as_transformers(gpt_config(config), torch.load(config.weights))
    model.to(device, choose_dtype(config.dtype, device)).eval()
    tokens = torch.from_numpy(ids.astype(np.int64))

    @torch.inference_mode()
    def score() -> float:
        total = 0.0
        rows = tokens[:-1].view(-1, config.block_size).split(config.batch_size)
        targets = tokens[1:].view(-1, config.block_size).split(config.batch_size)
        for inputs, wanted in zip(rows, targets, strict=True):
            logits = model(inputs.to(device), use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), wanted.flatten().to(device), reduction="none"
            )
            total += losses.double().sum().item()
        return total / (len(tokens) - 1)

    return score


def work(config: EvaluationConfig) -> None:
    """A worker: a pass over the rows for each line that it reads."""
    split = bins.Split(config.data_dir, "val")
    n_rows = min(config.n_rows, split.n_rows(config.block_size))
    ids = split.ids(0, n_rows * config.block_size + 1)
    score = {"ours": ours, "transformers": peer}[config.worker](config, ids)
    print(f"loss {score():.6f}")
    for _ in sys.stdin:
        print(f"loss {score():.6f}")


def main(config: EvaluationConfig) -> None:
    if config.worker:
        work(config)
        return
    shape = gpt_config(config)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        weights = Path(folder) / "weights.pt"
        torch.save(GPT(shape).state_dict(), weights)
        data_dir = config.data_dir or random_bins(
            f"{folder}/data", shape.block_size, n_val_rows=config.n_rows
        )
        n_rows = min(config.n_rows, bins.Split(data_dir, "val").n_rows(shape.block_size))
        values = {name: getattr(shape, name) for name in SHAPE}
        values |= {"batch_size": config.batch_size, "n_rows": n_rows, "dtype": config.dtype}
        flags = [f"--{name}={value}" for name, value in values.items()]
        flags += [f"--device={config.device}", f"--data_dir={data_dir}", f"--weights={weights}"]
        contenders = [
            Contender(
                name=worker,
                command=["-m", "benchmarks.compare_evaluation", f"--worker={worker}", *flags],
                line="^loss",
                n_tokens=n_rows * shape.block_size,
                asks=True,
            )
            for worker in ("ours", "transformers")
        ]
        speeds, losses = alternate.alternate(
            contenders, n_pairs=config.pairs, n_units=1, n_untimed=0, n_first=0, fresh=False
        )
    facts = alternate.circumstances(config.device, transformers=transformers.__version__)
    facts |= values | {f"{name}, mean": loss for name, loss in losses.items()}
    ratios = alternate.pair_up(speeds, [("ours", "transformers")])
    alternate.report(ratios, facts, "tokens", config.json)


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(EvaluationConfig))
