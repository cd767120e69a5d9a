"""Contenders that take turns in one run, and the medians of their paired ratios.

A contender is a process that prints a line for each unit of work: a training step, an answer. While
one works the others stand still, and one clock, ours, times all of them by when their lines arrive.
"""

import contextlib
import datetime
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from nanosynth import UserError
from nanosynth.device import choose_device, device_name
from nanosynth.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    command: list[str]  # after `python -u`
    line: str  # a regular expression: the line that ends a unit of work
    n_tokens: int  # of a unit
    folder: Path = ROOT  # where it runs
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of ours
    asks: bool = False  # reads a line before each unit, after a first line when it is ready


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ours against a peer, turn by turn."""

    ours: str
    peer: str
    ours_per_second: float  # tokens, median over the turns
    peer_per_second: float
    ratios: list[float]  # ours / peer of each pair of turns

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)


class Running:
    """A contender's process, standing still but for its turns."""

    def __init__(self, contender: Contender):
        self.contender = contender
        self.last_line = ""
        self._pattern = re.compile(contender.line)
        self._errors = tempfile.TemporaryFile()
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, "-u", *contender.command],
            cwd=contender.folder,
            env={**os.environ, **contender.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # a process group of its own, to halt and end it whole
        )
        self._output = self._process.stdout.fileno()

    def turn(self, n_units: int, n_untimed: int) -> list[float]:
        """Seconds of each of `n_units` units, after `n_untimed` others; then it stands still."""
        os.killpg(self._process.pid, signal.SIGCONT)
        seconds = []
        if not self.contender.asks:
            self._wait_for_line()  # of the unit in which it was halted
        for unit in range(n_untimed + n_units):
            began = time.perf_counter()
            self._unit()
            if unit >= n_untimed:
                seconds.append(time.perf_counter() - began)
        os.killpg(self._process.pid, signal.SIGSTOP)
        # What it wrote between its last line and the halt belongs to no later unit.
        while select.select([self._output], [], [], 0)[0] and os.read(self._output, 1 << 16):
            pass
        self._unread = b""
        return seconds

    def wait_until_ready(self) -> None:
        """Until its first line, whatever that takes (imports, compilation)."""
        self._wait_for_line()

    def _unit(self) -> None:
        if self.contender.asks:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        self._wait_for_line()

    def _wait_for_line(self) -> None:
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if not newline:
                data = os.read(self._output, 1 << 16)
                if not data:
                    self._errors.seek(0)
                    said = self._errors.read().decode(errors="replace")[-3000:]
                    raise UserError(f"{self.contender.name} ended: {said or self.last_line}")
                self._unread += data
                continue
            self._unread = rest
            self.last_line = line.decode(errors="replace")
            if self._pattern.search(self.last_line):
                return

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()


@contextlib.contextmanager
def unwound_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind this process, so that no halted contender is left behind."""
    handlers = {
        number: signal.signal(number, lambda number, frame: sys.exit(128 + number))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def running(contender: Contender) -> Iterator[Running]:
    process = Running(contender)
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.close()


@unwound_by_signals()
def alternate(
    contenders: list[Contender],
    *,
    n_pairs: int,
    n_units: int,
    n_untimed: int,
    n_first: int,
    fresh: bool,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Tokens/s of each contender in each of its `n_pairs` turns, and its last line.

    A turn has `n_units` timed units after `n_untimed` others; a new process takes `n_first` more.
    `fresh` starts a process for each turn, where all of them together do not fit into memory.
    Otherwise each is started once. Every second round goes backwards, so that a drift of the
    machine's speed cancels out.
    """
    speeds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    lines = {}
    with contextlib.ExitStack() as stack:
        waiting: dict[str, Running] = {}
        for number in range(n_pairs):
            for contender in contenders[:: -1 if number % 2 else 1]:
                name = contender.name
                with contextlib.ExitStack() as turn:
                    process = waiting.get(name)
                    if not process:
                        owner = turn if fresh else stack
                        process = owner.enter_context(running(contender))
                    n_warm = n_untimed + (n_first if name not in waiting else 0)
                    seconds = statistics.median(process.turn(n_units, n_warm))
                    if not fresh:
                        waiting[name] = process
                    lines[name] = process.last_line
                speeds[name].append(contender.n_tokens / seconds)
                said = f"round {number + 1}: {name}: {speeds[name][-1]:,.1f} tokens/s"
                print(said, file=sys.stderr, flush=True)
    return speeds, lines


@unwound_by_signals()
def starts(contenders: list[Contender], n_pairs: int) -> dict[str, list[float]]:
    """Starts a second of each contender in each of `n_pairs` turns: process to first line."""
    speeds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(n_pairs):
        for contender in contenders[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            with running(contender):
                speeds[contender.name].append(1 / (time.perf_counter() - began))
    return speeds


def pair_up(speeds: dict[str, list[float]], pairs: list[tuple[str, str]]) -> list[Ratio]:
    """Each (ours, peer) as a ratio of the speeds of the same round."""
    return [
        Ratio(
            ours=ours,
            peer=peer,
            ours_per_second=statistics.median(speeds[ours]),
            peer_per_second=statistics.median(speeds[peer]),
            ratios=[a / b for a, b in zip(speeds[ours], speeds[peer], strict=True)],
        )
        for ours, peer in pairs
    ]


def markdown(ratios: list[Ratio], unit: str) -> str:
    """A table of `unit` a second, a row for each ratio."""
    lines = [
        f"| ours | peer | ours, {unit}/s | peer, {unit}/s | ratio, median (range, pairs) |",
        "|---|---|---|---|---|",
    ]
    for ratio in ratios:
        spread = f"{min(ratio.ratios):.2f} to {max(ratio.ratios):.2f}, {len(ratio.ratios)}"
        lines.append(
            f"| {ratio.ours} | {ratio.peer} | {ratio.ours_per_second:,.4g} | "
            f"{ratio.peer_per_second:,.4g} | **{ratio.median:.2f}** ({spread}) |"
        )
    return "\n".join(lines)


def report(
    ratios: list[Ratio], facts: dict[str, object], unit: str, json_file: str, **more: object
) -> None:
    """Print the facts and the table; write all of it to `json_file`, where one is named."""
    print("\n".join(f"{name}: {value}" for name, value in facts.items()) + "\n")
    print(markdown(ratios, unit))
    if json_file:
        rows = [{"median": ratio.median, **asdict(ratio)} for ratio in ratios]
        result = {**facts, **more, "unit": unit, "ratios": rows}
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(json_file), json.dumps(result, indent=2))


def circumstances(device: str, **versions: str) -> dict[str, str]:
    """What a figure is worth nothing without."""
    name = device_name(choose_device(device))
    if name == "cpu":
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": str(torch.__version__),
        **versions,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def _module() -> str:
    return ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else "cpu"
