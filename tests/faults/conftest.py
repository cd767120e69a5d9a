"""The --campaign option, the number of trials of every fault, and the table of what was seen."""

import datetime
import platform
import tempfile
from pathlib import Path

import pytest
import torch

from faults import rig
from tiny import REPO

# fault -> (trials with the other tests, trials of the campaign). The only place of counts.
TRIALS = {
    "SIGKILL at a random time, resumed, adamw": (5, 500),
    "SIGKILL at a random time, resumed, muon": (3, 100),
    "10 SIGKILLs in a row, resumed": (1, 50),
    "SIGKILL in the saving thread while training goes on": (3, 200),
    "power cut within a save: states replayed": (300, 3000),
    "one bit flipped": (300, 10_000),
    "SIGTERM, SIGINT or SIGUSR1 to a rank or to torchrun": (1, 50),
    "SIGKILL of one rank under torchrun --max-restarts": (1, 40),
    "SIGKILL of torchrun": (1, 5),
    "SIGKILL of one node's torchrun, of two": (0, 6),
    "console lost": (3, 30),
    "SIGHUP: the terminal goes away": (1, 20),
    "a second train.py in one folder: refused; the first killed, run again": (1, 10),
    "learning_rate=1e6 from a step on: the last good checkpoint goes on": (1, 12),
    "two ranks, no fault: exit 0": (5, 200),
    "best checkpoint after SIGKILLs": (1, 10),
    "prepare.py: SIGKILL at a random time, run again": (3, 100),
    "prepare.py: ended at an operation of its publication": (3, 100),
    "prepare.py: fuzzed files": (150, 10_000),
    "experiment.sh: SIGKILL in three stages, run again": (0, 1),
}
WANDB_HANGS_SECONDS = (2, 60)
ROWS: list[tuple[tuple, str, str]] = []  # (place of the test, fault, line), as they come


class Tally:
    """The trials of one fault. Each gives the complaints it found; none means survived."""

    def __init__(self, fault: str, wanted: int):
        self.fault, self.wanted = fault, wanted
        self.trials, self.survived = 0, 0
        self.complaints: list[str] = []
        self.landed: dict[str, int] = {}  # where the faults hit

    def trial(self, complaints: list[str]) -> None:
        self.trials += 1
        self.survived += not complaints
        self.complaints += complaints

    def land(self, where: str, times: int = 1) -> None:
        self.landed[where] = self.landed.get(where, 0) + int(times)

    def check(self) -> None:
        assert self.trials, "no trial was run"
        lost = self.trials - self.survived
        assert not lost, f"{lost} of {self.trials}: " + "; ".join(self.complaints[:5])

    def row(self) -> str:
        landed = ", ".join(f"{number} {where}" for where, number in self.landed.items())
        return f"| {self.fault} | {self.trials:,} | {self.survived:,} | {landed} |"


def pytest_addoption(parser):
    parser.addoption("--campaign", action="store_true", help="full counts; writes FAULTS.md")


@pytest.fixture(scope="session")
def campaign(request) -> bool:
    return request.config.getoption("--campaign", default=False)


@pytest.fixture
def tally(request, campaign):
    """`tally(fault)`: a row of FAULTS.md; `wanted` is its number of trials where it has one."""
    rows: list[Tally] = []

    def new(fault: str) -> Tally:
        rows.append(Tally(fault, TRIALS.get(fault, (0, 0))[campaign]))
        return rows[-1]

    yield new
    # A test's report carries them, also from another process.
    request.node.user_properties += [(row.fault, row.row()) for row in rows if row.trials]


@pytest.fixture(scope="session")
def wandb_hangs_seconds(campaign) -> int:
    return WANDB_HANGS_SECONDS[campaign]


@pytest.fixture
def work(tmp_path):
    """A folder in memory where there is one: an fsync costs nothing, and a SIGKILL no less."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def fault_bins(tmp_path_factory) -> str:
    return rig.write_bins(tmp_path_factory.mktemp("faults") / "bins")


@pytest.fixture(scope="session")
def alone(tmp_path_factory, fault_bins) -> rig.Run:
    """The uninterrupted run of one process."""
    return rig.Run(fault_bins, tmp_path_factory.mktemp("alone") / "run").finish()


@pytest.fixture(scope="session")
def pair(tmp_path_factory, fault_bins) -> rig.Run:
    """The uninterrupted run of two ranks."""
    return rig.Run(fault_bins, tmp_path_factory.mktemp("pair") / "run", n_ranks=2).finish()


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        ROWS.extend((report.location[:2], *row) for row in report.user_properties)


def pytest_sessionfinish(session):
    is_worker = hasattr(session.config, "workerinput")
    is_campaign = session.config.getoption("--campaign", default=False)
    if is_worker or not is_campaign or not TRIALS.keys() <= {fault for _, fault, _ in ROWS}:
        return
    text = [
        "# Faults that a run survives",
        "",
        "Written by the last `make faults` from what it counted; nothing in it is typed by hand.",
        "Survived: every promise of the fault's test held, which for most is an end bit for bit",
        "equal to the uninterrupted run's: weights, moments, scaler, guard, and what metrics.jsonl",
        "has of each step.",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        "",
        "| fault | trials | survived | where it landed |",
        "|---|---|---|---|",
        *(line for _, _, line in sorted(ROWS)),
    ]
    (REPO / "benchmarks" / "FAULTS.md").write_text("\n".join(text) + "\n")
