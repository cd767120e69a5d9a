"""Every script in this process, as its command line runs it."""

import contextlib
import faulthandler
import importlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from nanosynth import settings
from nanosynth.training import distributed

CONFIGS = {
    "prepare": "PrepareConfig",
    "train": "TrainConfig",
    "sample": "SampleConfig",
    "eval_ppl": "EvalConfig",
    "verdict.__main__": "VerdictConfig",
    "convert.hf": "HFConfig",
}


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def config_class(script: str) -> type:
    return getattr(importlib.import_module(script), CONFIGS[script])


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """train.main takes signals and watches over its process."""
    numbers = distributed.StopSignal.SIGNALS
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def run(script: str, flags: list[str], capfd) -> Ended:
    """How a script ends. An error that it does not answer is raised, as it would be a traceback."""
    capfd.readouterr()
    code = 0
    with mock.patch.object(sys, "argv", [f"{script}.py", *flags]), signals_kept():
        try:
            with settings.one_line_errors():
                is_train = script == "train"
                config = settings.load(config_class(script), flags, script, config_file=is_train)
                sys.modules[script].main(config)
        except SystemExit as ended:
            code = ended.code or 0
    return Ended(code, *capfd.readouterr())


def contents(*folders: Path) -> dict[str, object]:
    """Every file below with its bytes, and every link."""
    found: dict[str, object] = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            found[str(path)] = path.is_symlink() or path.read_bytes()
    return found


def complaints(script: str, flags: list[str], capfd, *folders: Path) -> list[str]:
    """What is wrong with the answer to flags that are to be refused."""
    before = contents(*folders)
    try:
        ended = run(script, flags, capfd)
    except BaseException as error:
        return [f"{script} {flags}: {type(error).__name__}: {error}"[:500]]
    lines = ended.err.splitlines()
    wrong = [] if ended.code == 1 else [f"exit {ended.code}"]
    wrong += [] if len(lines) == 1 and ": error: " in lines[0] else [f"said {ended.err[:500]!r}"]
    wrong += [] if lines and lines[0].isprintable() else ["unprintable"]
    wrong += [] if contents(*folders) == before else ["something is written"]
    return [f"{script} {flags}: {', '.join(wrong)}"] if wrong else []
