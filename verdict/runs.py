"""A run's folder as the report reads it.

Each file may be missing, torn, edited by hand or under way. A schema says what is used of it; what
does not fit is left out and noted here, so that whoever has a `Run` finds the right types in it.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from nanosynth import UserError, checkpoint
from nanosynth.data import bins
from nanosynth.schema import misfit
from verdict import schemas
from verdict.events import Events, find_events
from verdict.schemas import END_LINE, SAMPLE, TRAIN_LINE, VAL_LINE

BY = ("by_source", "by_category", "by_position")  # the parts of eval_ppl.json
SAMPLE_FILES = ("task_generations.jsonl", "generations.jsonl")  # the first that is there counts


@dataclass(kw_only=True)
class Run:
    """What a run's folder holds; {} and [] stand for what it does not hold."""

    path: str
    config: dict = field(default_factory=dict)
    train: list[dict] = field(default_factory=list)  # metrics.jsonl, by split
    val: list[dict] = field(default_factory=list)
    device_hours: float | None = None  # that it counted itself, all included
    meta: dict = field(default_factory=dict)  # meta.json of the best checkpoint
    perplexity: dict = field(default_factory=dict)  # eval_ppl.json
    tasks: dict = field(default_factory=dict)
    items: dict = field(default_factory=dict)  # task_items.json: scores on single questions
    control: dict = field(default_factory=dict)  # control.json
    data: dict = field(default_factory=dict)  # meta.json of data_dir
    samples: list[dict] = field(default_factory=list)
    samples_file: str = ""
    notes: list[str] = field(default_factory=list)  # what could not be read, or does not agree

    @cached_property
    def events(self) -> Events:
        return find_events(self.train)

    @property
    def settings(self) -> dict:
        return self.config.get("settings", {})

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

    @property
    def targets(self) -> str:
        """The tokens that training had for targets, as eval_ppl.json names them."""
        return "assistant" if self.perplexity.get("loss_on") == "assistant" else "all"

    @property
    def scored_step(self) -> int | None:
        """The step that eval_ppl.json is of."""
        step = re.search("step_([0-9]{1,18})/?$", self.perplexity.get("checkpoint", ""))
        return int(step[1]) if step else None


def read(path: str) -> Run:
    """Everything in a run's folder."""
    folder, run = Path(path), Run(path=path.rstrip("/"))

    def take(name: str, schema: dict) -> dict:
        return _take(run, name, schema, lambda: json.loads((folder / name).read_bytes()))

    run.config = take("config.json", schemas.CONFIG)
    splits = {"train": run.train, "val": run.val, "end": []}
    for record in _read_lines(run, folder / "metrics.jsonl", TRAIN_LINE, VAL_LINE, END_LINE):
        splits[record["split"]].append(record)
        run.device_hours = record.get("device_hours", run.device_hours)
    best = partial(_best_meta, folder, run.notes.append)
    run.meta = _take(run, "its best checkpoint", schemas.CHECKPOINT, best)
    run.perplexity = take("eval_ppl.json", schemas.PERPLEXITY)
    for name in {"all", "assistant", *BY} & run.perplexity.keys():
        run.perplexity[name] = _nan_for_null(run.perplexity[name])
    run.tasks = take("tasks.json", schemas.TASKS)
    run.items = take("task_items.json", schemas.ITEMS)
    run.control = take("control.json", schemas.CONTROL)
    for name in SAMPLE_FILES:
        if not run.samples:
            run.samples, run.samples_file = _read_lines(run, folder / name, SAMPLE), name
    if data_dir := run.settings.get("data_dir"):
        run.data = _take(run, "its data", schemas.DATA, partial(bins.read_meta, data_dir))
    if not any((run.config, run.train, run.meta, run.perplexity, run.tasks, run.samples)):
        checkpoint.refuse_nanogpt(folder)
        raise UserError(f"{path!r} holds nothing of a run; wanted what train.py writes to out_dir")
    run.notes += _disagreements(run)
    return run


def _nan_for_null(value: object) -> object:
    """A figure that is no number is one that compares with none."""
    if isinstance(value, dict):
        return {key: _nan_for_null(part) for key, part in value.items()}
    if isinstance(value, list):
        return list(map(_nan_for_null, value))
    return math.nan if value is None else value


def _best_meta(folder: Path, say: Callable[[str], None]) -> dict:
    saved = [checkpoint.folder(folder, step) for step in checkpoint.steps(folder)]
    if not saved:
        raise UserError("there is none; train.py saves them")
    return checkpoint.read_meta(checkpoint.best(folder, say) or saved[-1])


def _take(run: Run, name: str, schema: dict, read: Callable[[], object]) -> dict:
    """What `read` finds, {} where there is none; what does not fit is noted by its name."""
    try:
        content = read()
        why = misfit(content, schema)
    except FileNotFoundError:
        return {}
    except UserError as error:
        why = str(error)
    except (OSError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        run.notes.append(f"{run.path}: {name} is left out: {why}")
        return {}
    return content


def _read_lines(run: Run, path: Path, *schemas_of_lines: dict) -> list[dict]:
    """The records of a file, but for the lines that are torn or fit none of the schemas."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    records, bad = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if all(misfit(record, schema) for schema in schemas_of_lines):
            bad.append(number)
        else:
            records.append(record)
    if bad:
        which = f"line {numbers(bad)} of {len(lines):,}"
        run.notes.append(f"{path}: left out, as torn or not of its form: {which}")
    return records


def _disagreements(run: Run) -> list[str]:
    """Files that are of other data, or of another checkpoint, than the best checkpoint."""
    if not run.meta:
        return []
    best, notes = run.meta["step"], []
    trained_on = run.meta["identity"].get("data_sha256")
    if run.data and trained_on not in (None, run.data["files"]["train.bin"]["sha256"]):
        notes.append(f"{run.path}: its data was prepared anew after this run: train.bin differs")
    for name, step in (("eval_ppl.json", run.scored_step), ("tasks.json", run.tasks.get("step"))):
        if step not in (None, best):
            notes.append(f"{run.path}: {name} is of step {step}, but the best is now {best}")
    return notes


def numbers(steps: list[int], most: int = 20) -> str:
    """The first of them, and how many more."""
    more = f" and {len(steps) - most:,} more" if len(steps) > most else ""
    return ", ".join(map(str, steps[:most])) + more
