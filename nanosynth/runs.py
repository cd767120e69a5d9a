"""A run's folder as a report reads it: each file may be missing, and what cannot be read is said.

It reads what the scripts wrote and adds up figures; it judges nothing (criteria.py does).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from nanosynth import UserError, checkpoint, dataset

GAP_STEPS = 128  # training steps whose mean loss stands beside a validation loss

# The form that each file must have to be used: a type, several (any of them), [each], {key: form};
# the key ... stands for every key. Further keys are free.
NUMBER, MAYBE = (int, float), (int, float, type(None))
SHARE = {"passed": int, "n": int, "share": NUMBER, "interval": [NUMBER]}
PERPLEXITY = {
    **{"perplexity": NUMBER, "perplexity_95": [NUMBER], "bits_per_byte": NUMBER, "tokens": int}
}
GENERATION = {
    **{"n": int, "coherent": SHARE, "parts": {...: MAYBE}, "distinct": {...: MAYBE}},
    **{"self_bleu": MAYBE, "compression_ratio": MAYBE},
    **{"instructions": (SHARE, type(None)), "memorised": (SHARE, type(None))},
}
START = {"date": str, "command": str, "first_step": int, "world_size": int, "device": str}
FORMS = {
    "config.json": {
        **{"settings": {"seed": int, "out_dir": str, "data_dir": str, "loss_on": str}},
        **{"parameters": int, "max_steps": int, "tokens_per_step": int, "world_size": int},
        **{"device": str, "dtype": str, "torch": str, "starts": ([START], type(None))},
    },
    "eval_ppl.json": {
        **{"checkpoint": str, "data": str, "data_sha256": str, "loss_on": str},
        **{"all": PERPLEXITY, "assistant": (PERPLEXITY, type(None))},
    },
    "tasks.json": {
        **{"step": int, "rule": str, "generation": {...: {...: GENERATION}}},
        "zero_shot": {
            ...: {"metric": str, "score": NUMBER, "stderr": MAYBE, "chance": MAYBE, "n": int}
        },
        "published": {...: [{"model": str, "parameters": int, "score": NUMBER, "source": str}]},
    },
}
METRICS = {
    "train": {
        **{"step": int, "loss": MAYBE, "lr": NUMBER, "grad_norm": MAYBE, "loss_scale": NUMBER},
        **{"skipped": int, "tokens": int, "tokens_per_second": NUMBER, "mfu": MAYBE},
    },
    "val": {"step": int, "loss": MAYBE, "seconds": NUMBER},
}
SAMPLE = {"prompt": str, "text": str, "finish": str, "tokens": int}
SAMPLE_FILES = ("task_generations.jsonl", "generations.jsonl")  # the first that is there counts


@dataclass(kw_only=True)
class Run:
    """What a run's folder holds; {} and [] stand for what it does not hold."""

    path: str
    config: dict = field(default_factory=dict)
    train: list[dict] = field(default_factory=list)  # metrics.jsonl, by split
    val: list[dict] = field(default_factory=list)
    checkpoints: dict[int, dict] = field(default_factory=dict)  # meta.json of each step folder
    perplexity: dict = field(default_factory=dict)
    tasks: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)  # meta.json of data_dir
    samples: list[dict] = field(default_factory=list)
    samples_file: str = ""
    notes: list[str] = field(default_factory=list)  # what could not be read, or does not agree

    @property
    def steps(self) -> int:
        return self.train[-1]["step"] + 1 if self.train else 0

    @property
    def finished(self) -> bool:
        return bool(self.config) and self.steps >= self.config["max_steps"]

    @property
    def best(self) -> int | None:
        """The saved step with the lowest validation loss."""
        losses = {step: meta["val_loss"] for step, meta in self.checkpoints.items()}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return min(known, key=known.get) if known else None


def read(path: str) -> Run:
    """Everything in a run's folder; a folder without any of it is refused."""
    folder, run = Path(path), Run(path=path.rstrip("/"))
    if not folder.is_dir():
        raise UserError(f"no folder {path!r}; wanted a run's, as train.py --out_dir=... makes it")
    run.config = _read_json(folder / "config.json", run.notes)
    for record in _read_lines(folder / "metrics.jsonl", METRICS, run.notes):
        (run.train if record["split"] == "train" else run.val).append(record)
    for step in checkpoint.steps(folder):
        try:
            run.checkpoints[step] = checkpoint.read_meta(checkpoint.folder(folder, step))
        except UserError as error:
            run.notes.append(str(error))
    run.perplexity = _read_json(folder / "eval_ppl.json", run.notes)
    run.tasks = _read_json(folder / "tasks.json", run.notes)
    for name in SAMPLE_FILES:
        if not run.samples and (folder / name).is_file():
            run.samples = list(_read_lines(folder / name, {None: SAMPLE}, run.notes))
            run.samples_file = str(folder / name)
    held = (run.config, run.train, run.val, run.checkpoints, run.perplexity, run.tasks, run.samples)
    if not any(held) and not run.notes:
        raise UserError(
            f"{path!r} holds nothing of a run; wanted what train.py writes to --out_dir"
        )
    if run.config:
        try:
            run.data = dataset.read_meta(run.config["settings"]["data_dir"])
        except UserError as error:
            run.notes.append(str(error))
    run.notes += _disagreements(run)
    return run


def _matches(found: object, form: object) -> bool:
    if isinstance(form, tuple):
        return any(_matches(found, member) for member in form)
    if isinstance(form, list):
        return isinstance(found, list) and all(_matches(part, form[0]) for part in found)
    if isinstance(form, dict):
        if not isinstance(found, dict):
            return False
        if ... in form:
            return all(_matches(part, form[...]) for part in found.values())
        return all(_matches(found.get(key), member) for key, member in form.items())
    return isinstance(found, form)


def _read_json(path: Path, notes: list[str]) -> dict:
    """The object in a file; {} where there is none, or one of another form, which is noted."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path} is left out: {type(error).__name__}: {error}")
        return {}
    wrong = [key for key, form in FORMS[path.name].items() if not _matches(found, {key: form})]
    if wrong:
        notes.append(f"{path} is left out: {', '.join(wrong)} not as it should be written")
    return {} if wrong else found


def _read_lines(path: Path, forms: dict, notes: list[str]) -> Iterator[dict]:
    """The records of a file that have the form of their split; the others are noted."""
    if not path.is_file():
        return
    lines = path.read_text(errors="replace").splitlines()
    bad = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not _matches(record, forms[record.get("split") if None not in forms else None]):
                raise ValueError
        except (ValueError, KeyError, AttributeError):
            bad.append(number)
            continue
        yield record
    if bad == [len(lines)]:
        notes.append(f"{path}: its last line is torn and left out")
    elif bad:
        notes.append(f"{path}: {len(bad)} lines cannot be read and are left out, as line {bad[0]}")


def _disagreements(run: Run) -> Iterator[str]:
    """Files of one run that are not of one run, or not of its best checkpoint."""
    if same_data(run) is False:
        where = run.config["settings"]["data_dir"]
        yield f"{where} was prepared anew after this run: its train.bin is not what was trained on"
    measured = {
        "eval_ppl.json": Path(run.perplexity.get("checkpoint", "")).name.removeprefix("step_"),
        "tasks.json": str(run.tasks.get("step", "")),
    }
    for name, step in measured.items():
        if step.isdigit() and run.best is not None and int(step) != run.best:
            yield f"{run.path}/{name} is of step {int(step)}, but the best is now step {run.best}"
    if run.config and not run.finished:
        wanted = run.config["max_steps"]
        yield f"{run.path} is not finished: {run.steps:,} of {wanted:,} steps in metrics.jsonl"


def same_data(run: Run) -> bool | None:
    """Whether data_dir still holds what the run was trained on; None where that is not known."""
    if not run.data or not run.checkpoints:
        return None
    trained_on = next(iter(run.checkpoints.values()))["identity"]["data_sha256"]
    return trained_on == run.data["files"]["train.bin"]["sha256"]


def timing(run: Run) -> dict[str, float]:
    """Seconds of the steps in metrics.jsonl, added up step by step, so pauses don't count.

    A resumed run may have had another number of devices from a step on. Start-up, saving, and
    steps that a resume took back are in no record.
    """
    starts = run.config.get("starts") or [{"first_step": 0, "world_size": None}]
    world_size = run.config.get("world_size", 1)
    totals = {"tokens": 0, "train": 0.0, "eval": 0.0, "device": 0.0, "mfu": 0.0}
    for record in [*run.train, *run.val]:
        since = [s for s in starts if s["first_step"] <= max(0, record["step"])]
        n_devices = (since or starts)[-1]["world_size"] or world_size
        if record["split"] == "val":
            totals["eval"] += record["seconds"]
            totals["device"] += record["seconds"] * n_devices
        elif record["tokens_per_second"]:
            n_tokens = record["tokens"] // (record["step"] + 1)
            seconds = n_tokens / record["tokens_per_second"]
            totals["tokens"] += n_tokens
            totals["train"] += seconds
            totals["device"] += seconds * n_devices
            totals["mfu"] += seconds * (record["mfu"] or 0)
    return totals


def gap(run: Run) -> float | None:
    """The last validation loss less the mean training loss of the GAP_STEPS steps before it."""
    evaluated = [record for record in run.val if record["loss"] is not None]
    if not evaluated:
        return None
    end = evaluated[-1]["step"]
    before = [
        record["loss"]
        for record in run.train
        if end - GAP_STEPS <= record["step"] < end
        and record["loss"] is not None
        and not record["skipped"]
    ]
    return evaluated[-1]["loss"] - fmean(before) if before else None


def loss_at(run: Run) -> dict[int, float]:
    """Validation loss by tokens seen."""
    per_step = run.train[0]["tokens"] // (run.train[0]["step"] + 1) if run.train else 0
    return {r["step"] * per_step: r["loss"] for r in run.val if r["loss"] is not None}


def figures(run: Run) -> dict[str, float]:
    """Every figure that the run has, by name: what stands side by side and is spread over seeds."""
    spent, losses = timing(run), loss_at(run)
    found: dict[str, float | None] = {
        "parameters": run.config.get("parameters"),
        "steps": run.steps or None,
        "tokens seen": run.train[-1]["tokens"] if run.train else None,
        "validation loss, lowest": min(losses.values(), default=None),
        "validation loss, last": losses[max(losses)] if losses else None,
        "gap to training loss": gap(run),
    }
    for name in ("all", "assistant"):
        if scored := run.perplexity.get(name):
            found[f"perplexity, {name} tokens"] = scored["perplexity"]
            found[f"bits per byte, {name} tokens"] = scored["bits_per_byte"]
    for split, modes in run.tasks.get("generation", {}).items():
        for mode, measured in modes.items():
            found[f"coherent, {split}, {mode}"] = measured["coherent"]["share"]
    for task, scored in run.tasks.get("zero_shot", {}).items():
        found[f"{task}, {scored['metric']}"] = scored["score"]
    exact = [sample["exact"] for sample in run.samples if "exact" in sample]
    found["answers exactly right"] = fmean(exact) if exact else None
    if spent["train"]:
        found["tokens a second"] = spent["tokens"] / spent["train"]
        found["MFU"] = spent["mfu"] / spent["train"] or None
        found["hours"] = (spent["train"] + spent["eval"]) / 3600
        found["device-hours"] = spent["device"] / 3600
    return {
        name: value for name, value in found.items() if value is not None and math.isfinite(value)
    }
