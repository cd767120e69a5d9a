"""A run's folder as a report reads it, and the figures in it; it judges nothing (criteria.py does).

Each file may be missing. What is torn, or lacks a field that is used, is left out and noted.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from nanosynth import UserError, checkpoint
from nanosynth.data import bins

BROKEN = (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
GAP_STEPS = 128  # training steps whose mean loss stands beside a validation loss
SAMPLE_FILES = ("task_generations.jsonl", "generations.jsonl")  # the first that is there counts
FIELDS = {  # of a line, by its split; the lines of a file of samples have none
    "train": "step loss lr grad_norm loss_scale skipped tokens tokens_per_second mfu".split(),
    "val": "step loss seconds".split(),
    None: "prompt text finish tokens".split(),
}


@dataclass(kw_only=True)
class Run:
    """What a run's folder holds; {} and [] stand for what it does not hold."""

    path: str
    config: dict = field(default_factory=dict)
    train: list[dict] = field(default_factory=list)  # metrics.jsonl, by split
    val: list[dict] = field(default_factory=list)
    meta: dict = field(default_factory=dict)  # meta.json of the best checkpoint
    perplexity: dict = field(default_factory=dict)
    tasks: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)  # meta.json of data_dir
    samples: list[dict] = field(default_factory=list)
    samples_file: str = ""
    notes: list[str] = field(default_factory=list)  # what could not be read, or does not agree

    @property
    def settings(self) -> dict:
        found = self.config.get("settings")
        return found if isinstance(found, dict) else {}

    @property
    def steps(self) -> int:
        return self.train[-1]["step"] + 1 if self.train else 0

    @property
    def tokens_per_step(self) -> int:
        return self.train[0]["tokens"] // (self.train[0]["step"] + 1) if self.train else 0

    @property
    def finished(self) -> bool | None:
        """None where it is not known how many steps were wanted."""
        wanted = self.config.get("max_steps")
        return self.steps >= wanted if wanted else None

    def attempt(self, name: str, otherwise: object, compute: Callable, *arguments: object):
        """What `compute` makes of the file `name`; `otherwise`, and a note, where it cannot."""
        try:
            return compute(*arguments)
        except BROKEN as error:
            why = str(error) if isinstance(error, UserError) else repr(error)
            note = f"{self.path}: {name} is left out: {why}"
            self.notes += [] if note in self.notes else [note]
            return otherwise


def read(path: str) -> Run:
    """Everything in a run's folder."""
    folder, run = Path(path), Run(path=path.rstrip("/"))
    run.config = run.attempt("config.json", {}, _read_json, folder / "config.json")
    for record in _read_lines(run, folder / "metrics.jsonl"):
        (run.train if record["split"] == "train" else run.val).append(record)
    run.meta = run.attempt("its best checkpoint", {}, _best_meta, folder)
    run.perplexity = run.attempt("eval_ppl.json", {}, _read_json, folder / "eval_ppl.json")
    run.tasks = run.attempt("tasks.json", {}, _read_json, folder / "tasks.json")
    for name in SAMPLE_FILES:
        if not run.samples:
            run.samples, run.samples_file = _read_lines(run, folder / name), name
    if data_dir := run.settings.get("data_dir"):
        run.data = run.attempt("its data", {}, bins.read_meta, data_dir)
    if not any((run.config, run.train, run.meta, run.perplexity, run.tasks, run.samples)):
        raise UserError(f"{path!r} holds nothing of a run; wanted what train.py writes to out_dir")
    if run.meta:
        run.notes += run.attempt("its best checkpoint", [], _disagreements, run)
    return run


def _read_json(path: Path) -> dict:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _best_meta(folder: Path) -> dict:
    saved = [checkpoint.folder(folder, step) for step in checkpoint.steps(folder)]
    if not saved:
        raise UserError("there is none; train.py saves them")
    return checkpoint.read_meta(checkpoint.best(folder) or saved[-1])


def _read_lines(run: Run, path: Path) -> list[dict]:
    """The records of a file, but for the lines that are torn or lack a field."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    records, bad = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not set(FIELDS[record.get("split")]) <= record.keys():
                raise KeyError
            records.append(record)
        except BROKEN:
            bad.append(number)
    if bad:
        which = f"line {numbers(bad)} of {len(lines):,}"
        run.notes.append(f"{path}: left out, as torn or lacking a field: {which}")
    return records


def _disagreements(run: Run) -> list[str]:
    """Files that are of other data, or of another checkpoint, than the best checkpoint."""
    best, found = run.meta["step"], []
    trained_on = run.meta["identity"]["data_sha256"]
    if run.data and trained_on not in (None, run.data["files"]["train.bin"]["sha256"]):
        found.append(f"{run.path}: its data was prepared anew after this run: train.bin differs")
    scored = Path(run.perplexity.get("checkpoint", "")).name.removeprefix("step_")
    for name, step in (("eval_ppl.json", scored), ("tasks.json", run.tasks.get("step"))):
        if step and int(step) != best:
            found.append(f"{run.path}: {name} is of step {int(step)}, but the best is now {best}")
    return found


def timing(run: Run) -> dict[str, float]:
    """Speed and hours, added up step by step, so that pauses don't count."""
    timed = [(r, run.tokens_per_step / r["tokens_per_second"]) for r in run.train]
    train = sum(seconds for _, seconds in timed)
    mfu = sum(seconds * (record["mfu"] or 0) for record, seconds in timed) / train
    found = {"tokens a second": len(timed) * run.tokens_per_step / train}
    found |= {"hours": 0.0, "device-hours": 0.0} | ({"MFU": mfu} if mfu else {})
    for record, seconds in [*timed, *((r, r["seconds"]) for r in run.val)]:
        # A resumed run may have had another number of devices from a step on.
        starts = [s for s in run.config.get("starts") or () if s["first_step"] <= record["step"]]
        n_devices = (starts[-1] if starts else run.config).get("world_size", 1)
        found["hours"] += seconds / 3600
        found["device-hours"] += seconds / 3600 * n_devices
    return found


def gap(run: Run) -> float | None:
    """The last validation loss less the mean of the GAP_STEPS accepted training losses before."""
    evaluated = [record for record in run.val if record["loss"] is not None]
    end = evaluated[-1]["step"] if evaluated else 0
    accepted = [r for r in run.train if r["loss"] is not None and not r["skipped"]]
    before = [record["loss"] for record in accepted if record["step"] < end][-GAP_STEPS:]
    return evaluated[-1]["loss"] - fmean(before) if before else None


def loss_at(run: Run) -> dict[int, float]:
    """Validation loss by tokens seen."""
    return {r["step"] * run.tokens_per_step: r["loss"] for r in run.val if r["loss"] is not None}


def figures(run: Run) -> dict[str, float]:
    """Every figure that the run has, by name: what stands side by side and is spread over seeds."""
    losses, exact = loss_at(run), [s["exact"] for s in run.samples if "exact" in s]
    found = {"parameters": run.config.get("parameters"), "gap to training loss": gap(run)}
    if run.train:
        found |= {"steps": run.steps, "tokens seen": run.train[-1]["tokens"]}
        found |= run.attempt("metrics.jsonl", {}, timing, run)
    if losses:
        found["validation loss, lowest"] = min(losses.values())
        found["validation loss, last"] = losses[max(losses)]
    if exact:
        found["answers exactly right"] = fmean(exact)
    scored = {f"{name} tokens": run.perplexity.get(name) for name in ("all", "assistant")}
    found |= run.attempt("eval_ppl.json", {}, dict, leaves(scored))
    for part in ("generation", "zero_shot"):
        found |= run.attempt("tasks.json", {}, dict, leaves(run.tasks.get(part, {})))
    return {name: value for name, value in found.items() if value is not None}


# What tells how a figure was measured, or stands elsewhere in the report.
NO_FIGURES = "n left_out distinct_counts compression_bytes limit metrics stderr chance".split()


def leaves(tree: dict, *path: str) -> Iterator[tuple[str, float]]:
    """(name, figure) of each figure in a tree; of a share the share alone."""
    for key, value in tree.items():
        if key in NO_FIGURES:
            continue
        if isinstance(value, dict) and "share" in value:
            value = value["share"]
        if isinstance(value, dict):
            yield from leaves(value, key, *path)
        elif type(value) in (int, float) and math.isfinite(value):
            yield ", ".join((key, *path)).replace("_", " "), value


def numbers(steps: list[int], most: int = 20) -> str:
    """The first of them, and how many more."""
    more = f" and {len(steps) - most:,} more" if len(steps) > most else ""
    return ", ".join(map(str, steps[:most])) + more
