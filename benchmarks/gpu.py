"""What only a GPU can tell, measured in one command and written to benchmarks/GPU.md.

It needs no network. Each part is a process of its own, within what is left of `minutes`; the report
is written anew after each, and names what failed or did not come to its turn.

Usage:
    make gpu NANOGPT=PATH
    python -m benchmarks.gpu --nanogpt=PATH
    python -m benchmarks.gpu --device=cpu --configs=tiny.py    # tries the program, not the device
"""

import datetime
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from nanosynth import UserError, settings
from nanosynth.settings import setting

OLDEST_TORCH = (2, 11)


@dataclass(frozen=True, kw_only=True)
class GpuConfig(settings.Settings):
    """Measure training, resume and sampling on a GPU, and write a report."""

    configs: settings.MANY = setting(
        ("config/500m.py", "config/1b.py"),
        "recipes; the first one also resumes, samples and meets nanoGPT",
        group="What is measured",
    )
    nanogpt: str = setting("", "a checkout of github.com/karpathy/nanoGPT; empty: none", path=True)
    device: Literal["cuda", "cpu"] = setting("cuda", "cpu: to try this program")
    minutes: float = setting(9.0, "for all of it", above=0)
    timed_steps: int = setting(10, "of training that count", at_least=2)
    new_tokens: int = setting(256, "of each sampled text", at_least=1)
    report: str = setting("benchmarks/GPU.md", "where it is written", path=True)


def missing(config: GpuConfig) -> str:
    """What this machine lacks; empty where nothing is."""
    packages = ["torch", "numpy", "safetensors", "tiktoken", "pytest"]
    if lacking := [name for name in packages if not importlib.util.find_spec(name)]:
        return f"no {', '.join(lacking)} in {sys.executable}: pip install -r requirements-dev.txt"
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {torch.__version__}: wanted {'.'.join(map(str, OLDEST_TORCH))} or newer"
    if config.nanogpt and not (Path(config.nanogpt) / "configurator.py").is_file():
        return f"no nanoGPT in --nanogpt={config.nanogpt}"
    if config.device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return f"no GPU that torch {torch.__version__} can use (--device=cpu tries the program)"
    if not importlib.util.find_spec("triton") or not (shutil.which("cc") or shutil.which("gcc")):
        return "no Triton or no C compiler, which torch.compile needs"
    return ""


if __name__ == "__main__":
    with settings.one_line_errors():
        arguments = settings.from_argv(GpuConfig)
        if lack := missing(arguments):
            raise UserError(lack)

import torch

import train
from benchmarks import plan
from benchmarks.alternate import ROOT
from benchmarks.step import random_bins
from model import GPT
from nanosynth.device import choose_dtype, device_name
from nanosynth.files import write_atomically
from nanosynth.inference import generation
from nanosynth.inference.speed import speed_up_inference
from nanosynth.table import table

# On a GPU auto is float16, the recipes' own.
VARIANTS = ("--dtype=auto", "--dtype=bfloat16", "--dtype=auto --optimizer=muon")
SECTIONS = {
    "Tests that need a GPU": ["tests", "outcome"],
    "Training": [
        *("config", "dtype", "optimizer", "tokens/s", "MFU", "peak memory", "planned", "attention"),
        *("first step", "from the cache"),
    ],
    "30 steps with a save and a resume": ["what", "found"],
    "Sampling": ["texts at once", "CUDA graph", "tokens/s"],
    "Beside nanoGPT": ["ours", "peer", "ours, tokens/s", "peer, tokens/s", "ratio"],
}
GPU_TESTS = "tests/test_gpu.py"
Rows = list[list[str]]


class Part(NamedTuple):
    name: str
    section: str
    measure: Callable[[float], Rows]  # within so many seconds


class Failed(Exception):
    """Why a part gave no figures."""


def run(command: list[str], seconds: float) -> str:
    """What `python COMMAND` prints."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # by which it ends its own processes
        process.communicate()
        raise Failed("out of time") from None
    if process.returncode:
        raise Failed(said.strip().splitlines()[-1] if said.strip() else "no word")
    return said


def parts(config: GpuConfig, folder: Path) -> Iterator[Part]:
    """What is measured, by its worth: the last ones may find no time."""
    first, *others = config.configs
    yield Part("tests", "Tests that need a GPU", partial(tests))
    training = partial(measure_training, config, folder)
    yield Part(first, "Training", partial(training, first, VARIANTS[0]))
    resume = partial(measure_resume, config, folder, first)
    yield Part("resume", "30 steps with a save and a resume", resume)
    yield Part("sampling", "Sampling", partial(measure_sampling, config, first))
    for name in others:
        yield Part(name, "Training", partial(training, name, VARIANTS[0]))
    if config.nanogpt:
        yield Part("nanoGPT", "Beside nanoGPT", partial(meet_nanogpt, config, folder, first))
    for variant in VARIANTS[1:]:
        for name in config.configs:
            yield Part(f"{name} {variant}", "Training", partial(training, name, variant))


def tests(seconds: float) -> Rows:
    said = run(["-m", "pytest", "-q", "-o", "addopts=", GPU_TESTS], seconds)
    return [[GPU_TESTS, said.strip().splitlines()[-1]]]


def measure_training(
    config: GpuConfig, folder: Path, name: str, variant: str, seconds: float
) -> Rows:
    file = folder / "step.json"
    flags = [f"--device={config.device}", f"--timed_steps={config.timed_steps}", f"--json={file}"]
    command = ["-m", "benchmarks.step", name, *variant.split(), "--untimed_steps=3", *flags]
    run(command, seconds)
    found = json.loads(file.read_text())
    recipe = recipe_of(name)
    shape, dtype = train.model_config(recipe), getattr(torch, found["dtype"])
    optimizer = found["settings"]["optimizer"]
    planned = plan.state_bytes(shape, optimizer)
    planned += plan.step_bytes(shape, found["micro_batch_size"], dtype)[
        recipe.gradient_checkpointing
    ]
    mfu = "not known" if found["mfu"] is None else f"{found['mfu']:.1%}"
    row = [name, found["dtype"], optimizer, f"{found['tokens_per_second']:,.0f}", mfu]
    row += [f"{found['memory_gb']:.1f} GB", f"{planned / 1e9:.1f} GB", found["attention"]]
    return [[*row, f"{found['first_step_seconds']:.1f} s", str(found["compile_cached"])]]


def recipe_of(name: str) -> train.TrainConfig:
    return settings.load(train.TrainConfig, [name], "train.py", config_file=True)


def measure_resume(config: GpuConfig, folder: Path, name: str, seconds: float) -> Rows:
    """train.py to step 15, which it saves, and by the same command on to step 30."""
    data_dir = random_bins(str(folder / "data"), recipe_of(name).block_size)
    out_dir, until = folder / "run", time.monotonic() + seconds
    rows = []
    for n_steps in (15, 30):
        began = time.monotonic()
        flags = [f"--data_dir={data_dir}", f"--out_dir={out_dir}", f"--device={config.device}"]
        flags += [f"--max_steps={n_steps}", "--warmup_steps=5", "--eval_rows=16"]
        run(["train.py", name, *flags, "--log_interval=5"], until - began)
        rows.append([f"to step {n_steps}, all included", f"{time.monotonic() - began:.1f} s"])
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if record["split"] == "train"]
    if len(losses) != 30:
        raise Failed(f"30 steps were taken, and {len(losses)} are in metrics.jsonl")
    shown = (0, 14, 15, 29)
    rows.append([f"loss of steps {shown}", ", ".join(f"{losses[n]:.4f}" for n in shown)])
    size = sum(file.stat().st_size for file in (out_dir / "step_000030").iterdir())
    return [*rows, ["a checkpoint", f"{size / 1e9:.2f} GB"]]


def measure_sampling(config: GpuConfig, name: str, seconds: float) -> Rows:
    """Of random weights; it is too short to need its `seconds`."""
    where = torch.device(config.device)
    torch.manual_seed(0)
    with where:
        model = GPT(train.model_config(recipe_of(name)))
    dtype = choose_dtype("auto", where)
    model.to(dtype).eval()
    speed_up_inference(model, dtype)
    rows = []
    for batch_size in (1, 16):
        for by_graph in (False, True)[: 1 + (where.type == "cuda")]:
            n_new = config.new_tokens
            for n_tokens in (8, n_new):  # the first loads the kernels
                sampling = generation.Sampling(
                    max_new_tokens=n_tokens, temperature=0.8, top_k=200, cuda_graph=by_graph
                )
                prompts = [list(range(1000, 1016))] * batch_size
                began = time.perf_counter()
                texts = generation.generate(model, prompts, list(range(batch_size)), sampling)
                speed = sum(map(len, texts)) / (time.perf_counter() - began)
            rows.append([str(batch_size), str(by_graph), f"{speed:,.0f}"])
    return rows


def meet_nanogpt(config: GpuConfig, folder: Path, name: str, seconds: float) -> Rows:
    file = folder / "nanogpt.json"
    flags = [f"--nanogpt={config.nanogpt}", f"--device={config.device}", f"--config={name}"]
    flags += ["--trainer=False", "--pairs=1", f"--steps={config.timed_steps}", f"--json={file}"]
    run(["-m", "benchmarks.compare_training", *flags], seconds)
    ratios = json.loads(file.read_text())["ratios"]
    return [
        [r["ours"], r["peer"], f"{r['ours_per_second']:,.0f}", f"{r['peer_per_second']:,.0f}"]
        + [f"{r['median']:.2f}"]
        for r in ratios
    ]


def write(config: GpuConfig, rows: dict[str, Rows], problems: list[str], seconds: float) -> None:
    where = torch.device(config.device)
    facts = [f"{device_name(where)}, torch {torch.__version__}, Python {platform.python_version()}"]
    if where.type == "cuda":
        memory = torch.cuda.get_device_properties(where).total_memory / 1e9
        facts.append(
            f"{memory:.0f} GB, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    else:
        facts.append("**a trial of the program: none of its figures is a GPU's**")
    lines = ["# What a GPU told", "", "Written by `make gpu`; nothing in it is typed by hand."]
    lines += [f"{datetime.date.today()}, {', '.join(facts)}, {seconds:.0f} s in all."]
    for section, found in rows.items():
        lines += ["", f"## {section}", "", table([SECTIONS[section], *found], markdown=True)]
    if problems:
        lines += ["", "## Not measured", "", *(f"- {problem}" for problem in problems)]
    write_atomically(Path(config.report), "\n".join(lines) + "\n")


def main(config: GpuConfig) -> None:
    began = time.monotonic()
    rows: dict[str, Rows] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts(config, Path(folder)):
            left = began + 60 * config.minutes - time.monotonic()
            print(f"{part.name} ...", flush=True)
            try:
                if left <= 0:
                    raise Failed("out of time")
                found = part.measure(left)
                rows.setdefault(part.section, []).extend(found)
            except (Failed, RuntimeError) as why:
                print(f"{part.name}: {why}", flush=True)
                problems.append(f"{part.name}: {why}")
            write(config, rows, problems, time.monotonic() - began)
    print(Path(config.report).read_text())
    if problems:
        raise UserError(f"not measured: {'; '.join(problems)}")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
