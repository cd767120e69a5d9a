"""Quality of a run's answers, and its zero-shot scores: tasks.json and task_generations.jsonl.

Usage:
    python eval_tasks.py --run=out/500m
    python eval_tasks.py --run=out/500m --generation=False --tasks=lambada_openai,hellaswag
"""

import importlib.util
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nanosynth import UserError, settings, tokenizer
from nanosynth.settings import setting

FORMAT_VERSION = 1
TASKS_DIR = Path(__file__).resolve().parent / "data" / "tasks"
INSTALL = "pip install -r requirements-eval.txt"


@dataclass(frozen=True, kw_only=True)
class TasksConfig(settings.Settings):
    """Coherence, diversity, instruction following and memorisation; zero-shot tasks."""

    run: str = setting("out/demo", "a run's folder, or one of its step folders", path=True)
    step: str = setting("best", "which checkpoint: best, latest or a step's number")
    data_dir: str = setting("", "prepared bins; empty: those the run was trained on", path=True)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = setting(
        "auto", "of the weights; auto: float16 on CUDA, else float32 (fewer ties)"
    )
    generation: bool = setting(True, "measure generated answers")
    num_prompts: int = setting(200, "validation prompts, one of a conversation; 0: all", at_least=0)
    prompts: str = setting(
        "", "prompts with checks, .jsonl; empty: data/tasks/prompts.jsonl", path=True
    )
    num_samples: int = setting(
        4, "samples of each of a set's first 32 prompts, for self-BLEU", at_least=2
    )
    max_new_tokens: int = setting(1024, "longest answer; half the context at most", at_least=1)
    temperature: float = setting(0.8, "of the sampled answers", above=0)
    top_k: int = setting(0, "keep the k likeliest tokens; 0: all", at_least=0)
    top_p: float = setting(
        0.95, "keep the likeliest tokens up to this much probability", above=0, at_most=1
    )
    tasks: str = setting("local", "names with commas between; local: our three; empty: none")
    limit: int = setting(0, "documents of each task; 0: all", at_least=0)
    chat_format: bool = setting(False, "put the tasks' contexts into a user's turn")
    batch_size: int = setting(64, "sequences taken together", at_least=1)
    seed: int = setting(42, "of the sampling", at_least=0)

    def check(self) -> None:
        if not self.generation and not self.tasks:
            raise UserError("nothing to measure: wanted --generation=True or --tasks=NAMES")


if __name__ == "__main__":
    arguments = settings.from_argv(TasksConfig)  # before torch takes its time

import torch

from model import GPT, GPTConfig
from nanosynth import checkpoint
from nanosynth.data import bins
from nanosynth.device import choose_device, choose_dtype, device_name
from nanosynth.files import write_atomically
from nanosynth.inference.generation import Sampling
from nanosynth.inference.load import load
from verdict import answers, quality


def load_model(config: TasksConfig, path: Path, meta: dict) -> GPT:
    shape = GPTConfig(**meta["identity"]["model"])
    if shape.vocab_size < tokenizer.N_IDS:
        raise UserError(
            f"{path} has a vocabulary of {shape.vocab_size}; wanted {tokenizer.N_IDS} or more: "
            "GPT-2's tokens and the chat marks"
        )
    device = choose_device(config.device)
    name = "float32" if config.dtype == "auto" and device.type != "cuda" else config.dtype
    return load(str(path), device=device, dtype=choose_dtype(name, device)).model


def open_split(data_dir: str, name: str) -> bins.Split:
    """A split of bins that our tokenizer made."""
    split = bins.Split(data_dir, name)
    ranks = split.meta.get("tokenizer", {}).get("ranks_sha256", tokenizer.RANKS_SHA256)
    if ranks != tokenizer.RANKS_SHA256:
        raise UserError(f"{data_dir} was made with another tokenizer; run prepare.py again")
    return split


def open_data(
    config: TasksConfig, meta: dict, notices: list[str]
) -> tuple[bins.Split | None, bins.Split | None]:
    """(validation, training) tokens; None where the run's own bins are gone or were never there."""
    data_dir = config.data_dir or meta["settings"].get("data_dir", "")
    try:
        val, train = open_split(data_dir, "val"), open_split(data_dir, "train")
    except UserError as error:
        if config.data_dir:
            raise
        notices.append(f"validation prompts and memorisation not measured: {error}")
        return None, None
    if train.sha256 != meta["identity"].get("data_sha256"):
        notices.append(f"{train.path} is not what the run was trained on: 'memorised' counts that")
    return val, train


def measure_generation(
    model: GPT, config: TasksConfig, meta: dict, notices: list[str]
) -> tuple[dict, list[dict]]:
    """(metrics by set and mode, records of task_generations.jsonl)."""
    block_size = model.config.block_size
    if not importlib.util.find_spec("sacrebleu"):
        notices.append(f"self-BLEU not measured: sacrebleu is missing; {INSTALL}")
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    limits = {"block_size": block_size, "sampling": sampling}
    sets = [answers.checked_prompts(Path(config.prompts or TASKS_DIR / "prompts.jsonl"), **limits)]
    val, train = open_data(config, meta, notices)
    if val:
        sets.insert(0, answers.validation_prompts(val, config.num_prompts, **limits))
    metrics, records = {}, []
    for prompts in sets:
        if len(prompts.ids) < 2:  # a prompt is measured against another
            notices.append(f"{prompts.name} not measured: {len(prompts.ids)} prompts fit, wanted 2")
            continue
        metrics[prompts.name], found = answers.measure(
            model,
            prompts,
            num_samples=config.num_samples,
            batch_size=config.batch_size,
            train=train,
            sampling=sampling,
        )
        records += found
    return metrics, records


def measure_tasks(model: GPT, config: TasksConfig, not_run: list[str]) -> dict[str, dict]:
    """The figures of each task that could be run; why not of the others goes to `not_run`."""
    from verdict.tasks import LOCAL_TASKS, HarnessLM, load, measure

    lm = HarnessLM(model, config.batch_size, config.chat_format)
    figures = {}
    for name in task_names(config.tasks, LOCAL_TASKS):
        try:
            loaded = load(name, TASKS_DIR)
        except UserError as error:
            not_run.append(f"not measured: {error}")
            continue
        for task, found in measure(lm, loaded, config.limit).items():
            figures[task] = found | {"limit": config.limit, "chat_format": config.chat_format}
    return figures


def task_names(tasks: str, local: Iterable[str]) -> list[str]:
    """The names in `tasks`, `local` standing for ours; each once.

    >>> task_names("local,piqa", ["questions", "completion"])
    ['questions', 'completion', 'piqa']
    """
    names: list[str] = []
    for name in filter(None, (part.strip() for part in tasks.split(","))):
        names += local if name == "local" else [name]
    return list(dict.fromkeys(names))


def earlier(path: Path, step: int, notices: list[str]) -> dict:
    """The parts of an existing tasks.json that are of this step; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        if found["format_version"] == FORMAT_VERSION and found["step"] == step:
            return {key: dict(found[key]) for key in ("settings", "generation", "zero_shot")}
        notices.append(f"{path} was of step {found['step']} and is replaced")
    except (ValueError, KeyError, TypeError) as error:
        notices.append(f"{path} could not be read ({error!r}) and is replaced")
    return {}


def published(tasks: Iterable[str]) -> dict[str, list[dict]]:
    figures = json.loads((TASKS_DIR / "published.json").read_text())
    return {task: figures[task] for task in tasks if task in figures}


def generation_table(sets: dict) -> list[str]:
    names = ("coherent", *quality.PARTS, "obeys", "copies", "dist-2", "self-BLEU", "zip")
    lines = [f"{'':<22}{'n':>5}" + "".join(f"{name.replace('_', ' '):>13}" for name in names)]
    for name, modes in sets.items():
        for mode, m in modes.items():
            shares = [m["coherent"]["share"], *(m["parts"][part] for part in quality.PARTS)]
            shares += [m[key] and m[key]["share"] for key in ("instructions", "memorised")]
            numbers = (m["distinct"]["2"], m["self_bleu"], m["compression_ratio"])
            cells = [f"{'-' if share is None else format(share, '.1%'):>13}" for share in shares]
            cells += [f"{'-' if x is None else format(x, '.3f'):>13}" for x in numbers]
            lines.append(f"{name + ' ' + mode:<22}{m['n']:>5}" + "".join(cells))
    for name, modes in sets.items():
        low, high = modes["greedy"]["coherent"]["interval"]
        left_out = modes["greedy"]["left_out"]
        lines.append(
            f"{name}: coherent when greedy 95% {low:.1%} - {high:.1%}; prompts that did not fit: "
            f"{left_out}"
        )
    return lines


def zero_shot_table(result: dict) -> list[str]:
    lines = [f"{'task':<28}{'metric':>12}{'score':>9}{'stderr':>9}{'chance':>9}{'n':>8}"]
    for task, figures in result["zero_shot"].items():
        score, stderr, chance = (
            format(x, ".4f") if isinstance(x, float) else "-"
            for x in (figures["score"], figures["stderr"], figures["chance"])
        )
        start = f"{task:<28}{figures['metric']:>12}{score:>9}{stderr:>9}{chance:>9}"
        lines.append(f"{start}{figures['n']:>8,}")
        for row in result["published"].get(task, []):
            lines.append(
                f"  {row['model']:<26}{row['metric'][:12]:>12}{row['score']:>9.4f}  {row['source']}"
            )
    return lines


def table(result: dict) -> str:
    lines = []
    if result["generation"]:
        lines += generation_table(result["generation"])
    if result["zero_shot"]:
        lines += zero_shot_table(result)
    return "\n".join(lines)


def main(config: TasksConfig) -> None:
    path = checkpoint.find(config.run, config.step)
    meta = checkpoint.read_meta(path)
    model = load_model(config, path, meta)
    target, notices = path.parent / "tasks.json", []
    result = {
        "format_version": FORMAT_VERSION,
        "run": str(path.parent),
        "step": meta["step"],
        "settings": {},
        "device": device_name(model.transformer.wte.weight.device),
        "torch": torch.__version__,
        "seconds": 0.0,
        "rule": quality.RULE,
        "generation": {},
        "zero_shot": {},
    }
    result |= earlier(target, meta["step"], notices)
    dtype = str(model.transformer.wte.weight.dtype).removeprefix("torch.")

    def write(part: str, clock: float) -> None:
        used = asdict(config) | {"dtype": dtype, "seconds": time.perf_counter() - clock}
        result["settings"][part] = used
        result["seconds"] = sum(part["seconds"] for part in result["settings"].values())
        result["published"] = published(result["zero_shot"])
        write_atomically(target, json.dumps(result, indent=2))

    if config.generation:
        clock = time.perf_counter()
        result["generation"], records = measure_generation(model, config, meta, notices)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(path.parent / "task_generations.jsonl", "".join(lines))
        write("generation", clock)
    not_run: list[str] = []
    if config.tasks and not importlib.util.find_spec("lm_eval"):
        notices.append(f"zero-shot tasks not measured: lm_eval is missing; {INSTALL}")
    elif config.tasks:
        clock = time.perf_counter()
        result["zero_shot"] |= measure_tasks(model, config, not_run)
        write("zero_shot", clock)
    print(table(result))
    print(f"written to {target}")
    for notice in notices + not_run:
        print(notice, file=sys.stderr)
    if not_run:
        raise UserError(f"{len(not_run)} of the tasks asked for could not be run")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
