"""Recipes side by side: the validation loss that equal tokens buy, over three seeds.

AdamW and Muon are tuned alike, at the first seed: learning rates a factor of two apart, until the
best has a worse one on either side. It is then run at all seeds, by their variants too. Runs are
those of train.py, compiled, so that a C++ compiler is needed on a CPU; a finished one is kept, so
the command may be cut short and given again. Writes OUT_DIR/SIZE.md and SIZE.png.

Usage:
    python prepare.py --source=conversations.json --data_dir=data/mine
    python -m benchmarks.recipe --data_dir=data/mine --size=m
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from nanosynth import UserError, settings, tokenizer
from nanosynth.settings import setting

STEPS, TOKENS_PER_STEP = 250, 4096
SIZES = {
    "s": {"n_layer": 3, "n_head": 2, "n_embd": 64},
    "m": {"n_layer": 4, "n_head": 3, "n_embd": 96},
    "l": {"n_layer": 6, "n_head": 4, "n_embd": 128},
}
LAST = 5  # checkpoints whose weights are averaged: those of the last fifth of a run
BASE = {
    "block_size": 256,
    "micro_batch_size": TOKENS_PER_STEP // 256,
    "rows_per_step": TOKENS_PER_STEP // 256,
    "max_steps": STEPS,
    "warmup_steps": STEPS // 10,
    "eval_rows": 64,
    "log_interval": 50,
    "keep_last": LAST,
    "compile": True,
}
MIN_LEARNING_RATE_SHARE = 0.1  # of the peak, where the recipe says nothing else
SEEDS = (42, 43, 44)
MUON, LINEAR_TO_ZERO = {"optimizer": "muon"}, {"decay": "linear", "min_learning_rate": 0.0}
FAST = {**MUON, "beta2": 0.99, "weight_decay": 0.1}  # what paid at the smallest size
# Each as what it changes against the first, the baseline. A variant takes the learning rate of the
# tuned recipe that shares its optimizer.
RECIPES = {
    "adamw": {},
    "adamw, linear to 0": LINEAR_TO_ZERO,
    "muon": MUON,
    "muon, linear to 0": {**MUON, **LINEAR_TO_ZERO},
    "muon, zero init": {**MUON, "zero_init": True},
    "muon, beta2 0.99": {**MUON, "beta2": 0.99},
    "muon, weight decay 0.1": {**MUON, "weight_decay": 0.1},
    "muon, half the warmup": {**MUON, "warmup_steps": STEPS // 20},
    "muon, half the batch": {
        **MUON,
        "micro_batch_size": BASE["micro_batch_size"] // 2,
        "rows_per_step": BASE["rows_per_step"] // 2,
        "max_steps": 2 * STEPS,
        "warmup_steps": STEPS // 5,
    },
    "muon, twice the batch": {
        **MUON,
        "micro_batch_size": 2 * BASE["micro_batch_size"],
        "rows_per_step": 2 * BASE["rows_per_step"],
        "max_steps": STEPS // 2,
        "warmup_steps": STEPS // 20,
    },
    "fast": FAST,
    "fast, 60% of the tokens": {
        **FAST,
        "max_steps": STEPS * 6 // 10,
        "warmup_steps": STEPS * 6 // 100,
    },
}
# Muon on other training bins, see `make_bins`.
BINS = {
    "muon, rows begin with a document": "aligned",
    "muon, half of the tokens twice": "half",
}
RECIPES |= dict.fromkeys(BINS, MUON)
TUNED = {"adamw": 3e-3, "muon": 2.4e-2}  # and the learning rate that is tried first


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(settings.Settings):
    """Compare recipes at one size."""

    data_dir: str = setting("data/gpteacher", "prepared bins")
    size: Literal["s", "m", "l"] = setting("m", "3 x 64, 4 x 96 or 6 x 128 (layers x channels)")
    recipe: settings.MANY = setting((), "which, beside adamw; none: all")
    out_dir: str = setting("out/recipe", "where runs, tables and pictures go")
    jobs: int = setting(os.cpu_count() or 1, "runs at a time; the cores are shared out", at_least=1)

    def check(self) -> None:
        if unknown := set(self.recipe) - RECIPES.keys():
            raise UserError(f"--recipe={unknown.pop()}; wanted one of: {'; '.join(RECIPES)}")


if __name__ == "__main__":
    arguments = settings.from_argv(RecipeConfig)

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

from model import GPT, GPTConfig
from nanosynth import checkpoint, files
from nanosynth.data import bins


class Run(NamedTuple):
    losses: dict[int, float]  # tokens -> validation loss
    loss_of_mean: float  # of the mean of the last LAST checkpoints' weights


def run(config: RecipeConfig, name: str, learning_rate: float, seed: int) -> Run:
    """One run of train.py, which is made where it is not there yet."""
    flags = {
        "min_learning_rate": MIN_LEARNING_RATE_SHARE * learning_rate,
        **BASE,
        **SIZES[config.size],
        **RECIPES[name],
        "learning_rate": learning_rate,
        "seed": seed,
        "data_dir": make_bins(config, BINS[name]) if name in BINS else config.data_dir,
    }
    flags["eval_interval"] = flags["max_steps"] // 12
    flags["save_interval"] = flags["max_steps"] // 25
    slug = name.replace(", ", "-").replace(" ", "_").replace("%", "")
    run_dir = Path(config.out_dir) / config.size / f"{slug}-{learning_rate:g}-{seed}"
    mean_file = run_dir / "loss_of_mean"
    if not mean_file.exists():
        threads = max(1, (os.cpu_count() or 1) // config.jobs)
        subprocess.run(
            [sys.executable, "train.py", f"--out_dir={run_dir}"]
            + [f"--{key}={value}" for key, value in flags.items()],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        mean_file.write_text(str(loss_of_mean(config, run_dir)))
        for step_dir in run_dir.glob("step_*"):
            shutil.rmtree(step_dir)
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    tokens_per_step = flags["micro_batch_size"] * flags["block_size"]
    losses = {r["step"] * tokens_per_step: r["loss"] for r in records if r["split"] == "val"}
    print(
        f"{config.size} {name}, {learning_rate:g}, seed {seed}: {final(losses):.4f}",
        file=sys.stderr,
        flush=True,
    )
    return Run(losses, float(mean_file.read_text()))


def make_bins(config: RecipeConfig, change: str) -> str:
    """A copy of data_dir with other training tokens, made where it is not there yet."""
    folder = Path(config.out_dir) / f"bins_{change}"
    if folder.exists():
        return str(folder)
    train, block_size = bins.Split(config.data_dir, "train"), BASE["block_size"]
    ids, mask = train.ids(0, train.n_tokens), train.mask(0, train.n_tokens)
    if change == "half":
        kept = np.arange(STEPS * TOKENS_PER_STEP // 2 + 1)
    else:  # a row is one stretch; what is left of its last document is dropped
        starts = np.flatnonzero(np.append(True, ids[:-1] == tokenizer.END_OF_TEXT))
        rows = [0]
        while (next_row := np.searchsorted(starts, rows[-1] + block_size)) < len(starts):
            rows.append(starts[next_row])
        kept = np.add.outer(rows[:-1], np.arange(block_size)).ravel()
    meta = json.loads(Path(config.data_dir, "meta.json").read_text())
    with files.new_folder(folder) as made:
        shutil.copytree(config.data_dir, made, dirs_exist_ok=True)
        for name, array in (("train.bin", ids[kept]), ("train_mask.bin", mask[kept])):
            with files.HashedFile(made / name) as file:
                file.write(array.tobytes())
            meta["files"][name] = file.summary()
        (made / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@torch.no_grad()
def loss_of_mean(config: RecipeConfig, run_dir: Path) -> float:
    """Validation loss of the mean of the weights in a run's last checkpoints."""
    mean: dict[str, torch.Tensor] = {}
    for step in sorted(checkpoint.steps(run_dir))[-LAST:]:
        step_dir = checkpoint.folder(run_dir, step)
        meta = checkpoint.verify(step_dir)
        for key, tensor in checkpoint.read_model(step_dir, meta).items():
            mean[key] = mean.get(key, 0.0) + tensor / LAST
    model = GPT(GPTConfig(**meta["identity"]["model"])).eval()
    model.load_state_dict(mean)
    split, block_size = bins.Split(config.data_dir, "val"), BASE["block_size"]
    losses = []
    for row in range(BASE["eval_rows"]):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(*bins.read_batch(split, [row], block_size, "all")))
    return torch.cat(losses).double().mean().item()


def final(losses: dict[int, float]) -> float:
    return losses[max(losses)]


def tokens_to_reach(losses: dict[int, float], target: float) -> float | None:
    """Where the curve first comes down to `target`, on the line between two evaluations."""
    points = sorted(losses.items())
    if points[0][1] <= target:
        return points[0][0]
    for (left, high), (right, low) in zip(points, points[1:], strict=False):
        if low <= target:
            return left + (right - left) * (high - target) / (high - low) if high > low else right
    return None


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95% interval by Student's t) of two or three values."""
    half = {2: 12.706, 3: 4.303}[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def tune(config: RecipeConfig, name: str) -> dict[float, float]:
    """learning rate -> final loss at the first seed; the best has a worse one on either side."""
    tried: dict[float, float] = {}
    rate = TUNED[name]
    while rate:
        tried[rate] = final(run(config, name, rate, SEEDS[0]).losses)
        best = min(tried, key=tried.get)
        rate = next((near for near in (2 * best, best / 2) if near not in tried), None)
    return dict(sorted(tried.items()))


def table(runs: dict[str, list[Run]], tried: dict, rates: dict) -> str:
    """The comparison in Markdown; every recipe that was run stands in it."""
    target, _ = interval([final(made.losses) for made in runs["adamw"]])
    budget = STEPS * TOKENS_PER_STEP
    lines = [
        "| recipe | learning rate | final validation loss | of the last weights' mean"
        " | share of the tokens to adamw's end |",
        "|---|---|---|---|---|",
    ]
    for name, made in runs.items():
        loss, half = interval([final(one.losses) for one in made])
        mean_loss, mean_half = interval([one.loss_of_mean for one in made])
        reached = [tokens_to_reach(one.losses, target) for one in made]
        share = "not reached by every seed"
        if None not in reached:
            share = "{:.0%} ± {:.0%}".format(*interval([tokens / budget for tokens in reached]))
        lines.append(
            f"| {name} | {rates[name]:g} | {loss:.3f} ± {half:.3f}"
            f" | {mean_loss:.3f} ± {mean_half:.3f} | {share} |"
        )
    lines += ["", "Tried at the first seed, final validation loss:", ""]
    for name, losses in tried.items():
        found = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())
        lines.append(f"- {name}: {found}")
    return "\n".join(lines)


def draw(config: RecipeConfig, runs: dict[str, list[Run]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(11, 5.5), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for name, made in runs.items():
        curves = [one.losses for one in made]
        points = sorted(set.intersection(*map(set, curves)))
        millions = [tokens / 1e6 for tokens in points]
        means = [statistics.mean(curve[tokens] for curve in curves) for tokens in points]
        (line,) = axes.plot(millions, means, label=name)
        for curve in curves:
            axes.plot(millions, [curve[t] for t in points], color=line.get_color(), alpha=0.2)
    target = statistics.mean(final(made.losses) for made in runs["adamw"])
    axes.axhline(target, color="grey", linestyle=":", label="adamw's end")
    shape = SIZES[config.size]
    axes.set_title(f"{shape['n_layer']} layers x {shape['n_embd']} channels, {len(SEEDS)} seeds")
    axes.set(xlabel="million tokens", ylabel="validation loss, nats a token")
    axes.set_ylim(top=target + 1.2)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def main(config: RecipeConfig) -> None:
    matplotlib.use("Agg")
    names = [name for name in RECIPES if name in ("adamw", *(config.recipe or RECIPES))]
    for name in BINS.keys() & names:  # before the runs, which are made side by side
        make_bins(config, BINS[name])
    with ThreadPoolExecutor(config.jobs) as pool:
        tried = dict(zip(TUNED, pool.map(lambda name: tune(config, name), TUNED), strict=True))
        best = {name: min(losses, key=losses.get) for name, losses in tried.items()}
        rates = {name: best[RECIPES[name].get("optimizer", "adamw")] for name in names}
        jobs = [(name, seed) for name in names for seed in SEEDS]
        made = list(pool.map(lambda job: run(config, job[0], rates[job[0]], job[1]), jobs))
    runs = {name: made[i * len(SEEDS) :][: len(SEEDS)] for i, name in enumerate(names)}
    text = table(runs, tried, rates)
    Path(config.out_dir, f"{config.size}.md").write_text(text + "\n")
    draw(config, runs, Path(config.out_dir, f"{config.size}.png"))
    print(text)


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
