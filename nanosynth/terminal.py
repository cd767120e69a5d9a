"""The standard streams: kept from ending a program, and text that is harmless on a terminal."""

import contextlib
import os
import re
import sys

# Control characters but newline and tab, what turns the direction of writing, and odd bytes of a
# path: on a terminal they may clear, colour, move or hide what stands there.
HARMFUL = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
STREAMS = (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))


def harmless(text: str) -> str:
    """`text` with what could harm a terminal as escapes.

    >>> print(harmless("red: \\x1b[31m"))
    red: \\x1b[31m
    """
    return HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`text` harmless and without newlines, as a cell of a table or a command has it."""
    return " ".join(harmless(text).split())


def prepare_streams() -> None:
    """Closed streams take and give nothing; what a stream's encoding lacks is an escape."""
    for number, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would have its number, and its messages
            os.open(os.devnull, mode)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, *, to_stderr: bool = False) -> None:
    """Print a line; one that cannot be printed is lost, and ends nothing."""
    with contextlib.suppress(OSError):
        print(harmless(text), file=sys.stderr if to_stderr else sys.stdout, flush=True)
    drop_unprinted()


def drop_unprinted() -> None:
    """Let go of what a stream could not print: Python would exit with 120 for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
