"""What the scripts stand on. Each module owns one thing; its first lines say which."""

import contextlib
import os
import sys
from pathlib import Path


def spin_count(n_running: int, n_cores: int) -> int:
    """The turns that OpenMP's threads spin for their next work, with so many threads running.

    Spinning bridges the gap between two products; 10,000 turns, some 0.2 ms, suffice. On a machine
    with other work it takes the time in which the others, or our own thread that all wait for,
    would have run. Figures of both: benchmarks/RESULTS.md.
    """
    return 1_000 if n_running > n_cores else 10_000


def choose_spin_count() -> None:
    """GOMP_SPINCOUNT by the machine's load, unless the user has said how threads shall wait."""
    if "OMP_WAIT_POLICY" in os.environ:
        return
    n_running = 1
    with contextlib.suppress(OSError):  # Linux alone has it, and alone has GNU's OpenMP in torch
        load = Path("/proc/loadavg").read_text(encoding="ascii")  # "1.34 3.50 3.55 1/80 9201"
        n_running = int(load.split()[3].partition("/")[0])
    os.environ.setdefault("GOMP_SPINCOUNT", f"{spin_count(n_running, os.cpu_count() or 1)}")


# Here, since every script comes by before it imports torch, whose OpenMP reads it once.
choose_spin_count()


def except_interrupts(error_type: type, error: BaseException, trace: object) -> None:
    """A sys.excepthook: the traceback of an error that nobody caught, but none of Ctrl-C."""
    if not issubclass(error_type, KeyboardInterrupt):
        excepthook(error_type, error, trace)


excepthook = sys.excepthook
sys.excepthook = except_interrupts  # here, so that it is silent while torch is imported, too


class UserError(ValueError):
    """A mistake that the user can mend: scripts print its text as one line and exit with 1.

    The text says what was found, what was wanted, and the flag or command that mends it.
    """
