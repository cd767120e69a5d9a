"""Full disks and I/O errors: a checkpoint may be lost, the run and the older checkpoints not."""

import errno
import itertools
import os
import subprocess
from pathlib import Path

import pytest

from faults import disk, rig
from faults.rig import Run
from nanosynth import checkpoint


def fail_from(index: int, code: int, *, once: bool):
    """Operation `index` fails, alone or with all that follow (removals still work)."""
    number = itertools.count()

    def before(operation: disk.Operation, write: object) -> None:
        n = next(number)
        if n == index or (n > index and not once and operation.kind != "remove"):
            raise OSError(code, os.strerror(code), operation.path)

    return before


def test_error_at_every_operation_of_a_save(work, tally):
    row = tally("ENOSPC or EIO at every write, fsync and rename of a save")

    def saved_twice(run_dir: Path):
        save = rig.saver(run_dir)
        save(1, 8.0), save(2, 7.0)
        return save

    save_all = saved_twice(work / "all")
    operations = disk.record(lambda: save_all(3, 1.0))
    codes = {"fsync": errno.EIO, "rename": errno.EIO, "remove": errno.EIO}
    for (index, operation), once in itertools.product(enumerate(operations), (True, False)):
        run_dir = work / f"{index}_{once}"
        save = saved_twice(run_dir)
        code = codes.get(operation.kind, errno.ENOSPC)
        with disk.watch(fail_from(index, code, once=once)):
            said = save(3, 1.0)
        good = rig.verified(run_dir)
        said_again = save(4, 0.5)
        is_saved = any(": saved " in line for line in said)
        complaints = [] if os.strerror(code) in said[-1] else [f"said {said}"]
        complaints += [] if len(said) == 1 + is_saved else [f"said {said}"]
        complaints += [f"left {good} and said {said}"] if is_saved and 3 not in good else []
        complaints += [] if {2, 3} <= {*good, 3} and len(good) >= 2 else [f"left {good}"]
        complaints += [] if rig.verified(run_dir)[-1] == 4 and "saved" in said_again[0] else ["4"]
        row.land(operation.kind)
        row.trial([f"{operation.kind} {operation.path}: {c}" for c in complaints])
    row.check()


def check_full_disk(run: Run, fault: str, alone: Run, row) -> None:
    run.finish(fault)
    lost = run.log.count("checkpoint NOT saved, training goes on")
    row.land("checkpoints not written", lost)
    complaints = [] if lost and "Traceback" not in run.log else [run.log[-2000:]]
    row.trial(complaints + run.complaints(alone))
    row.check()


def test_file_size_limit(work, fault_bins, alone, tally):
    run = Run(fault_bins, work / "run")
    row = tally("no file may grow (RLIMIT_FSIZE) over two saves")
    check_full_disk(run, "fsize:0:5:8", alone, row)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, where the user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "nanosynth-faults", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk, fault_bins, alone, tally):
    run = Run(fault_bins, small_disk / "run")
    row = tally("disk full over two saves (tmpfs)")
    check_full_disk(run, "full:0:5:8", alone, row)


def test_too_small_disk_is_refused(small_disk, fault_bins, tally):
    row = tally("disk too small for the checkpoints")
    run = Run(fault_bins, small_disk / "run", n_embd=256).finish(codes=(1,))
    is_said = "has room for" in run.log and "Traceback" not in run.log
    row.trial([] if is_said and not checkpoint.steps(run.out_dir) else [run.log])
    row.check()
