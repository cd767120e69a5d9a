"""The verdict on one run or several: measures what is not measured yet, then reports.

Usage:
    python -m verdict --run=out/500m
    python -m verdict --run=out/500m --run=out/500m-seed43 --run=out/1b
    python -m verdict --run=out/500m --control=out/500m-web
    python -m verdict --run=out/500m --only=tasks --generation=False --tasks=lambada_openai
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nanosynth import UserError, settings, terminal
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class VerdictConfig(settings.Settings):
    """Measure a run where it is not measured yet (eval_ppl.json, tasks.json), judge it by the
    criteria, and write report.html, report.md, report.json and curves.png.
    """

    run: settings.MANY = setting(
        ("out/demo",),
        "a run's folder; give it again for more seeds, or to compare recipes",
        group="The runs",
        path=True,
    )
    control: str = setting("", "a run of like shape and tokens on other text, beside it", path=True)
    step: str = setting("best", "which checkpoint is measured: best, latest or a step's number")
    only: Literal["", "perplexity", "tasks", "report"] = setting(
        "", "measure this alone, and anew; report: measure nothing. The report is always written"
    )
    data_dir: str = setting("", "prepared bins; empty: those the run was trained on", path=True)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: settings.DTYPE = setting(
        "auto", "auto: float16 on CUDA; on a CPU float32, for the perplexity bfloat16 if it has it"
    )
    batch_size: int = setting(64, "sequences of answers or tasks taken together", at_least=1)
    generation: bool = setting(True, "measure generated answers", group="Generated answers")
    num_prompts: int = setting(200, "validation prompts, one of a conversation; 0: all", at_least=0)
    prompts: str = setting("", ".jsonl with checks; empty: data/tasks/prompts.jsonl", path=True)
    num_samples: int = setting(
        4, "answers to each of the first 32 prompts, for self-BLEU", at_least=2
    )
    max_new_tokens: int = setting(1024, "longest answer; half the context at most", at_least=1)
    temperature: float = setting(0.8, "of the sampled answers", above=0)
    top_k: int = setting(0, "keep the k likeliest tokens; 0: all", at_least=0)
    top_p: float = setting(
        0.95, "keep the likeliest up to this much probability", above=0, at_most=1
    )
    seed: int = setting(42, "of the sampling", **settings.SEED)
    tasks: str = setting(
        "local", "names with commas; local: our three; empty: none", group="Zero-shot tasks"
    )
    limit: int = setting(0, "documents of each task; 0: all", at_least=0)
    chat_format: bool = setting(False, "put the tasks' contexts into a user's turn")
    output_dir: str = setting(
        "", "where the report goes; empty: the first run's folder", group="The report", path=True
    )
    samples: int = setting(5, "answers shown of each kind: coherent, each failed part", at_least=0)

    def check(self) -> None:
        if len({os.path.realpath(path) for path in self.run}) < len(self.run):
            raise UserError(f"--run names a folder twice: {', '.join(self.run)}")
        if self.control and Path(self.control).resolve() in map(Path.resolve, map(Path, self.run)):
            self.refuse("control", "wanted another run than those of --run")
        if self.only == "tasks" and not self.generation and not self.tasks:
            raise UserError("nothing to measure: wanted --generation=True or --tasks=NAMES")


if __name__ == "__main__":
    arguments = settings.from_argv(VerdictConfig)  # before torch takes its time

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

import eval_ppl
from nanosynth import checkpoint, tokenizer
from nanosynth.data import bins
from nanosynth.device import choose_device, choose_dtype, device_name
from nanosynth.files import json_text, printed_if_lost, writable, write_atomically
from nanosynth.inference.generation import Sampling
from nanosynth.inference.load import load
from verdict import LOCAL_TASKS, TASKS_DIR, answers, control, instructions, quality, report, runs

FORMAT_VERSION = 1  # of tasks.json
INSTALL = "pip install -r requirements-eval.txt"


class Measurement:
    """Of one checkpoint of a run: what is asked, with what, and what was found before."""

    def __init__(self, run: runs.Run, meta: dict, config: VerdictConfig):
        self.run, self.meta, self.config = run, meta, config
        self.step = str(meta["step"])
        self.data_dir = config.data_dir or meta.get("settings", {}).get("data_dir", "")
        self.device = choose_device(config.device)
        is_plain = config.dtype == "auto" and self.device.type != "cuda"  # float32 has fewer ties
        self.dtype = choose_dtype("float32" if is_plain else config.dtype, self.device)
        facts = {"format_version": FORMAT_VERSION, "run": run.path, "step": meta["step"]}
        is_current = all(run.tasks.get(key) == facts[key] for key in ("format_version", "step"))
        earlier = run.tasks if is_current else {}
        self.tasks = facts | {"torch": torch.__version__, "rule": quality.RULE}
        self.tasks |= {key: earlier.get(key, {}) for key in ("settings", "generation", "zero_shot")}
        self.notices: list[str] = []  # a line for whatever had to be left out

    def parts(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """(name, what measures it) of what --only names; without it, of what is missing, or of
        another step or other data.
        """
        run, config, tasks = self.run, self.config, self.tasks
        is_scored = bool(run.perplexity) and run.scored_step == self.meta["step"]
        is_answered = bool(tasks["generation"])
        with contextlib.suppress(UserError):  # without the bins, what was measured stays
            val = bins.read_meta(self.data_dir)["files"]["val.bin"]
            is_scored &= val["sha256"] == run.perplexity.get("data_sha256")
            is_answered &= "validation" in tasks["generation"]
        asked_before = {scored.get("asked_as") for scored in tasks["zero_shot"].values()}
        known = {*tasks["zero_shot"], *asked_before} if not config.only else ()
        names = [name for name in task_names(config.tasks) if name not in known]
        if config.only == "perplexity" or not (config.only or is_scored):
            yield "the perplexity", self.perplexity
        if config.generation and (config.only == "tasks" or not (config.only or is_answered)):
            self.check_not_fewer("num_prompts", tasks["settings"].get("generation", {}))
            yield "answers", self.generation
        if names and config.only != "perplexity":
            for name in names:
                self.check_not_fewer("limit", tasks["zero_shot"].get(name, {}))
            yield "zero-shot tasks", partial(self.zero_shot, names)

    def check_not_fewer(self, name: str, before: dict) -> None:
        """Refuse to replace a measurement by one of fewer prompts or documents; 0 is all."""
        n, n_before = getattr(self.config, name), before.get(name, 1)
        if self.config.only and n and (not n_before or n < n_before):
            found = f"tasks.json in {self.run.path} is of --{name}={n_before}"
            self.config.refuse(name, f"{found}; use that, or a copy of the run")

    def perplexity(self) -> None:
        """eval_ppl.json."""
        config = self.config
        how = {"data_dir": config.data_dir, "device": config.device, "dtype": config.dtype}
        eval_ppl.main(eval_ppl.EvalConfig(run=self.run.path, step=self.step, **how))

    def generation(self) -> None:
        """The part `generation` of tasks.json, and task_generations.jsonl."""
        started, config = time.perf_counter(), self.config
        model, *_ = load(self.run.path, self.step, device=self.device, dtype=self.dtype)
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        limits = {"block_size": model.config.block_size, "sampling": sampling}
        sets = [answers.checked_prompts(prompts_file(config), **limits)]
        val, train = self.open_data()
        if val:
            sets.insert(0, answers.validation_prompts(val, config.num_prompts, **limits))
        if not importlib.util.find_spec("sacrebleu"):
            self.notices.append(f"self-BLEU not measured: sacrebleu is missing; {INSTALL}")
        how = {"num_samples": config.num_samples, "batch_size": config.batch_size}
        found, records = {}, []
        for prompts in sets:
            n = len(prompts.ids)
            if n < 2:  # a prompt is measured against another
                self.notices.append(f"{prompts.name} not measured: {n} prompts fit, wanted 2")
                found[prompts.name] = {}  # so that it is not tried each time
                continue
            found[prompts.name], of_set = answers.measure(
                model, prompts, train=train, sampling=sampling, **how
            )
            records += of_set
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with printed_if_lost(found):
            write_atomically(Path(self.run.path) / "task_generations.jsonl", "".join(lines))
            self.write_tasks("generation", found, started)

    def open_data(self) -> tuple[bins.Split | None, bins.Split | None]:
        """(validation, training); None where the bins are gone or were never there."""
        path = self.data_dir
        try:
            val, train = bins.Split(path, "val"), bins.Split(path, "train")
        except UserError as error:
            self.notices.append(f"validation prompts and memorisation not measured: {error}")
            return None, None
        ranks = val.meta.get("tokenizer", {}).get("ranks_sha256", tokenizer.RANKS_SHA256)
        if ranks != tokenizer.RANKS_SHA256:
            raise UserError(f"{path} was made with another tokenizer; run prepare.py again")
        if train.sha256 != self.meta["identity"].get("data_sha256"):
            is_other = "is not what the run was trained on: 'memorised' counts that"
            self.notices.append(f"{train.path} {is_other}")
        return val, train

    def zero_shot(self, names: list[str]) -> None:
        """The part `zero_shot` of tasks.json; figures of tasks that are not asked for stay."""
        started, config = time.perf_counter(), self.config
        try:
            from verdict.tasks import as_lm, measure
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name.split('.')[0]} is missing; {INSTALL}") from None
        lm = as_lm(self.run.path, self.step, self.device, self.dtype, config.batch_size)
        how = {"limit": config.limit, "chat_format": config.chat_format}
        figures, not_run = measure(lm, names, **how)
        self.notices += not_run
        scores = {task: scored.pop("scores") for task, scored in figures.items()}
        items = {task: {"step": self.meta["step"], "scores": of} for task, of in scores.items()}
        found = {task: scored | how for task, scored in figures.items()}
        with printed_if_lost(found):
            write_atomically(
                Path(self.run.path) / "task_items.json", json.dumps(self.run.items | items)
            )
            self.write_tasks("zero_shot", self.tasks["zero_shot"] | found, started)

    def write_tasks(self, part: str, found: dict, started: float) -> None:
        """tasks.json, with how this part of it was measured and how long that took."""
        tasks, seconds = self.tasks, time.perf_counter() - started
        tasks[part] = found
        how = {"dtype": str(self.dtype).removeprefix("torch."), "seconds": seconds}
        tasks["settings"][part] = asdict(self.config) | how
        tasks["device"] = device_name(self.device)
        tasks["seconds"] = sum(used["seconds"] for used in tasks["settings"].values())
        others = json.loads((TASKS_DIR / "published.json").read_bytes())
        tasks["published"] = {task: others[task] for task in tasks["zero_shot"] if task in others}
        write_atomically(Path(self.run.path) / "tasks.json", json_text(tasks))


def measure(run: runs.Run, config: VerdictConfig) -> list[str]:
    """Measure what --only names, or what is missing; a line for each thing that could not be."""
    try:
        # The best one's is read already, and is verified where it is used: hashing a large
        # checkpoint takes longer than finding that all is measured.
        meta = run.meta if config.step == "best" else {}
        meta = meta or checkpoint.read_meta(checkpoint.find(run.path, config.step))
    except UserError as error:
        if config.only:  # it alone was asked for
            raise
        return [f"{run.path}: nothing is measured: {error}"]
    measurement = Measurement(run, meta, config)
    place, parts = f"{run.path}, step {measurement.step}", list(measurement.parts())
    if parts:
        writable(Path(run.path), "copy the run, or use --only=report with an --output_dir")
    else:
        print(f"{place}: is measured; --only=PART measures a part anew")
    for name, part in parts:
        print(f"{place}: measuring {name}", flush=True)
        try:
            part()
        except UserError as error:
            if config.only:
                raise
            measurement.notices.append(f"{name} not measured: {error}")
    return [f"{run.path}: {notice}" for notice in measurement.notices]


def measure_control(run: runs.Run, other: runs.Run, config: VerdictConfig) -> list[str]:
    """control.json of a run; a line where it could not be measured.

    Bits a byte, which take a pass over both splits, stay where they were `made_of` the same:
    digests of both checkpoints and of both splits. --only measures them anew.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    print(f"{run.path}: measuring it beside {other.path}", flush=True)
    try:
        made_of = []
        for of in (run, other) if not config.only else ():
            meta = checkpoint.read_meta(checkpoint.find(of.path, config.step))
            val = bins.read_meta(of.settings.get("data_dir", ""))["files"]["val.bin"]
            made_of += [meta["files"][checkpoint.MODEL]["sha256"], val["sha256"]]
        is_known = made_of and run.control.get("made_of") == made_of
        before = run.control["differences"] if is_known else ()
        differences = [found for found in before if found["what"] == control.BITS]
        loaded = partial(load, step=config.step, device=device, dtype=dtype, cast=False)
        differences = differences or [*control.bits_per_byte(run, other, loaded, dtype)]
    except UserError as error:
        return [f"{run.path}: not compared with {other.path}: {error}"]
    differences += [*control.tasks(run, other), *control.prompts(run, other)]
    found = {"control": other.path, "made_of": made_of, "unlike": control.unlike(run, other)}
    found["differences"] = differences
    with printed_if_lost(found):
        write_atomically(Path(run.path) / "control.json", json.dumps(found, indent=2))
    return []


def prompts_file(config: VerdictConfig) -> Path:
    return Path(config.prompts or TASKS_DIR / "prompts.jsonl")


def task_names(tasks: str) -> list[str]:
    """The names in `tasks`, `local` standing for ours; each once.

    >>> task_names("local,piqa")
    ['questions', 'completion', 'reasoning', 'piqa']
    """
    names: list[str] = []
    for name in filter(None, (part.strip() for part in tasks.split(","))):
        names += LOCAL_TASKS if name == "local" else [name]
    return list(dict.fromkeys(names))


def main(config: VerdictConfig) -> None:
    loaded = [runs.read(path) for path in config.run]  # no run there: said before hours of work
    notices: list[str] = []
    folder = writable(Path(config.output_dir or config.run[0]), "use another --output_dir")
    if config.step != "best":
        for path in config.run:
            checkpoint.find(path, config.step)
    if config.only != "report":
        choose_device(config.device)
        instructions.read_prompts(prompts_file(config))
        if config.data_dir:
            bins.read_meta(config.data_dir)
        others = [runs.read(config.control)] if config.control else []
        for run in [*loaded, *others]:
            notices += measure(run, config)
        for run in config.run if others else ():
            notices += measure_control(runs.read(run), runs.read(config.control), config)
        before = [note for run in loaded for note in run.notes]
        loaded = [runs.read(path) for path in config.run]
        after = [note for run in loaded for note in run.notes]
        notices += [f"{note}; measured anew" for note in before if note not in after]
    print(f"\n{terminal.harmless(report.write(loaded, folder, config.samples))}")
    for notice in notices:
        print(terminal.one_line(notice), file=sys.stderr)


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
