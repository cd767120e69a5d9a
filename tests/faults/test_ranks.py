"""Two ranks under torchrun: signals, dead, raising and stopped ranks, a dead launcher."""

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path
from unittest import mock

import pytest

from faults import rig
from faults.rig import STEPS, Run
from nanosynth import checkpoint

SLOW = "slow:0:0:30"  # 30 ms more a step, so that a fault lands within the run


def end(launcher, seconds: float = 90.0) -> int:
    rig.wait(lambda: launcher.poll() is not None, seconds)
    return launcher.returncode


def signal_cases(count: int) -> list[tuple]:
    """(signal, who gets it: a rank or the launcher), every combination in turn."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    cases = [(n, who) for who in ("torchrun", 1, 0) for n in numbers]
    first = [cases[1], cases[5], cases[0]]  # what a short run takes
    return [*first, *(cases * count)][:count]


def test_signals(work, fault_bins, pair, tally, monkeypatch):
    """All ranks save at one step boundary and end by themselves; the run goes on equal."""
    row = tally("SIGTERM, SIGINT or SIGUSR1 to a rank or to torchrun")
    chance = random.Random(7)
    for number, (what, who) in enumerate(signal_cases(row.wanted)):
        run = Run(fault_bins, work / str(number), n_ranks=2)
        monkeypatch.setenv("DONE", str(work / f"{number}_done"))
        with rig.ended(run.torchrun(SLOW)) as launcher:
            run.wait_for(chance.randrange(STEPS - 4))
            time.sleep(chance.uniform(0, 0.03))
            os.kill(launcher.pid if who == "torchrun" else rig.workers(launcher.pid)[who], what)
            code = end(launcher)
        stopped = re.findall(r"stopped by a signal at step (\d+)", run.log)
        row.land(f"{what.name} to {'torchrun' if who == 'torchrun' else 'a rank'}")
        complaints = [] if len(stopped) == 1 else [f"no stop: {run.log[-1500:]}"]
        complaints += [] if code == 0 or who == "torchrun" else [f"exit {code}"]
        done = len(list(work.glob(f"{number}_done_*")))
        complaints += [] if done == 2 else [f"{done} ranks came to their end: {run.log[-1500:]}"]
        complaints += (
            [] if rig.verified(run.out_dir)[-1:] == [int(n) for n in stopped] else ["step"]
        )
        row.trial(complaints + run.finish().complaints(pair))
    row.check()


def test_second_signal(work, fault_bins, alone, tally):
    row = tally("second signal in a step that does not end: ends at once")
    run = Run(fault_bins, work / "run")
    (process,) = run.start("sleep:0:13")
    run.wait_for(12)
    time.sleep(0.3)  # until it sleeps
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.3)  # more than the grace in which it counts as the same request
    os.kill(process.pid, signal.SIGTERM)
    code = rig.end(process, 2.0)
    row.trial([] if code == 128 + signal.SIGTERM else [f"exit {code}"])
    row.trial(run.finish().complaints(alone))
    row.check()


def test_killed_rank_is_restarted(work, fault_bins, pair, tally):
    row = tally("SIGKILL of one rank under torchrun --max-restarts")
    chance = random.Random(8)
    for number in range(row.wanted):
        run = Run(fault_bins, work / str(number), n_ranks=2)
        with rig.ended(run.torchrun(SLOW, "--max-restarts=3")) as launcher:
            rank = chance.randrange(2)
            rig.wait(lambda launcher=launcher: len(rig.workers(launcher.pid)) == 2, 60)
            if chance.random() < 0.75:  # else while the ranks import and meet
                run.wait_for(chance.randrange(STEPS - 1))
            time.sleep(chance.uniform(0, 0.05))
            landed_in = "training" if (run.out_dir / "metrics.jsonl").exists() else "the start"
            os.kill(rig.workers(launcher.pid)[rank], signal.SIGKILL)
            code = end(launcher)
        row.land(f"of rank {rank} in {landed_in}")
        complaints = [] if code == 0 else [f"exit {code}: {run.log[-1500:]}"]
        row.trial(complaints + run.complaints(pair))
    row.check()


def test_killed_launcher(work, fault_bins, pair, tally):
    row = tally("SIGKILL of torchrun")
    for number in range(row.wanted):
        run = Run(fault_bins, work / str(number), n_ranks=2)
        with rig.ended(run.torchrun(SLOW)) as launcher:
            run.wait_for(5)
            pids = list(rig.workers(launcher.pid).values())
            launcher.kill()
            started = time.monotonic()
            with contextlib.suppress(AssertionError):
                rig.wait(lambda pids=pids: not any(map(rig.is_alive, pids)), 10)
            seconds = time.monotonic() - started
        row.land("workers", len(pids))
        complaints = [] if seconds < 5 and len(pids) == 2 else [f"{pids} after {seconds:.1f} s"]
        row.trial(complaints + run.finish().complaints(pair))
    row.check()


@contextlib.contextmanager
def two_nodes(run: Run, fault: str = ""):
    """Both nodes' torchrun; the first one keeps the store by which they meet."""
    port = rig.free_port()
    with rig.ended(run.torchrun(fault, port=port)) as first:
        rig.wait(lambda: rig.is_open(port), 60)
        with rig.ended(run.torchrun(fault, port=port)) as second:
            yield first, second


def test_killed_node(work, fault_bins, pair, tally, campaign):
    """The other node ends within a minute, and the job started again goes on."""
    if not campaign:
        pytest.skip("half a minute a trial: in the campaign alone")
    row = tally("SIGKILL of one node's torchrun, of two")
    for number in range(row.wanted):
        run, killed = Run(fault_bins, work / str(number), n_ranks=2), number % 2
        with two_nodes(run, SLOW) as nodes:
            run.wait_for(9)
            nodes[killed].kill()
            started = time.monotonic()
            code = end(nodes[1 - killed], 60.0)
        row.land(f"of the {('first', 'second')[killed]} node")
        row.land("seconds in all until the other had ended", round(time.monotonic() - started))
        complaints = [] if code else ["the other node ended as if nothing had been"]
        with two_nodes(run) as nodes:
            codes = [end(node) for node in nodes]
        complaints += [] if codes == [0, 0] else [f"exit {codes}: {run.log[-1500:]}"]
        row.trial(complaints + run.complaints(pair))
    row.check()


def end_after_raise(run: Run, fault: str, raised: Path, *, by_torchrun: bool) -> tuple[bool, float]:
    """Whether all ranks failed, and the seconds from the raise until all had ended."""
    environment = {"RAISED": str(raised)}
    if by_torchrun:
        with mock.patch.dict(os.environ, environment), rig.ended(run.torchrun(fault)) as launcher:
            has_failed = end(launcher) != 0
    else:
        processes = run.start(fault, **environment)
        has_failed = all([rig.end(process) for process in processes])
    return has_failed, time.time() - raised.stat().st_mtime


@pytest.mark.parametrize("where, rank", [("forward", 1), ("data", 1), ("save", 0), ("eval", 1)])
def test_one_rank_raises(where, rank, work, fault_bins, pair, tally, campaign):
    """All ranks end within 10 s, the first error is the last, and no torn checkpoint is left."""
    row = tally(f"one rank raises in {where}")
    order = tally(f"one rank raises in {where}: the first error is the last in the log")
    run = Run(fault_bins, work / "run", n_ranks=2)
    by_torchrun = campaign or where in ("forward", "save")
    has_failed, seconds = end_after_raise(
        run, f"{where}:{rank}:7:9", work / "raised", by_torchrun=by_torchrun
    )
    row.land("seconds in all until all had ended", round(seconds))
    complaints = [] if has_failed and seconds < 10 else [f"{has_failed} after {seconds:.1f} s"]
    steps = checkpoint.steps(run.out_dir)
    complaints += [] if steps == rig.verified(run.out_dir) == [4] else [f"left {steps}"]
    errors = re.findall(r"^\s*(?:\[rank\d\]: )?(\w*Error: .*)", run.log, re.MULTILINE)
    row.trial(complaints + run.finish().complaints(pair))
    row.check()
    if by_torchrun:
        order.trial([] if errors and "planted" in errors[-1] else [f"errors {errors}"])
        order.check()


def test_ranks_end_by_themselves(work, fault_bins, pair, tally):
    """No rank hangs or aborts after its last step, when the process group is taken down."""
    row = tally("two ranks, no fault: exit 0")
    for number in range(row.wanted):
        run = Run(fault_bins, work / str(number), n_ranks=2)
        processes = run.start()
        for process in processes:
            process.join(15)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        row.trial([] if codes == [0, 0] else [f"exit codes {codes} (None: hangs)"])
        run.remove()
    row.check()


def test_stopped_rank(work, fault_bins, pair, tally, campaign):
    """A rank that stops is noticed by the other within twice the limit, with its stacks."""
    row = tally("SIGSTOP of a rank")
    limit = 4
    for rank in (0, 1) if campaign else (1,):
        run = Run(fault_bins, work / str(rank), n_ranks=2, hang_seconds=float(limit))
        processes = run.start(f"stop:{rank}:9")
        run.wait_for(8)
        started = time.monotonic()
        code = rig.end(processes[1 - rank], 10 * limit)
        seconds = time.monotonic() - started
        processes[rank].kill()
        processes[rank].join()
        row.land("seconds in all until found", round(seconds))
        has_stacks = "Timeout (" in run.log and "in train_step" in run.log
        is_found = code and seconds < 2 * limit and has_stacks
        complaints = [] if is_found else [f"{code}, {seconds:.1f} s: {run.log[-1500:]}"]
        run.flags["hang_seconds"] = 120.0
        row.trial(complaints + run.finish().complaints(pair))
    row.check()
