"""How long OpenMP's threads should spin, on an idle machine and beside processes that compute.

nanosynth/__init__.py says what spinning is, and sets GOMP_SPINCOUNT. Here the scripts run with
several counts in turn: 0 sleeps at once, as OMP_WAIT_POLICY=passive does; 300000 is libgomp's own.

Usage:
    python -m benchmarks.busy_machine
    python -m benchmarks.busy_machine --busy=4 --spins=10000 --pairs=2
"""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import alternate
from benchmarks.alternate import Contender, Ratio
from benchmarks.step import random_bins
from nanosynth import settings
from nanosynth.settings import setting

LIBGOMPS_OWN = "300000"
N_STEPS = 20  # of a training by two ranks, whose start is timed too
RUN = ("train.py", "config/demo.py", "--log_interval=1")


@dataclass(frozen=True, kw_only=True)
class BusyConfig(settings.Settings):
    """Training steps and whole commands a second, with each spin count against libgomp's own."""

    busy: int = setting(0, "processes that compute beside what is timed", at_least=0)
    spins: settings.MANY = setting(("0", "1000", "10000"), "spin counts; give it several times")
    pairs: int = setting(3, "turns of each side", at_least=1)
    steps: int = setting(5, "training steps of a turn", at_least=1)
    json: str = setting("", "file for the figures", path=True)


def commands(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Each command with the line that ends it, on data and a run of random tokens in `folder`."""
    data = random_bins(str(folder / "data"), block_size=92, n_val_rows=200)
    where = [f"--data_dir={data}", f"--out_dir={folder}/ranks-{{spins}}"]
    source = folder / "sample.jsonl"
    prepare_first = ["data/make_sample.py", f"--to={source}", "--num_rows=20000"]
    train_first = [
        *RUN,
        f"--data_dir={data}",
        f"--out_dir={folder}/run",
        "--max_steps=2",
        "--warmup_steps=1",
    ]
    for command in (prepare_first, train_first):
        subprocess.run(
            [sys.executable, *command], cwd=alternate.ROOT, check=True, stdout=subprocess.DEVNULL
        )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ranks = [*torchrun, *RUN, *where, "--micro_batch_size=15"]
    sampling = ["sample.py", f"--run={folder}/run", f"--prompts={data}/val.bin"]
    preparing = ["prepare.py", f"--source={source}", f"--data_dir={folder}/prepared"]
    return {
        f"{N_STEPS} steps by 2 ranks": (ranks, rf"^step +{N_STEPS}/"),
        "evaluation": (["eval_ppl.py", f"--run={folder}/run"], "^all figures"),
        "sampling": ([*sampling, "--max_new_tokens=30", "--temperature=0"], "^talk to it"),
        "prepare": (preparing, "^written"),
    }


def contenders(name: str, command: list[str], line: str, spins: list[str]) -> list[Contender]:
    """The command with each spin count, in a folder of its own: a training holds its folder."""
    return [
        Contender(
            name=f"{name}, {count} spins",
            command=[part.format(spins=count) for part in command],
            line=line,
            n_tokens=1,  # a unit is a step or a whole command
            environment={"GOMP_SPINCOUNT": count},
        )
        for count in spins
    ]


@contextlib.contextmanager
def busy(n_processes: int) -> Iterator[None]:
    loop = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(loop) for _ in range(n_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(config: BusyConfig, folder: Path) -> list[Ratio]:
    spins = [*config.spins, LIBGOMPS_OWN]
    works = commands(folder)
    train = [*RUN, f"--data_dir={folder}/data", f"--out_dir={folder}/out-{{spins}}"]
    with busy(config.busy):
        steps = contenders("training step", train, r"^step +\d+/", spins)
        turns = {"n_units": config.steps, "n_untimed": 1, "n_first": 2, "fresh": False}
        speeds, _ = alternate.alternate(steps, n_pairs=config.pairs, **turns)
        for name, (command, line) in works.items():
            speeds |= alternate.starts(contenders(name, command, line, spins), config.pairs)
    names = list(speeds)
    pairs = [
        (names[first + number], names[first + len(config.spins)])
        for first in range(0, len(names), len(spins))
        for number in range(len(config.spins))
    ]
    return alternate.pair_up(speeds, pairs)


def main(config: BusyConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ratios = measure(config, Path(folder))
    facts = {**alternate.circumstances("cpu"), "busy processes beside": config.busy}
    alternate.report(ratios, facts, "steps or commands", config.json)


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(BusyConfig))
