"""AdamW and Muon, tuned alike: the validation loss that equal tokens buy.

A contender is tuned at the first seed by coordinate search: of each knob the values beside the best
are tried, one at a time, until none is better. What is found is run at three seeds. A run is made
of train.py's own steps, in this process; a finished one is a line of OUT_DIR/runs.jsonl and is not
made again, so the command may be cut short and given again, and contenders run side by side.

Usage:
    python prepare.py --source=conversations.json --data_dir=data/mine
    python -m benchmarks.recipe --data_dir=data/mine --size=s --steps=250
    python -m benchmarks.recipe --report=True   # tables and pictures of what is there
"""

import functools
import itertools
import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

from nanosynth import settings
from nanosynth.settings import setting

SIZES = {
    "s": {"n_layer": 3, "n_head": 2, "n_embd": 64},
    "m": {"n_layer": 4, "n_head": 3, "n_embd": 96},
    "l": {"n_layer": 6, "n_head": 4, "n_embd": 128},
}
SEEDS = (42, 43, 44)
ROWS, BLOCK_SIZE, EVAL_ROWS, N_EVALUATIONS = 8, 256, 64, 10
MIN_LEARNING_RATE_SHARE = 0.1  # of the peak, where the cosine ends
RATES = ("learning_rate", "embedding_learning_rate")  # doubled and halved without end
LADDERS = {
    "beta1": (0.6, 0.8, 0.9, 0.95),
    "beta2": (0.95, 0.99, 0.999),
    "warmup": (0.05, 0.1, 0.3),  # a share of the steps
    "weight_decay": (0.01, 0.1, 0.3),
    "zero_init": (False, True),
    "position_share": (0.25, 0.5, 1.0, 2.0, 4.0),  # of the tokens' rate, for the positions
}
KNOBS = (*RATES, *LADDERS)
# Where the search begins: what is best of what was tried at 3 x 64 and 250 steps.
START = {
    "adamw": {
        "learning_rate": 0.006,
        "embedding_learning_rate": 0.064,
        "beta1": 0.8,
        "beta2": 0.99,
        "warmup": 0.3,
        "weight_decay": 0.1,
        "zero_init": False,
        "position_share": 1.0,
    },
    "muon": {
        "learning_rate": 0.024,
        "embedding_learning_rate": 0.024,
        "beta1": 0.8,
        "beta2": 0.99,
        "warmup": 0.1,
        "weight_decay": 0.1,
        "zero_init": False,
        "position_share": 1.0,
    },
}

Curve = list[list[float]]  # [tokens, validation loss] at each evaluation


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(settings.Settings):
    """Tune AdamW and Muon alike, and set them side by side."""

    data_dir: str = setting("data/gpteacher", "prepared bins", path=True)
    out_dir: str = setting("out/recipe", "where runs, tables and pictures go", path=True)
    size: Literal["s", "m", "l"] = setting("s", "3 x 64, 4 x 96 or 6 x 128 (layers x channels)")
    steps: int = setting(250, f"of {ROWS} rows of {BLOCK_SIZE} tokens", at_least=N_EVALUATIONS)
    contender: settings.MANY = setting((), "adamw or muon; none: both")
    knob: settings.MANY = setting(
        (), "what is searched, the rest as it starts; default all; or none"
    )
    seeds: int = setting(len(SEEDS), "that run the best", at_least=1, at_most=len(SEEDS))
    # On a CPU the softmax over 50,304 ids is most of a small model's work.
    vocabulary: int = setting(
        2048, "commonest ids, all others made one; 0: all", at_least=0, at_most=50_000
    )
    report: bool = setting(False, "make no runs; write tables and pictures of those there are")

    @property
    def stem(self) -> str:
        """Of the reports' names: losses of two vocabularies don't compare."""
        return "recipe" if self.vocabulary else "recipe_whole"

    def check(self) -> None:
        for flag, known in (("contender", tuple(START)), ("knob", (*KNOBS, "none"))):
            if unknown := set(getattr(self, flag)) - set(known):
                self.refuse(flag, f"no {unknown.pop()}; wanted of: {', '.join(known)}")


if __name__ == "__main__":
    arguments = settings.from_argv(RecipeConfig)

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

import train
from benchmarks.step import new_log
from nanosynth import files, tokenizer
from nanosynth.data import bins
from nanosynth.table import table
from nanosynth.training import distributed, optim
from nanosynth.training.optim import parameter_groups


class Runs:
    """The finished runs: a file of one line each, read anew at each look, as others write too."""

    def __init__(self, config: RecipeConfig):
        self.config, self.path = config, Path(config.out_dir, "runs.jsonl")

    def read(self) -> list[dict]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def curve(self, cell: dict) -> Curve:
        """Of the run with these settings, which is made where it is not there yet."""
        for found in self.read():
            if found["cell"] == cell:
                return found["curve"]
        started = time.perf_counter()
        curve = run(self.config, cell)
        line = {"cell": cell, "curve": curve, "seconds": round(time.perf_counter() - started, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{curve[-1][1]:.4f}  {cell}", file=sys.stderr, flush=True)
        return curve


def cell_of(config: RecipeConfig, optimizer: str, knobs: dict, seed: int) -> dict:
    """All that tells a run from another."""
    place = {"size": config.size, "steps": config.steps, "vocabulary": config.vocabulary}
    return {**place, "optimizer": optimizer, **knobs, "seed": seed}


def run(config: RecipeConfig, cell: dict) -> Curve:
    """Train by train.py's steps, evaluate by its evaluation; nothing else is written."""
    data_dir, vocab_size = cut_vocabulary(config)
    tuned = {name: cell[name] for name in ("optimizer", *KNOBS, "seed")}
    warmup, position_share = tuned.pop("warmup"), tuned.pop("position_share")
    whole = train.TrainConfig(
        **SIZES[cell["size"]],
        **tuned,
        data_dir=data_dir,
        out_dir=str(Path(config.out_dir, "none")),
        resume="never",
        block_size=BLOCK_SIZE,
        micro_batch_size=ROWS,
        rows_per_step=ROWS,
        eval_rows=EVAL_ROWS,
        max_steps=cell["steps"],
        warmup_steps=round(warmup * cell["steps"]),
        min_learning_rate=MIN_LEARNING_RATE_SHARE * cell["learning_rate"],
    )
    world = distributed.World(rank=0, size=1, device=torch.device("cpu"))
    groups = functools.partial(groups_with_positions, position_share)
    with (
        mock.patch.object(tokenizer, "VOCAB_SIZE", vocab_size),
        mock.patch.object(optim, "parameter_groups", groups),
    ):
        made = train.build(whole, world, train.open_splits(whole))
    log, curve = new_log(made), []
    for step in range(made.max_steps):
        train.take_step(made, step, log)
        if (step + 1) % (made.max_steps // N_EVALUATIONS) == 0:
            curve.append(
                [(step + 1) * made.tokens_per_step, train.evaluate(made, made.n_eval_rows)]
            )
    return curve


def groups_with_positions(share: float, *arguments: object) -> list[dict]:
    """parameter_groups, but the positions at this share of the tokens' rate: no setting has it."""
    embeddings, *others = parameter_groups(*arguments)
    tokens, positions = embeddings["params"]
    at_share = {"params": [positions], "lr_share": share * embeddings["lr_share"]}
    return [embeddings | {"params": [tokens]}, *others, embeddings | at_share]


def cut_vocabulary(config: RecipeConfig) -> tuple[str, int]:
    """(bins, ids they have): data_dir's, or a copy in which all but the commonest ids are one."""
    size = config.vocabulary
    if not size:
        return config.data_dir, tokenizer.VOCAB_SIZE
    folder = Path(config.out_dir, f"bins_{size}")
    if folder.exists():
        return str(folder), size
    splits = {name: bins.Split(config.data_dir, name) for name in bins.SPLITS}
    ids = {name: split.ids(0, split.n_tokens) for name, split in splits.items()}
    counts = np.bincount(ids["train"], minlength=tokenizer.VOCAB_SIZE)
    new_id = np.full(tokenizer.VOCAB_SIZE, size - 1, "<u2")
    new_id[np.argsort(-counts, kind="stable")[: size - 1]] = np.arange(size - 1)
    meta = json.loads(Path(config.data_dir, "meta.json").read_text())
    with files.new_folder(folder) as made:
        renewed = shutil.ignore_patterns(*(f"{name}.bin" for name in ids), "meta.json")
        shutil.copytree(config.data_dir, made, ignore=renewed, dirs_exist_ok=True)
        for name in ids:
            with files.HashedFile(made / f"{name}.bin") as file:
                file.write(new_id[ids[name]].tobytes())
            meta["files"][f"{name}.bin"] = file.summary()
        (made / "meta.json").write_text(json.dumps(meta))
    return str(folder), size


def search(score, start: dict, knobs: tuple[str, ...]) -> dict:
    """Where no value beside that of any of `knobs` gives a lower `score`, from `start`."""
    best, moved = start, True
    while moved:
        moved = False
        for knob in knobs:
            while better := next((n for n in beside(best, knob) if score(n) < score(best)), None):
                best, moved = better, True
    return best


def beside(knobs: dict, name: str) -> list[dict]:
    """`knobs` with the next value of one, upwards and downwards."""
    value = knobs[name]
    values = (value / 2, value, value * 2) if name in RATES else LADDERS[name]
    place = values.index(value)
    near = [values[n] for n in (place + 1, place - 1) if 0 <= n < len(values)]
    return [{**knobs, name: other} for other in near]


def final(curve: Curve) -> float:
    """The last loss; infinite where the run broke."""
    loss = curve[-1][1]
    return loss if math.isfinite(loss) else math.inf


def tokens_to_reach(curve: Curve, target: float) -> float | None:
    """Where the curve first comes down to `target`, on the line between two evaluations."""
    if curve[0][1] <= target:
        return curve[0][0]
    for (left, high), (right, low) in itertools.pairwise(curve):
        if low <= target:
            return left + (right - left) * (high - target) / (high - low) if high > low else right
    return None


def interval(values: list[float], form: str = ".3f") -> str:
    """The mean ± half of its 95% interval by Student's t; of one value the value alone."""
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return f"{mean} (one seed)"
    half = {2: 12.706, 3: 4.303}[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:{form}}"


def tuned_runs(runs: list[dict], optimizer: str) -> list[dict]:
    """A contender's runs of the settings with the most seeds, of these the best at the first."""
    made = {}
    for run in sorted(runs, key=lambda run: run["cell"]["seed"]):
        if run["cell"]["optimizer"] == optimizer:
            made.setdefault(tuple(run["cell"][knob] for knob in KNOBS), []).append(run)
    return min(made.values(), key=lambda runs: (-len(runs), final(runs[0]["curve"])), default=[])


def costs(runs: list[dict], best: dict, knob: str) -> str:
    """What each value of a knob adds to the loss of the best; where that was not tried, the least
    that it adds to another run's.
    """
    kind = {name: best[name] for name in ("optimizer", "seed")}
    alike = [run for run in runs if {**run["cell"], **kind} == run["cell"]]
    added = {}
    for run, other in itertools.product(alike, alike):
        if other["cell"] == {**run["cell"], knob: best[knob]}:
            value, cost = run["cell"][knob], final(run["curve"]) - final(other["curve"])
            found = (other["cell"] != best, cost)  # of the best itself first
            added[value] = min(found, added.get(value, found))
    return ", ".join(
        f"**{value:g}**" if value == best[knob] else f"{value:g}: {cost:+.3f}"
        for value, (_, cost) in sorted(added.items())
    )


def report(config: RecipeConfig, runs: list[dict]) -> str:
    """Every size and length in Markdown, its picture beside it: OUT_DIR/recipe_SIZE_STEPS.png, or
    recipe_whole_SIZE_STEPS.png of the whole vocabulary.
    """
    head = ["layers x channels", "steps", "adamw's end", "muon's end", "muon there after"]
    rows, tables = [head], []
    for size, steps in itertools.product(SIZES, sorted({run["cell"]["steps"] for run in runs})):
        here = [r for r in runs if (r["cell"]["size"], r["cell"]["steps"]) == (size, steps)]
        best = {name: tuned_runs(here, name) for name in START}
        if not all(best.values()):
            continue
        ends = {name: [final(run["curve"]) for run in made] for name, made in best.items()}
        pairs = zip(ends["adamw"], best["muon"], strict=False)  # of one seed each
        reached = [tokens_to_reach(run["curve"], end) for end, run in pairs]
        share = "not reached by every seed"
        if None not in reached:
            n_tokens = steps * ROWS * BLOCK_SIZE
            share = interval([tokens / n_tokens for tokens in reached], ".0%")
        shape = f"{SIZES[size]['n_layer']} x {SIZES[size]['n_embd']}"
        rows.append([shape, f"{steps:,}", interval(ends["adamw"]), interval(ends["muon"]), share])
        knobs = [
            [knob, *(costs(here, made[0]["cell"], knob) for made in best.values())]
            for knob in KNOBS
        ]
        title, picture = f"{shape}, {steps:,} steps", f"{config.stem}_{size}_{steps}.png"
        tables += [f"{title}:", table([["knob", *best], *knobs], markdown=True)]
        draw(best, title, Path(config.out_dir, picture))
    return "\n\n".join([table(rows, markdown=True), *tables]) if tables else "no ends yet"


def draw(best: dict[str, list[dict]], title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, runs in best.items():
        tokens = [point[0] / 1e6 for point in runs[0]["curve"]]
        losses = np.array([[point[1] for point in run["curve"]] for run in runs])
        (line,) = axes.plot(tokens, losses.mean(axis=0), label=name)
        axes.fill_between(
            tokens, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.25
        )
    target = statistics.mean(final(run["curve"]) for run in best["adamw"])
    axes.axhline(target, color="grey", linestyle=":", label="adamw's end")
    axes.set_title(f"{title}: mean and range of the seeds")
    axes.set(xlabel="million tokens", ylabel="validation loss, nats a token")
    axes.set_ylim(top=target + 1.2)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(config: RecipeConfig) -> None:
    matplotlib.use("Agg")
    runs = Runs(config)
    for name in config.contender or START:
        if config.report:
            break

        def loss(knobs: dict, seed: int = SEEDS[0], name: str = name) -> float:
            return final(runs.curve(cell_of(config, name, knobs, seed)))

        knobs = tuple(knob for knob in KNOBS if knob in (config.knob or KNOBS))
        best = search(loss, START[name], knobs)
        for seed in SEEDS[: config.seeds]:
            loss(best, seed)
    here = [run for run in runs.read() if run["cell"]["vocabulary"] == config.vocabulary]
    text = report(config, here)
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    Path(config.out_dir, f"{config.stem}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
