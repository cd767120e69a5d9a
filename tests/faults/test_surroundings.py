"""What is around a run fails: its console, its terminal, its folder, another process in it."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from faults import rig
from faults.rig import STEPS, Run
from nanosynth import checkpoint
from verdict import report, runs

CONSOLES = ("stdout on a full disk", "stdout's reader gone", "stderr closed")


def test_a_lost_console(work, fault_bins, alone, tally):
    """At a random step, or before the first: the run is the same, and exits with 0."""
    row = tally("console lost")
    chance = random.Random(10)
    for number in range(row.wanted):
        how = number % len(CONSOLES)
        run = Run(fault_bins, work / str(number))
        run.finish(f"console:0:{chance.randrange(STEPS // 2)}:{how}")
        row.land(CONSOLES[how])
        row.trial(run.complaints(alone))
        run.remove()
    row.check()


def test_a_lost_terminal(work, fault_bins, alone, tally):
    """The kernel's SIGHUP, when the terminal of a session goes, saves as SIGTERM does."""
    row = tally("SIGHUP: the terminal goes away")
    chance = random.Random(11)
    for number in range(row.wanted):
        step = chance.randrange(STEPS - 1)
        run = Run(fault_bins, work / str(number)).finish(f"hangup:0:{step}")
        saved = rig.verified(run.out_dir)[-1:]
        row.land("before the end", saved != [STEPS])
        row.trial([] if saved and saved[0] in (step + 1, step + 2) else [f"{step}: left {saved}"])
        row.trial(run.finish().complaints(alone))
        run.remove()
    row.check()


def test_a_second_process(work, fault_bins, alone, tally):
    """It is refused at once; the first, killed, leaves nothing that is held."""
    row = tally("a second train.py in one folder: refused; the first killed, run again")
    for number in range(row.wanted):
        run = Run(fault_bins, work / str(number))
        (first,) = run.start("slow:0:0:50")
        run.wait_for(number % 8)
        started = time.monotonic()
        (second,) = run.start()
        code = rig.end(second)
        seconds = time.monotonic() - started
        is_refused = code == 1 and run.log.count("error: another process works in") == 1
        row.trial([] if is_refused and seconds < 10 else [f"exit {code}: {run.log[-1500:]}"])
        first.kill()
        first.join()
        row.land("first killed", first.exitcode == -signal.SIGKILL)
        row.trial(run.finish().complaints(alone))
        run.remove()
    row.check()


def cut_all(run_dir: Path) -> None:
    for step in checkpoint.steps(run_dir):
        path = checkpoint.folder(run_dir, step) / checkpoint.MODEL
        path.write_bytes(path.read_bytes()[:-1])


def delete_all(run_dir: Path) -> None:
    for step in checkpoint.steps(run_dir):
        shutil.rmtree(checkpoint.folder(run_dir, step))


def link_all(run_dir: Path) -> None:
    for step in checkpoint.steps(run_dir):
        path = checkpoint.folder(run_dir, step)
        path.rename(run_dir.with_name(path.name))
        path.symlink_to(run_dir.with_name(path.name))


def foreign(run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    run_dir.mkdir()
    (run_dir / "config.json").write_text('{"theirs": 1}')
    (run_dir / "metrics.jsonl").write_text("theirs\n")


def contents(run_dir: Path) -> dict[str, object]:
    return {
        str(path): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in run_dir.rglob("*")
    }


@pytest.mark.parametrize("harm", [cut_all, delete_all, link_all, foreign], ids=lambda h: h.__name__)
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_without_a_usable_checkpoint(harm, resume, work, alone, fault_bins, tally):
    """Refused in a line, and every byte stays."""
    row = tally("a folder that holds work, but no usable checkpoint: refused, all stays")
    run = Run(fault_bins, shutil.copytree(alone.out_dir, work / "run"), resume=resume)
    harm(run.out_dir)
    before = contents(run.out_dir)
    run.finish(codes=(1,))
    row.land(harm.__name__.replace("_", " "))
    is_said = run.log.count("error: ") == len(run.log.splitlines()) == 1
    row.trial([] if is_said and contents(run.out_dir) == before else [run.log])
    row.check()


def test_a_ruined_run(work, fault_bins, alone, tally):
    """Resumed at a learning rate that ends in NaN: the good ones stay, and the advice works."""
    row = tally("learning_rate=1e6 from a step on: the last good checkpoint goes on")
    for number in range(row.wanted):
        run = Run(fault_bins, work / str(number)).finish(f"term:0:{5 + number % 12}")
        good = rig.verified(run.out_dir)
        rates = {"learning_rate": 1e6, "min_learning_rate": 1e6, "max_skipped_steps": 4}
        run.flags |= rates
        said = len(run.log)
        run.finish(codes=(1,))
        advice = run.log[said:].partition("--resume=")[2].split(maxsplit=1)[0]
        kept = rig.verified(run.out_dir)
        row.land(f"stopped, {Path(advice).name or 'no advice'}", 1)
        run.flags = {**Run(fault_bins, run.out_dir).flags, "resume": advice}
        lost = [] if good[-1] in kept else [f"of {good} {kept} are left"]
        row.trial(lost + run.finish().complaints(alone))
        run.remove()
    row.check()


WRITTEN = ("config.json", "latest", "best", "report.md", "report.json", "report.html", "curves.png")
GUESSED = (*(f".tmp-{name}" for name in (*WRITTEN, "step_000012")), "step_000012.tmp", ".partial")


@pytest.mark.parametrize("names", [WRITTEN, GUESSED, ("metrics.jsonl",)], ids=lambda n: n[0])
def test_links_in_a_run(names, work, fault_bins, alone, tally):
    """In the place of what is written, or of a temporary name that one might guess."""
    row = tally("links in a run's folder: nothing is written through them")
    theirs = work / "theirs"
    theirs.mkdir()
    run = Run(fault_bins, work / "run").finish("kill:0:10", codes=(-signal.SIGKILL,))
    for name in names:
        link = run.out_dir / name
        if link.exists():
            shutil.move(link, theirs / name)
        else:
            (theirs / name).write_text("theirs")
        link.symlink_to(theirs / name)
    before = contents(theirs)
    run.finish(codes=(0, 1))
    found = []
    if names != ("metrics.jsonl",):
        report.write([runs.read(str(run.out_dir))], run.out_dir, 5)
    row.land("links", len(names))
    row.trial(found + ([] if contents(theirs) == before else ["a link was followed"]))
    row.check()
