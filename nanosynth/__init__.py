"""What the scripts stand on. Each module owns one thing; its first lines say which."""

import os
import sys

# Set here, since every script comes by before it imports torch, whose OpenMP reads it once. Between
# two products its threads spin for the next one, 300,000 turns unless told otherwise: on a machine
# with other work that is the time in which the others, or our own thread that all wait for, would
# have run. 10,000 turns, some 0.2 ms, bridge the gaps between products and no more.
# See benchmarks/RESULTS.md. A user's own word stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


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
