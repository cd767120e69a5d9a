"""What a run tells: metrics.jsonl, the console, wandb, and where its figures come from.

metrics.jsonl has one JSON object a line and is the truth; the console and wandb only show it.
"""

import contextlib
import errno
import json
import math
import os
import platform
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from nanosynth import UserError, settings, terminal
from nanosynth.device import memory_gb, model_flops_utilisation
from nanosynth.files import not_through_a_link, set_aside, write_atomically
from nanosynth.schema import misfit
from nanosynth.training.distributed import World


class MetricsFile:
    """metrics.jsonl, appended; a resumed run cuts off what the checkpoint does not know."""

    def __init__(self, path: Path, resume_at: int, say: Callable[[str], None] = terminal.say):
        self._say = say
        self._file = open(path, "a+b", buffering=0, opener=not_through_a_link)
        self._file.truncate(min(resume_at, self._file.tell()))
        size = self._file.seek(0, os.SEEK_END)
        is_torn = os.pread(self._file.fileno(), 1, max(0, size - 1)) not in (b"", b"\n")
        # What a full disk has kept back. A line that was cut by hand takes no record with it.
        self._unwritten = b"\n" if is_torn else b""

    def write(self, record: dict) -> None:
        """Append a line; while the disk refuses it, it waits in memory for the next write."""
        had_room = not self._unwritten
        self._unwritten += json.dumps(record).encode() + b"\n"
        try:
            self._write_out()
        except OSError as error:
            if had_room:
                self._say(f"metrics wait in memory, training goes on: {error}")

    def _write_out(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def size(self) -> int:
        """Bytes of all records until now, also those that wait: what a checkpoint remembers."""
        return self._file.tell() + len(self._unwritten)

    def sync(self, size: int) -> None:
        """Have the first `size` bytes on disk, or raise OSError. A thread may call it."""
        os.fsync(self._file.fileno())
        if os.fstat(self._file.fileno()).st_size < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        with self._file:
            self._write_out()


def device_hours(path: Path) -> float:
    """That the last line of a metrics.jsonl tells of, also where a resumed run cuts it off: they
    were spent. 0 without one.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):  # torn, of an old run, or edited
            record = json.loads(line)
            if not misfit(record, {"device_hours": "positive"}):
                return float(record["device_hours"])
    return 0.0


class Background:
    """An output whose thread takes what is put, in its order: training does not wait for a console
    or a service that hangs, nor its end for longer than `patience_seconds`.
    """

    def __init__(self, work: Callable[[Iterator], None], patience_seconds: float):
        items: queue.SimpleQueue = queue.SimpleQueue()
        self.put, self._patience_seconds = items.put, patience_seconds
        self._thread = threading.Thread(target=work, args=(iter(items.get, None),), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.put(None)
        self._thread.join(self._patience_seconds)


class Wandb(Background):
    """Sends records to wandb: whatever it does, training goes on."""

    def __init__(self, say: Callable[[str], None], **options: object):
        self._say, self._options = say, options
        super().__init__(self._send, patience_seconds=30.0)

    def _send(self, records: Iterator[dict]) -> None:
        try:
            import wandb

            run = wandb.init(**self._options, resume="allow")
            for record in records:
                step, split = record.pop("step"), record.pop("split")
                run.log({f"{split}/{key}": value for key, value in record.items()}, step=step)
            run.finish()
        except BaseException as error:  # wandb may raise anything, and none of it ends a run
            self._say(f"wandb stopped, training goes on: {error!r}")


class Console(Background):
    """A progress bar on a terminal, plain lines in a log.

    Printed without Python's streams and their locks: a console that is gone, full or stopped
    neither ends nor delays the run. What it does not take is lost.
    """

    def __init__(self, first_step: int, max_steps: int):
        self._stdout = sys.stdout  # as it is now: what is said late goes nowhere else
        self._first_step, self._max_steps = first_step, max_steps
        super().__init__(self._print, patience_seconds=5.0)

    def say(self, text: str) -> None:
        self.put((text, None))

    def progress(self, step: int, text: str, seconds_left: float) -> None:
        """How the run is after `step`."""
        minutes, seconds = divmod(int(seconds_left), 60)
        line = f"step {step:>6}/{self._max_steps} | {text} | {minutes}m{seconds:02d}s left"
        self.put((line, (step, text)))

    def _print(self, said: Iterator[tuple[str, tuple[int, str] | None]]) -> None:
        bar = tqdm(disable=True)
        with contextlib.suppress(Exception):  # of many classes: streams', codecs', tqdm's
            bar = tqdm(  # disable=None: none where stderr is no terminal
                file=open(sys.stderr.fileno(), "w", encoding=sys.stderr.encoding, closefd=False),
                initial=self._first_step,
                total=self._max_steps,
                unit="step",
                dynamic_ncols=True,
                disable=None,
            )
        for line, progress in said:
            with contextlib.suppress(Exception):
                if progress and not bar.disable:
                    step, text = progress
                    bar.set_postfix_str(text, refresh=False)
                    bar.update(step + 1 - bar.n)
                    continue
                bar.clear()
                left = f"{terminal.harmless(line)}\n".encode(
                    self._stdout.encoding, "backslashreplace"
                )
                while left:
                    left = left[os.write(self._stdout.fileno(), left) :]
                bar.refresh()
        with contextlib.suppress(Exception):
            bar.close()


class RunLog:
    """A run's log, on every rank; rank 0 alone has the outputs.

    Steps stay on the device as tensors until `flush`, so that no step waits for the GPU.
    """

    def __init__(
        self,
        file: MetricsFile | None = None,
        console: Console | None = None,
        wandb: Wandb | None = None,
        *,
        world: World,
        peak: float | None,
        budget_hours: float = math.inf,
        spent_hours: float = 0.0,
        started: float | None = None,
    ):
        """`peak` is a device's, in FLOP/s; `spent_hours` of devices came before `started`, by
        time.perf_counter(), of the `budget_hours` of the whole run.
        """
        self.file, self._console, self._wandb = file, console, wandb
        self._world, self._peak = world, peak
        self._budget_hours, self._spent_hours = budget_hours, spent_hours
        self._n_flushes, self._has_warned = 0, False
        self._n_skipped, self._evaluated = 0, ""  # what the console says beside the training loss
        self._pending: list[tuple[dict, torch.Tensor, int, float]] = []
        self._clock = time.perf_counter()
        self._started = started or self._clock

    @property
    def device_hours(self) -> float:
        """Of the whole run until now, whatever they went to."""
        seconds = time.perf_counter() - self._started
        return self._spent_hours + seconds / 3600 * self._world.size

    def train(self, fields: dict, stats: torch.Tensor, *, n_tokens: int, flops: float) -> None:
        """Queue a step: its fields, and [loss, grad_norm, loss_scale, n_skipped] on the device."""
        self._pending.append((fields, stats, n_tokens, flops))

    def flush(self, steps_left: int) -> list[dict]:
        """Write the queued steps and return their records; this waits for the device.

        `skipped` counts the skipped steps in a row, this one included; a record of one keeps its
        `rows`, so that the batch can be looked at.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return []
        stats = torch.stack([stats for _, stats, _, _ in pending]).tolist()  # (steps, 4)
        seconds = time.perf_counter() - self._clock
        measured = {
            "tokens_per_second": sum(n_tokens for _, _, n_tokens, _ in pending) / seconds,
            "mfu": model_flops_utilisation(
                sum(flops for *_, flops in pending) / seconds, self._world.size, self._peak
            ),
            "memory_gb": memory_gb(self._world.device),
            "device_hours": self.device_hours,
        }
        records = []
        for (fields, *_), (loss, grad_norm, scale, n_skipped) in zip(pending, stats, strict=True):
            record = {"step": fields["step"], "split": "train", "loss": loss, **fields}
            record |= {"grad_norm": grad_norm, "loss_scale": scale, "skipped": int(n_skipped)}
            if not n_skipped:
                del record["rows"]
            records.append(record | measured)
            self._emit(records[-1])
            self._n_skipped += n_skipped > 0
        seconds_left = steps_left * seconds / len(records)
        if self._console:
            last = records[-1]
            self._console.progress(last["step"], self._summary(last), seconds_left)
        self._warn_of_budget(seconds_left)
        self.restart_clock()
        return records

    def _summary(self, record: dict) -> str:
        parts = [
            ("skipped" if record["skipped"] else f"loss {record['loss']:.4f}") + self._evaluated,
            f"lr {record['lr']:.2e}",
            f"grad norm {record['grad_norm']:.2f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['memory_gb']:.1f} GB",
            f"{record['device_hours']:.3f} of {self._budget_hours:g} device-hours",
        ]
        if record["loss_scale"] != 1:  # float16
            parts.insert(3, f"scale {record['loss_scale']:g}")
        if record["mfu"] is not None:  # of a device whose peak is known
            parts.insert(-2, f"mfu {record['mfu']:.1%}")
        if self._n_skipped:
            parts.append(f"{self._n_skipped} skipped")
        return " | ".join(parts)

    def _warn_of_budget(self, seconds_left: float) -> None:
        """Once, when the first steps, which compile, are over."""
        self._n_flushes += 1
        expected = self.device_hours + seconds_left / 3600 * self._world.size
        if expected > self._budget_hours and self._n_flushes > 1 and not self._has_warned:
            self._has_warned = True
            budget = f"more than budget_hours={self._budget_hours:g}"
            self.say(f"at this speed the run takes {expected:.2f} device-hours, {budget}")

    def restart_clock(self) -> None:
        """Leave out of the throughput what passed since the last flush (evaluation, a save)."""
        self._clock = time.perf_counter()

    def val(self, step: int, loss: float, seconds: float) -> None:
        fields = {"loss": loss, "seconds": seconds, "device_hours": self.device_hours}
        self._emit({"step": step, "split": "val", **fields})
        self._evaluated = f" (validation {loss:.4f})"
        self.say(f"step {step:>6}: validation loss {loss:.4f} ({seconds:.1f}s)")

    def end(self, step: int) -> None:
        """Say what the run took until here, and note it; a resumed run goes on from that."""
        hours, budget = self.device_hours, self._budget_hours
        self._emit({"step": step, "split": "end", "device_hours": hours})
        over = "over" if hours > budget else "within"
        self.say(f"{hours:.3f} device-hours in all, {over} the budget of {budget:g}")

    def say(self, text: str) -> None:
        if self._console:
            self._console.say(text)

    def _emit(self, record: dict) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        if self.file:
            self.file.write(finite)
        if self._wandb:
            self._wandb.put(finite)

    def close(self) -> None:
        # In this order: each tells of its trouble by the next.
        for output in filter(None, (self._wandb, self._console, self.file)):
            output.close()


def make_way(run_dir: Path, say: Callable[[str], None] = terminal.say) -> None:
    """Before the first step of a run: keep the metrics of one that ended before its first
    checkpoint, and raise UserError where config.json or metrics.jsonl is somebody else's.
    """
    config, metrics = run_dir / "config.json", run_dir / "metrics.jsonl"
    found = [path.name for path in (config, metrics) if os.path.lexists(path)]
    if found and not _starts(config):
        whose = f"{run_dir} holds {' and '.join(found)} of something else"
        raise UserError(f"{whose}; use another --out_dir")
    if metrics.is_file() and metrics.stat().st_size:
        aside = set_aside(metrics, "abandoned")
        say(f"{run_dir} has no checkpoint: a new run; the metrics of the last one are {aside}")


def _starts(config: Path) -> list[dict]:
    """The starts that a run's config.json tells of; none where it is torn or of something else."""
    try:
        starts = json.loads(config.read_bytes())["starts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    are_ours = isinstance(starts, list) and all(isinstance(start, dict) for start in starts)
    return starts if are_ours else []


def write_config(path: Path, facts: dict, *, first_step: int) -> str:
    """config.json: `facts`, versions, and each start of the run with its command and commit; the
    run's id, which all its starts share.

    A resumed run has several starts, on other devices perhaps. Names no host and no user.
    """
    earlier = _starts(path)
    if path.exists() and not earlier:  # a resumed run's, edited by hand
        terminal.say(f"{path} cannot be read; it is now {set_aside(path, 'damaged')}")
    this = {
        "id": str(earlier and earlier[-1].get("id") or secrets.token_hex(8)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": settings.command_line(),
        "commit": commit(Path(__file__).parent),
        "first_step": first_step,
        "world_size": facts["world_size"],
        "device": facts["device"],
    }
    versions = {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    content = {**facts, **versions, "starts": [*earlier, this]}
    write_atomically(path, json.dumps(content, indent=2))
    return this["id"]


def commit(folder: Path) -> str | None:
    """The commit of the checkout around `folder`, with '-dirty' where tracked files differ from it.

    None where there is no git or no checkout: that is no error.
    """
    command = ["git", "--no-optional-locks", "-C", str(folder), "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
