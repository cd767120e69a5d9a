"""train.py with faults planted: python plant.py FAULT[,FAULT...] [flags of train.py].

A fault is NAME:RANK:STEP[:NUMBER]. Outside its rank and steps the program is train.py's own.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import train
from faults import disk
from nanosynth import checkpoint, settings
from nanosynth.data import bins
from nanosynth.training import optim

VOCABULARY = 512


class Fault(NamedTuple):
    name: str
    rank: int = 0
    step: int = 0
    number: int = 1  # steps it lasts, or a quantity

    def now(self) -> bool:
        """Whether this rank is in a step that the fault covers."""
        return NOW["rank"] == self.rank and self.step <= NOW["step"] < self.step + self.number


NOW = {"rank": 0, "step": -1}  # the step that is taken or was taken last
WATCHES = contextlib.ExitStack()  # until the process ends


def before_step(action: Callable[[train.TrainConfig, int], None]) -> None:
    """Call `action(config, step)` before each training step."""
    take = train.take_step

    def take_step(run, step, log):
        NOW["step"] = step
        action(run.config, step)
        take(run, step, log)

    train.take_step = take_step


def at_step(fault: Fault, action: Callable[[], None]) -> None:
    before_step(lambda config, step: action() if fault.now() else None)


def fail(owner: object, name: str, fault: Fault) -> None:
    """Make `owner.name` raise while the fault covers the step."""
    intact = getattr(owner, name)

    def failing(*arguments, **keywords):
        if fault.now():
            Path(os.environ.get("RAISED", os.devnull)).write_text("raised")
            raise RuntimeError(f"planted in {fault.name}")
        return intact(*arguments, **keywords)

    setattr(owner, name, failing)


def scale_loss(fault: Fault, factor: float) -> None:
    intact = train.GPT.forward

    def forward(self, *arguments, **keywords):
        losses = intact(self, *arguments, **keywords)
        return losses * factor if self.training and fault.now() else losses

    train.GPT.forward = forward


def hash_weights(fault: Fault) -> None:
    """Append the SHA-256 of the weights after each step to out_dir/weights_RANK."""
    import hashlib

    take = train.train_step

    def train_step(run, *arguments):
        result = take(run, *arguments)
        digest = hashlib.sha256()
        for parameter in run.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        with open(f"{os.environ['WEIGHTS']}_{NOW['rank']}", "a") as file:
            file.write(digest.hexdigest() + "\n")
        return result

    train.train_step = train_step


def note_times(fault: Fault) -> None:
    """Write the seconds of every step's start to the file $TIMES."""
    path = Path(os.environ["TIMES"])

    def note(config, step):
        with path.open("a") as file:
            file.write(f"{time.monotonic()}\n")

    before_step(note)


def valley(fault: Fault) -> None:
    """Validation losses that are lowest at the fault's step."""
    evaluate = train.evaluate

    def planted(run, n_rows):
        evaluate(run, n_rows)
        return 1.0 + abs(NOW["step"] + 1 - fault.step)

    train.evaluate = planted


def fill_disk(fault: Fault) -> None:
    """Fill the disk of out_dir before the fault's step, free it `number` steps later."""

    def change(config, step):
        balloon = Path(config.out_dir).parent / "balloon"
        if step == fault.step:
            with balloon.open("wb", buffering=0) as file:
                for size in (1 << 20, 1):
                    try:
                        while file.write(bytes(size)) == size:
                            pass
                    except OSError:
                        continue
        elif step == fault.step + fault.number:
            balloon.unlink()

    before_step(change)


def limit_files(fault: Fault) -> None:
    """No file may grow past 20,000 bytes (RLIMIT_FSIZE) for `number` steps."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def change(config, step):
        if step == fault.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        elif step == fault.step + fault.number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    before_step(change)


def lose_console(fault: Fault) -> None:
    """From the fault's step on; `number` says how: see CONSOLES of test_surroundings."""

    def change(config, step):
        if step != fault.step:
            return
        if fault.number == 2:
            os.close(2)
            return
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(os.open("/dev/full", os.O_WRONLY) if fault.number == 0 else writer, 1)

    before_step(change)


def hang_up(fault: Fault) -> None:
    """Give the process a terminal of its own, which goes away before the fault's step."""
    import fcntl
    import pty
    import termios

    os.setsid()
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSCTTY, 0)
    for standard in (1, 2):
        os.dup2(ours, standard)
    os.close(ours)
    sys.stdout = sys.stderr = None  # opened anew: these would take the terminal for a file
    before_step(lambda config, step: os.close(terminal) if step == fault.step else None)


def in_saver(action: Callable[[int], None]) -> None:
    """Call `action(n)` before operation n, counted from 1, of the saving thread on the disk."""
    number = itertools.count(1)

    def before(operation: disk.Operation, write: Callable | None) -> None:
        if threading.current_thread() is not threading.main_thread():
            action(next(number))

    WATCHES.enter_context(disk.watch(before))


def kill_saver(fault: Fault) -> None:
    """SIGKILL before operation `number` of the saves, held back until training is `step` steps
    further, unless training waits for it.
    """

    def kill(number: int) -> None:
        if number == fault.number:
            wanted, limit = NOW["step"] + fault.step, time.monotonic() + 1.0
            while NOW["step"] < wanted and time.monotonic() < limit:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

    in_saver(kill)


def shorten_window(fault: Fault) -> None:
    optim.SpikeGuard.WINDOW = fault.number


PLANTS = {
    "forward": lambda fault: fail(train.GPT, "forward", fault),
    "data": lambda fault: fail(bins, "count_targets", fault),
    "save": lambda fault: fail(checkpoint.safetensors.torch, "save", fault),
    "eval": lambda fault: fail(train, "evaluate", fault),
    "nan": lambda fault: scale_loss(fault, float("nan")),
    "inf": lambda fault: scale_loss(fault, float("inf")),
    "spike": lambda fault: scale_loss(fault, 1e3),
    "window": shorten_window,
    "weights": hash_weights,
    "times": note_times,
    "valley": valley,
    "full": fill_disk,
    "fsize": limit_files,
    "console": lose_console,
    "hangup": hang_up,
    "kill": lambda fault: at_step(fault, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "killsave": kill_saver,
    "slowsave": lambda fault: in_saver(lambda number: time.sleep(fault.number / 1000)),
    "term": lambda fault: at_step(fault, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "stop": lambda fault: at_step(fault, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "sleep": lambda fault: at_step(fault, lambda: time.sleep(60)),
    "slow": lambda fault: before_step(lambda config, step: time.sleep(fault.number / 1000)),
}


def plant(faults: str) -> None:
    """Patch train.py in this process; always the small vocabulary."""
    train.tokenizer.VOCAB_SIZE = VOCABULARY
    NOW["rank"] = int(os.environ.get("RANK", 0))
    before_step(lambda config, step: None)  # keeps NOW
    for text in filter(None, faults.split(",")):
        name, *numbers = text.split(":")
        PLANTS[name](Fault(name, *map(int, numbers)))


def main() -> None:
    plant(sys.argv.pop(1))
    with settings.one_line_errors():
        config = settings.load(train.TrainConfig, sys.argv[1:], "train.py", config_file=True)
        train.distributed.record(train.main)(config)
    if "DONE" in os.environ:
        Path(f"{os.environ['DONE']}_{NOW['rank']}").write_text("came to its end")


if __name__ == "__main__":
    main()
