"""Speed of the training step: tokens/s, step time, MFU, memory, and where the time goes.

It measures train.py's own step with train.py's own settings, and so it is the one script that
imports another. The data are random tokens, unless the command line names a data_dir.

Usage:
    python bench.py config/1b.py
    python bench.py config/500m.py --micro_batch_size=16 --json=500m.json --profile=trace
"""

import dataclasses
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import train
from benchmarks import timing
from nanosynth import device, settings, tokenizer
from nanosynth.data import bins
from nanosynth.files import write_atomically
from nanosynth.settings import setting
from nanosynth.training import distributed
from nanosynth.training.log import RunLog

PHASES = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(train.TrainConfig):
    """Time train.py's step. Its settings, and these; nothing is written but --json and --profile.

    data_dir counts where the command line gives it: a config file's is left for random tokens.
    """

    json: str = setting("", "file for the figures")
    profile: str = setting("", "folder for a trace of one step (chrome://tracing, Perfetto)")
    untimed_steps: int = setting(5, "first steps: compilation, allocation, clocks", at_least=1)
    timed_steps: int = setting(
        20, "steps that count; a quarter as many more are taken by phases", at_least=2
    )


class Uncompiled(torch.nn.Module):
    """The model behind a call of its own, whose hooks torch.compile does not trace."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.model(*batch)


class Subject(NamedTuple):
    """What is measured."""

    config: BenchConfig
    world: distributed.World
    training: train.Training
    split: bins.Split
    order: bins.RowOrder

    def take(self, step: int, log: RunLog) -> None:
        """One step of the run, by train.py's hand."""
        c = self.config
        n_steps = c.untimed_steps + 2 * c.timed_steps + 1
        train.train_one(
            c, self.world, self.training, log, self.split, self.order, step, max_steps=n_steps
        )

    def new_log(self) -> RunLog:
        return RunLog(None, device=self.world.device, n_devices=1, peak=None)


def random_bins(data_dir: str, block_size: int, n_rows: int = 64, n_val_rows: int = 16) -> str:
    """Bins of random tokens; the second half of each row is an assistant's."""
    generator = np.random.default_rng(0)
    writer = bins.BinWriter(data_dir)
    for split, count in (("train", n_rows), ("val", n_val_rows)):
        for _ in range(count + 1):  # a row takes its last target from the next document
            ids = generator.integers(0, tokenizer.END_OF_TEXT, block_size)
            ids[-1] = tokenizer.END_OF_TEXT
            writer.add(split, ids.tolist(), [2 * n >= block_size for n in range(block_size)])
    writer.finish({"source": "random tokens"}, seed=0)
    writer.discard()
    return data_dir


def time_steps(subject: Subject, first: int, count: int) -> list[float]:
    """Seconds of each step, figures fetched every log_interval as in training."""
    log = subject.new_log()
    clock = timing.Clock(subject.world.device)
    clock.mark()
    for step in range(first, first + count):
        subject.take(step, log)
        if (step + 1) % subject.config.log_interval == 0:
            log.flush(0)
        clock.mark()
    return [interval.device for interval in clock.intervals()]


def time_phases(subject: Subject, first: int, count: int) -> dict[str, dict[str, float]]:
    """Median seconds a step spends in each phase, by the host's clock and the device's.

    train_step shows where its phases meet: it asks for a batch, calls the model, and asks for the
    next one when the backward pass is launched; when there is none left, the update follows.
    """
    config, world, training, split, order = subject
    is_ddp = isinstance(training.model, DistributedDataParallel)
    model = training.model if is_ddp else Uncompiled(training.model)
    clock = timing.Clock(world.device)
    hooks = [
        model.register_forward_pre_hook(lambda *_: clock.mark("forward")),
        model.register_forward_hook(lambda *_: clock.mark("backward")),
    ]

    def batches(numbers: range) -> Iterator[tuple[int, bins.Batch]]:
        for number in numbers:
            clock.mark("data")
            yield number, train.read_micro_batch(config, split, order, number)
        clock.mark("optimizer")

    totals: list[dict[str, timing.Interval]] = []
    for step in range(first, first + count):
        clock = timing.Clock(world.device)
        numbers = order.numbers(step, world.rank, world.size)
        n_targets = bins.count_targets(split, order.step(step), config.block_size, config.loss_on)
        train.train_step(
            model,
            training.optimizer,
            training.scaler,
            training.guard,
            batches(numbers),
            n_micro_steps=len(numbers),
            n_targets=max(1, n_targets),
            world=world,
            dtype=training.dtype,
            grad_clip=config.grad_clip,
            seed=config.seed,
        )
        clock.mark()
        totals.append(timing.by_name(clock.intervals()))
    for hook in hooks:
        hook.remove()
    return {
        name: {
            "host": statistics.median(total[name].host for total in totals),
            "device": statistics.median(total[name].device for total in totals),
        }
        for name in PHASES
    }


def throughput(
    step_seconds: list[float],
    *,
    n_tokens: int,
    n_flops: float,
    n_devices: int,
    peak: float | None,
    matmul: float,
) -> dict:
    """Tokens/s over all steps; MFU of them against `peak` and `matmul`, FLOP/s of one device."""
    p10, median, p90 = np.percentile(step_seconds, [10, 50, 90]).tolist()
    steps_per_second = len(step_seconds) / sum(step_seconds)
    flops_per_second = n_flops * steps_per_second
    return {
        "tokens_per_second": n_tokens * steps_per_second,
        "step_seconds": {"median": median, "p10": p10, "p90": p90},
        "flops_per_second": flops_per_second,
        "mfu": device.model_flops_utilisation(flops_per_second, n_devices, peak),
        "mfu_of_matmul": device.model_flops_utilisation(flops_per_second, n_devices, matmul),
    }


def measure(config: BenchConfig, world: distributed.World) -> dict:
    """All figures. Call on every rank."""
    split = bins.Split(config.data_dir, "train")
    config = train.fit_micro_batch(config, world)
    train.check_divides(config, world.size)
    order = train.row_order(config, split)
    training = train.build(config, world, split)
    subject = Subject(config, world, training, split, order)
    is_compiled = training.raw_model._compiled_call_impl is not None
    size, count = (8192, 50) if world.device.type == "cuda" else (1024, 20)
    first, *_ = time_steps(subject, 0, config.untimed_steps)
    caches = torch._dynamo.utils.counters
    n_hits = caches["inductor"]["fxgraph_cache_hit"] + caches["aot_autograd"]["autograd_cache_hit"]
    products = timing.matmul_seconds(world.device, training.dtype, size, count)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    with timing.Collections() as collections:
        steps = time_steps(subject, config.untimed_steps, config.timed_steps)
    memory_gb = device.memory_gb(world.device)
    products += timing.matmul_seconds(world.device, training.dtype, size, count)
    n_phased = max(2, config.timed_steps // 4)
    done = config.untimed_steps + config.timed_steps
    phases = time_phases(subject, done, n_phased)
    n_tokens = order.rows_per_step * config.block_size
    n_targets = bins.count_targets(split, order.step(0), config.block_size, config.loss_on)
    name = device.device_name(world.device)
    peak = device.peak_flops(name, training.dtype)
    matmul = 2 * size**3 / statistics.median(products)
    figures = throughput(
        steps,
        n_tokens=n_tokens,
        n_flops=training.raw_model.flops(n_tokens, n_targets),
        n_devices=world.size,
        peak=peak,
        matmul=matmul,
    )
    log = subject.new_log()
    trace = Path(config.profile) / "trace.json" if config.profile and world.is_main else None
    profile = timing.profile(lambda: subject.take(done + n_phased, log), world.device, trace)
    return figures | {
        "peak_flops": peak,
        "matmul_flops": matmul,
        "matmul_size": size,
        "memory_gb": memory_gb,
        "first_step_seconds": first,
        "compile_seconds": first - figures["step_seconds"]["median"] if is_compiled else None,
        "compile_cached": n_hits > 0,
        "phases": phases,
        "collector_seconds": collections.seconds / len(steps),
        **profile,
        "timed_steps": len(steps),
        "tokens_per_step": n_tokens,
        "parameters": training.raw_model.n_parameters(),
        "device": name,
        "n_devices": world.size,
        "n_threads": torch.get_num_threads(),
        "dtype": str(training.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version() if world.device.type == "cuda" else None,
    }


def table(result: dict) -> str:
    """What the terminal shows; --json has all of it and more."""
    step = {name: 1e3 * seconds for name, seconds in result["step_seconds"].items()}
    peak = "the device's peak is not known"
    if result["mfu"] is not None:
        peak = f"{result['mfu']:.1%} of the device's {result['peak_flops'] / 1e12:,.0f} TFLOP/s"
    compiled = "not compiled"
    if result["compile_seconds"] is not None:
        compiled = f"{result['compile_seconds']:.1f} s in the first step"
        compiled += ", from the cache of an earlier run" if result["compile_cached"] else ""
    cudnn = f", cuDNN {result['cudnn']}" if result["cudnn"] else ""
    rows = [
        (
            "device",
            f"{result['n_devices']} x {result['device']}, {result['n_threads']} CPU threads",
        ),
        ("", f"{result['dtype']}, torch {result['torch']}{cudnn}"),
        (
            "model",
            f"{result['parameters']:,} parameters, {result['tokens_per_step']:,} tokens a step",
        ),
        ("tokens/s", f"{result['tokens_per_second']:,.0f} over {result['timed_steps']} steps"),
        (
            "step",
            f"{step['median']:,.1f} ms median, {step['p10']:,.1f} p10, {step['p90']:,.1f} p90",
        ),
        ("MFU", peak),
        (
            "",
            f"{result['mfu_of_matmul']:.1%} of the {result['matmul_flops'] / 1e12:,.2f} TFLOP/s of "
            f"a plain product of {result['matmul_size']:,} x {result['matmul_size']:,}",
        ),
        ("peak memory", f"{result['memory_gb']:.2f} GB"),
        ("attention", result["attention"]),
        ("compilation", compiled),
    ]
    host_too = result["device"] != "cpu"  # which has one timeline
    for name, spent in result["phases"].items():
        host = f" (host {1e3 * spent['host']:,.1f} ms)" if host_too else ""
        rows.append((name, f"{1e3 * spent['device']:,.1f} ms{host}"))
    waits = f"{1e3 * result['host_wait_seconds']:,.1f} ms in {result['host_waits']} waits"
    rows.append(("host waits", f"{waits} for the device within a step"))
    rows.append(("collector", f"{1e3 * result['collector_seconds']:,.1f} ms of a step"))
    rows += [
        ("dearest" if not n else "", f"{1e3 * seconds:>9,.1f} ms  {name[:76]}")
        for n, (name, seconds) in enumerate(result["dearest"][:5])
    ]
    return "\n".join(f"{name:<13}{value}" for name, value in rows)


def main(config: BenchConfig) -> None:
    # Ours for the time of the run: no folder of the user's is read or written.
    with tempfile.TemporaryDirectory() as folder:
        data_dir = config.data_dir
        if config.origins.get("data_dir") != "command line":
            data_dir = random_bins(str(Path(folder) / "data"), config.block_size)
        out_dir = str(Path(folder) / "out")
        with distributed.start(config.device, config.hang_seconds) as world:
            result = measure(
                dataclasses.replace(config, data_dir=data_dir, out_dir=out_dir, resume="never"),
                world,
            )
            if not world.is_main:
                return
    result |= {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "data": config.data_dir
        if config.origins.get("data_dir") == "command line"
        else "random tokens",
        "settings": dataclasses.asdict(config),
    }
    print(table(result))
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(config.json), json.dumps(result, indent=2))


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(BenchConfig, config_file=True))
