"""SIGKILL at any time: the same command goes on and ends bit for bit as if nothing had been."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import disk, rig
from faults.rig import Run
from nanosynth import checkpoint


def where_killed(run: Run, log: str) -> str:
    """What the killed process was about to do, from what it left."""
    if list(run.out_dir.glob(".tmp-*")):
        return "in a save"
    if list(run.out_dir.glob(".trash-step_*")):
        return "in a deletion"
    return "in training" if "validation loss of two batches" in log else "before the first step"


def kill_at(run: Run, seconds: float) -> str:
    """Start the run and kill it after `seconds`; where it was then, or '' if it had ended."""
    said = len(run.log)
    (process,) = run.start()
    process.join(seconds)
    process.kill()
    process.join()
    return where_killed(run, run.log[said:]) if process.exitcode == -9 else ""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_random_kill(optimizer, work, fault_bins, alone, tally):  # alone: the server is warm
    row = tally(f"SIGKILL at a random time, resumed, {optimizer}")
    chance = random.Random(1)
    whole = Run(fault_bins, work / "whole", optimizer=optimizer).finish()
    for number in range(4 * row.wanted):
        run = Run(fault_bins, work / str(number), optimizer=optimizer)
        if where := kill_at(run, chance.uniform(0, whole.seconds)):
            row.land(where)
            row.trial(run.finish().complaints(whole))
        run.remove()
        if row.trials == row.wanted:
            break
    assert row.trials == row.wanted, "too few kills landed before the end"
    assert row.wanted < 100 or row.landed.get("in a save"), "no kill hit a save"
    row.check()


def test_chain_of_kills(work, fault_bins, alone, tally):
    """Ten kills of one run, each soon after it went on, so that some hit the resume itself."""
    row = tally("10 SIGKILLs in a row, resumed")
    chance = random.Random(2)
    warm = Run(fault_bins, work / "warm").finish()
    (process,) = Run(fault_bins, work / "start").start()
    started = time.monotonic()
    rig.wait(lambda: "two batches" in rig.read(work / "start.log"), 60)
    to_first_step = time.monotonic() - started
    rig.end(process)
    longest = to_first_step + 0.3 * (warm.seconds - to_first_step)
    for number in range(9 * row.wanted):
        run = Run(fault_bins, work / str(number))
        chain = [kill_at(run, chance.uniform(0, longest)) for _ in range(10)]
        if all(chain):
            for where in chain:
                row.land(where)
            row.trial(run.finish().complaints(alone))
        else:  # the machine is faster than it was when the two runs were timed
            longest *= 0.8
        run.remove()
        if row.trials >= row.wanted and row.landed.get("before the first step"):
            break
    assert row.trials >= row.wanted, "too few runs were still going at the tenth kill"
    assert row.landed.get("before the first step"), "no kill hit a resume"
    row.check()


def test_kill_in_the_saving_thread(work, fault_bins, alone, tally):
    """At any operation on the disk of the first three saves, the last of which deletes one."""
    row = tally("SIGKILL in the saving thread while training goes on")
    chance = random.Random(9)
    for number in range(row.wanted):
        run = Run(fault_bins, work / str(number))
        run.finish(f"killsave:0:2:{chance.randint(1, 65)}", codes=(-signal.SIGKILL,))
        saved = [int(path.name[-6:]) for path in run.out_dir.glob("*step_??????")]
        n_trained = len(rig.tiny.read_metrics(run.out_dir)) - (max(saved, default=4) >= 8)
        row.land(where_killed(run, run.log))
        row.land("steps trained meanwhile", n_trained - max(saved, default=4))
        row.trial(run.finish().complaints(alone))
        run.remove()
    assert row.landed.get("in a save") and row.landed["steps trained meanwhile"] > 0
    row.check()


def test_stop_while_a_checkpoint_is_written(work, fault_bins, alone, tally):
    """Both are kept: the one that was being written, and the one of the stop."""
    row = tally("SIGTERM while the saving thread writes")
    run = Run(fault_bins, work / "run").finish("slowsave:0:0:20,term:0:12")
    good = rig.verified(run.out_dir)
    row.trial([] if good == [8, 12, 13] else [f"left {good}: {run.log[-1500:]}"])
    row.trial(run.finish().complaints(alone))
    row.check()


def test_best_survives_kills(work, fault_bins, tally):
    """The lowest logged validation loss lies in mid-run, and its checkpoint outlives keep_last."""
    row = tally("best checkpoint after SIGKILLs")
    chance = random.Random(3)
    for number in range(row.wanted):
        run = Run(fault_bins, work / str(number), eval_interval=2)
        for _ in range(3):
            process = run.start("valley:0:6")[0]
            process.join(chance.uniform(0.1, 0.25))
            process.kill()
            process.join()
            row.land("kills before the end", process.exitcode == -9)
        run.finish("valley:0:6")
        losses = {
            r["step"]: r["loss"] for r in rig.tiny.read_metrics(run.out_dir) if r["split"] == "val"
        }
        wanted = checkpoint.folder(run.out_dir, min(losses, key=losses.get))
        named = run.out_dir / rig.read(run.out_dir / "best")
        good = rig.verified(run.out_dir)
        is_right = named == wanted == checkpoint.find(str(run.out_dir)) and wanted.name[-1] == "6"
        row.trial([] if is_right and len(good) == 3 else [f"best is {named}, verified {good}"])
    row.check()


# A save, operation by operation. The run has checkpoints 1 and 2; saving 3 publishes a new best and
# deletes 1: all that a save can do.


def save_two(run_dir: Path, is_best: bool = True) -> Path:
    save = rig.saver(run_dir)
    for step, loss in ((1, 8.0), (2, 7.0)):
        save(step, loss if is_best else None)
    return run_dir


def save_third(run_dir: Path, val_loss: float | None = 1.0) -> None:
    rig.saver(run_dir)(3, val_loss)


def save_and_die(run_dir: Path, index: int, half: bool) -> None:
    """In a child: the third save, killed before its operation `index`, or half-way through it."""
    number = itertools.count()

    def before(operation: disk.Operation, write: Callable | None) -> None:
        if next(number) == index:
            if half:
                write(operation.data[: len(operation.data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    with disk.watch(before):
        save_third(run_dir)


def check_folder(run_dir: Path, steps: set[int]) -> list[str]:
    """What is wrong with a run's folder that must go on from one of `steps`."""
    complaints = []
    names = {checkpoint.folder(run_dir, step).name for step in rig.verified(run_dir)}
    if len(names) < 2:
        complaints.append(f"only {sorted(names)} verify")
    for pointer in ("latest", "best"):
        if (run_dir / pointer).exists() and rig.read(run_dir / pointer) not in names:
            complaints.append(f"{pointer} names {rig.read(run_dir / pointer)!r}")
    with contextlib.redirect_stdout(None):
        found = checkpoint.find_start(run_dir, "auto", {"seed": 1})
    if found is None or int(found.name[5:]) not in steps:
        return [*complaints, f"goes on from {found}, not {steps}"]
    if (run_dir / "metrics.jsonl").stat().st_size < rig.metrics_bytes(found):
        complaints.append("metrics.jsonl is shorter than the checkpoint knows")
    leftovers = [*run_dir.glob(".tmp-step_*"), *run_dir.glob(".trash-*")]
    return complaints + [f"{path} is left" for path in leftovers]


def test_kill_at_every_operation_of_a_save(work, tally):
    saves = tally("SIGKILL at every write, fsync and rename of a save")
    deletions = tally("SIGKILL at every step of a deletion")
    run_dir, two_saves = work / "run", save_two(work / "two")
    shutil.copytree(two_saves, run_dir)
    operations = disk.record(lambda: save_third(run_dir))
    shutil.rmtree(run_dir)
    first_deletion = next(n for n, o in enumerate(operations) if "trash" in o.target)
    trials = [(n, half) for n, o in enumerate(operations) for half in (False, o.kind == "write")]
    for index, half in dict.fromkeys(trials):
        shutil.copytree(two_saves, run_dir)
        process = rig.fork(save_and_die, run_dir, index, half)
        assert rig.end(process) == -signal.SIGKILL
        row = saves if index < first_deletion else deletions
        row.land(operations[index].kind)
        row.trial(check_folder(run_dir, {2, 3}))
        shutil.rmtree(run_dir)
    assert {"write", "fsync", "rename"} <= set(saves.landed)
    saves.check()
    deletions.check()


def cut_power(root: Path, scratch: Path, operations: list, dropped: int | None, chance, n_random):
    """Yield the complaints about each state that a power cut in or after the save may leave.

    Operation `dropped` is left out: what a save without it would risk.
    """
    cut = disk.PowerCut(root)
    for number, operation in enumerate(operations):
        if number != dropped:
            cut.apply(operation)
        if dropped is not None and number < dropped:
            continue  # not yet different
        is_over = number == len(operations) - 1
        for write in cut.states(chance, n_random):
            write(scratch)
            pointers = {rig.read(scratch / name) for name in ("latest", "best")} - {""}
            lost = ["pointers lost"] if is_over and pointers != {"step_000003"} else []
            yield lost + check_folder(scratch, {3} if is_over else {2, 3})
    cut.write_all(scratch)
    is_pruned = checkpoint.steps(scratch) == [2, 3]
    yield [] if is_pruned else ["the end is not that of a save"]


def recorded(before: Path, run_dir: Path, val_loss: float | None) -> list[disk.Operation]:
    """The operations of the third save, as if made in `before`, which stays as it is."""
    shutil.copytree(before, run_dir)
    operations = disk.record(lambda: save_third(run_dir, val_loss))
    shutil.rmtree(run_dir)

    def moved(path: str) -> str:
        return path.replace(str(run_dir), str(before))

    return [o._replace(path=moved(o.path), target=moved(o.target)) for o in operations]


def test_power_cut_in_a_save(work, tally):
    """What was not synced may be lost, in any part; and no fsync or rename is there for nothing."""
    row = tally("power cut within a save: states replayed")
    mutants = tally("power cut within a save that lacks one fsync or rename: found")
    chance = random.Random(4)
    for is_best in (False, True):  # without a best checkpoint, the sync of `latest` is the last
        before = save_two(work / f"before_{is_best}", is_best)
        operations = recorded(before, work / "run", 1.0 if is_best else None)
        row.land("operations", len(operations))
        n_random = row.wanted // (2 * len(operations))
        for complaints in cut_power(before, work / "cut", operations, None, chance, n_random):
            row.trial(complaints)
        first = next((n for n, o in enumerate(operations) if ".tmp-best" in o.path), 0)
        for index, operation in enumerate(operations):
            if operation.kind in ("fsync", "rename") and index >= first:
                states = cut_power(before, work / "cut", operations, index, chance, 1)
                mutants.land(operation.kind)
                mutants.trial([] if any(states) else [f"{operation} is not needed"])
    row.check()
    mutants.check()
    assert row.trials >= row.wanted and mutants.landed.keys() == {"fsync", "rename"}
