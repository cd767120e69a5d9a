"""Speed of the training step: tokens/s, step time, MFU, memory, and where the time goes.

It measures train.py's own step with train.py's own settings. The data are random tokens, unless the
command line names a data_dir.

Usage:
    python -m benchmarks.step config/1b.py
    python -m benchmarks.step config/500m.py --micro_batch_size=16 --json=500m.json --profile=trace
    python -m benchmarks.step config/1b.py --plan    # without a GPU: benchmarks.plan
"""

import dataclasses
import datetime
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import train
from benchmarks import plan, timing
from nanosynth import device, settings, tokenizer
from nanosynth.data import bins
from nanosynth.files import writable, write_atomically
from nanosynth.settings import setting
from nanosynth.table import table
from nanosynth.training import distributed
from nanosynth.training.log import RunLog

PHASES = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class StepConfig(train.TrainConfig):
    """Time train.py's step. Its settings, and these; nothing is written but --json and --profile.

    data_dir counts where the command line gives it: a config file's is left for random tokens.
    """

    json: str = setting("", "file for the figures", group="The measurement", path=True)
    profile: str = setting(
        "", "folder for a trace of one step (chrome://tracing, Perfetto)", path=True
    )
    plan: bool = setting(False, "measure nothing, but compute what a run takes: benchmarks.plan")
    untimed_steps: int = setting(5, "first steps: compilation, allocation, clocks", at_least=1)
    timed_steps: int = setting(
        20, "steps that count; a quarter as many more are taken by phases", at_least=2
    )


def random_bins(data_dir: str, block_size: int, n_rows: int = 64, n_val_rows: int = 16) -> str:
    """Bins of random tokens; the second half of each row is an assistant's."""
    generator = np.random.default_rng(0)
    mask = [2 * n >= block_size for n in range(block_size)]
    with bins.BinWriter(data_dir) as writer:
        counts = (n_rows + 1, n_val_rows + 1)  # a row takes its last target from the next document
        for _ in range(sum(counts)):
            ids = generator.integers(0, tokenizer.END_OF_TEXT, block_size)
            ids[-1] = tokenizer.END_OF_TEXT
            writer.add(ids.tolist(), mask)
        writer.shuffle(0, np.repeat([0, 1], counts))
        writer.publish({"source": "random tokens"})
    return data_dir


def new_log(run: train.Run) -> RunLog:
    """A log that writes nothing."""
    return RunLog(world=run.world, peak=None)


def time_steps(run: train.Run, first: int, count: int) -> list[float]:
    """Seconds of each step, figures fetched every log_interval as in training."""
    log = new_log(run)
    clock = timing.Clock(run.world.device)
    clock.mark()
    for step in range(first, first + count):
        train.take_step(run, step, log)
        if (step + 1) % run.config.log_interval == 0:
            log.flush(0)
        clock.mark()
    return [interval.device for interval in clock.intervals()]


def time_phases(run: train.Run, first: int, count: int) -> dict[str, dict[str, float]]:
    """Median seconds a step spends in each phase, by the host's clock and the device's.

    A phase begins where train_step reads a batch, calls the model, has its loss, and unscales the
    gradients; of several micro-batches the intervals add up.
    """
    clock = timing.Clock(run.world.device)

    def marked(name: str, function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            clock.mark(name)
            return function(*arguments)

        return call

    log, totals = new_log(run), []
    hooks = [
        run.model.register_forward_pre_hook(lambda *_: clock.mark("forward")),
        run.model.register_forward_hook(lambda *_: clock.mark("backward")),
    ]
    reading = mock.patch.object(bins, "read_batch", marked("data", bins.read_batch))
    unscale = marked("optimizer", run.scaler.unscale_)
    with reading, mock.patch.object(run.scaler, "unscale_", unscale):
        for step in range(first, first + count):
            clock = timing.Clock(run.world.device)
            train.take_step(run, step, log)
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


def measure(config: StepConfig, world: distributed.World) -> dict:
    """All figures. Call on every rank."""
    done, n_phased = config.untimed_steps + config.timed_steps, max(2, config.timed_steps // 4)
    # No schedule is measured, but one must reach the last step that is taken.
    whole = dataclasses.replace(config, max_steps=done + n_phased + 1, warmup_steps=0)
    run = train.build(whole, world, train.open_splits(config))
    is_compiled = train.is_compiled(config, world.device)
    size, count = (8192, 50) if world.device.type == "cuda" else (1024, 20)
    first, *_ = time_steps(run, 0, config.untimed_steps)
    caches = torch._dynamo.utils.counters
    n_hits = caches["inductor"]["fxgraph_cache_hit"] + caches["aot_autograd"]["autograd_cache_hit"]
    products = timing.matmul_seconds(world.device, run.dtype, size, count)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    steps = time_steps(run, config.untimed_steps, config.timed_steps)
    memory_gb = device.memory_gb(world.device)
    products += timing.matmul_seconds(world.device, run.dtype, size, count)
    phases = time_phases(run, done, n_phased)
    n_targets = bins.count_targets(
        run.train_split, run.order.step(0), config.block_size, config.loss_on
    )
    name = device.device_name(world.device)
    peak = device.peak_flops(name, run.dtype)
    matmul = 2 * size**3 / statistics.median(products)
    figures = throughput(
        steps,
        n_tokens=run.tokens_per_step,
        n_flops=run.raw_model.flops(run.tokens_per_step, n_targets),
        n_devices=world.size,
        peak=peak,
        matmul=matmul,
    )
    log = new_log(run)
    trace = Path(config.profile) / "trace.json" if config.profile and world.is_main else None
    profile = timing.profile(
        lambda: train.take_step(run, done + n_phased, log), world.device, trace
    )
    return figures | {
        "peak_flops": peak,
        "matmul_flops": matmul,
        "matmul_size": size,
        "memory_gb": memory_gb,
        "first_step_seconds": first,
        "compile_seconds": first - figures["step_seconds"]["median"] if is_compiled else None,
        "compile_cached": n_hits > 0,
        "phases": phases,
        **profile,
        "timed_steps": len(steps),
        "tokens_per_step": run.tokens_per_step,
        "micro_batch_size": run.order.micro_batch_size,
        "parameters": run.raw_model.n_parameters(),
        "device": name,
        "n_devices": world.size,
        "n_threads": torch.get_num_threads(),
        "dtype": str(run.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version() if world.device.type == "cuda" else None,
    }


def report(result: dict) -> str:
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
    size = f"{result['matmul_size']:,}"
    rows = [
        [
            "device",
            f"{result['n_devices']} x {result['device']}, {result['n_threads']} CPU threads",
        ],
        ["", f"{result['dtype']}, torch {result['torch']}{cudnn}"],
        ["model", f"{result['parameters']:,} parameters"],
        [
            "step",
            f"{result['tokens_per_step']:,} tokens, {result['micro_batch_size']} rows at once",
        ],
        ["tokens/s", f"{result['tokens_per_second']:,.0f} over {result['timed_steps']} steps"],
        ["time", "{median:,.1f} ms median, {p10:,.1f} p10, {p90:,.1f} p90".format(**step)],
        ["MFU", peak],
        [
            "",
            f"{result['mfu_of_matmul']:.1%} of the {result['matmul_flops'] / 1e12:,.2f} TFLOP/s of "
            f"a plain product of {size} x {size}",
        ],
        ["peak memory", f"{result['memory_gb']:.2f} GB"],
        ["attention", result["attention"]],
        ["compilation", compiled],
    ]
    for name, spent in result["phases"].items():
        # A CPU has one timeline.
        host = "" if result["device"] == "cpu" else f" (host {1e3 * spent['host']:,.1f} ms)"
        rows.append([name, f"{1e3 * spent['device']:,.1f} ms{host}"])
    waits = f"{1e3 * result['host_wait_seconds']:,.1f} ms in {result['host_waits']} waits"
    rows.append(["host waits", f"{waits} for the device within a step"])
    rows += [
        ["" if n else "dearest", f"{1e3 * seconds:>9,.1f} ms  {name[:76]}"]
        for n, (name, seconds) in enumerate(result["dearest"][:5])
    ]
    return table(rows, left=(0, 1))


def main(config: StepConfig) -> None:
    if config.plan:
        names = (field.name for field in dataclasses.fields(train.TrainConfig))
        plan.main(plan.PlanConfig(**{name: getattr(config, name) for name in names}))
        return
    # Ours for the time of the run: no folder of the user's is read or written.
    if config.json:
        writable(Path(config.json).parent, "use another --json")
    if config.profile:
        writable(Path(config.profile), "use another --profile")
    is_random = config.origins.get("data_dir") != "command line"
    with tempfile.TemporaryDirectory() as folder:
        data_dir = config.data_dir
        if is_random:
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
        "command": f"python {settings.command_line()}",
        "date": datetime.date.today().isoformat(),
        "data": "random tokens" if is_random else config.data_dir,
        "settings": dataclasses.asdict(config),
    }
    print(report(result))
    if config.json:
        write_atomically(Path(config.json), json.dumps(result, indent=2))


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(StepConfig, config_file=True))
