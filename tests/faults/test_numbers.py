"""Numbers that go wrong, another number of ranks, wandb: the run decides alike on every rank."""

import json
import random
import statistics
from pathlib import Path

import pytest

from faults import rig
from faults.rig import STEPS, Run
from nanosynth import checkpoint
from tiny import read_metrics


def weights(folder: Path, rank: int) -> list[str]:
    """The hash of a rank's weights after each step."""
    return rig.read(folder / f"weights_{rank}").split()


@pytest.mark.parametrize("fault", ["nan", "inf"])
def test_bad_numbers_on_one_rank(fault, work, fault_bins, tally):
    """Both ranks skip steps 5 and 6; the rows of these steps are logged."""
    row = tally(f"{fault} on one rank in two steps")
    run = Run(fault_bins, work / "run", n_ranks=2)
    run.finish(f"{fault}:1:5:2,weights", WEIGHTS=str(work / "weights"))
    ranks = [weights(work, rank) for rank in range(2)]
    records = [r for r in read_metrics(run.out_dir) if r["split"] == "train"]
    unchanged = [n for n in range(1, STEPS) if ranks[0][n] == ranks[0][n - 1]]
    row.land("skipped steps", len(unchanged))
    complaints = [] if ranks[0] == ranks[1] and len(ranks[0]) == STEPS else ["ranks differ"]
    complaints += [] if unchanged == [5, 6] else [f"unchanged after {unchanged}"]
    skipped = {r["step"]: (r["skipped"], len(r["rows"])) for r in records if r["skipped"]}
    complaints += [] if skipped == {5: (1, 4), 6: (2, 4)} else [f"logged {skipped}"]
    row.trial(complaints)
    row.check()


@pytest.mark.parametrize("limit, reason", [(6, "6 steps skipped in a row"), (99, "loss scale 0.5")])
def test_endless_nan_stops_the_run(limit, reason, work, fault_bins, tally):
    """By the number of steps skipped, or by the scale's floor: 14 halvings of 8,192."""
    row = tally(f"NaN on one rank for ever: stopped by {reason}")
    run = Run(fault_bins, work / "run", n_ranks=2, max_skipped_steps=limit)
    run.finish("nan:1:5:99", codes=(1,))
    good = rig.verified(run.out_dir)
    last_good = f"last good checkpoint: {checkpoint.folder(run.out_dir, 4)}"
    row.land("good checkpoints left", len(good))
    is_right = reason in run.log and last_good in run.log and "Traceback" not in run.log
    row.trial([] if is_right else [run.log])
    row.check()


def test_spike_is_skipped_by_a_window_that_survives_a_kill(work, fault_bins, tally):
    row = tally("loss spike, skipped; window of the detector killed and resumed")
    faults = "window:0:0:10,spike:0:16"
    whole = Run(fault_bins, work / "whole").finish(faults)
    skipped = [r["step"] for r in read_metrics(whole.out_dir) if r.get("skipped")]
    assert skipped == [16], f"the spike did not land: {skipped}"
    for step in range(9, 17):
        run = Run(fault_bins, work / str(step)).finish(f"{faults},kill:0:{step}", codes=(-9,))
        row.land("kills")
        row.trial(run.finish(faults).complaints(whole))
    row.check()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_number_of_ranks(optimizer, work, fault_bins, tally):
    row = tally(f"resumed by another number of ranks (1, 2, 4), {optimizer}")
    flags = {
        "optimizer": optimizer,
        "rows_per_step": 4,
        "micro_batch_size": 1,
        "dtype": "float32",
    }
    whole = Run(fault_bins, work / "whole", **flags).finish()
    wanted = read_metrics(whole.out_dir)
    for first, second in ((1, 2), (2, 4), (4, 1)):
        run = Run(fault_bins, work / f"{first}_{second}", n_ranks=first, **flags)
        run.finish("term:0:9")
        run.n_ranks = second
        run.finish()
        found = read_metrics(run.out_dir)
        steps = [[(r["step"], r["split"]) for r in records] for records in (found, wanted)]
        losses = zip(found[:-1], wanted[:-1], strict=False)  # the last tells of the end
        errors = [abs(f["loss"] / w["loss"] - 1) for f, w in losses]
        row.land(f"from {first} to {second} ranks")
        row.trial([] if steps[0] == steps[1] and max(errors) < 1e-5 else [f"{max(errors)}"])
        sizes = json.loads((run.out_dir / "config.json").read_text())["world_size"]
        assert sizes == second and "stopped by a signal at step 10" in run.log
    row.check()


STUB = """
import os, time
def finish(): {finish}
def log(values, step): {log}
class Run: log = staticmethod(log); finish = staticmethod(finish)
def init(**options):
    open(os.environ["CANARY"], "w").close()
    {init}
    return Run
"""
WANDB = {
    "raises in init": {"init": "raise RuntimeError('planted')"},
    "hangs in init": {"init": "time.sleep({hang})"},
    "exits in init": {"init": "raise SystemExit(3)"},
    "raises in log": {"log": "raise ValueError('planted')"},
    "hangs in log": {"log": "time.sleep({hang} * (step == 0))"},
    "dies in log": {"log": "raise BrokenPipeError('the service is gone')"},
    "hangs at the end": {"finish": "time.sleep({hang})"},
}


def step_seconds(path: Path) -> float:
    times = [float(line) for line in path.read_text().split()]
    return statistics.mean(b - a for a, b in zip(times, times[1:], strict=False))


@pytest.mark.parametrize("how", WANDB)
def test_wandb(how, work, fault_bins, alone, tally, wandb_hangs_seconds):
    """The run is the one without wandb, and a step takes at most 100 ms more."""
    row = tally(f"wandb {how}")
    parts = dict.fromkeys(("init", "log", "finish"), "pass") | WANDB[how]
    hang = str(wandb_hangs_seconds)
    stub = STUB.format(**{key: text.replace("{hang}", hang) for key, text in parts.items()})
    (work / "stub").mkdir()
    (work / "stub" / "wandb.py").write_text(stub)
    plain = Run(fault_bins, work / "plain").finish("times", TIMES=str(work / "plain_times"))
    run = Run(fault_bins, work / "run", wandb="online")
    environment = {"TIMES": str(work / "times"), "CANARY": str(work / "canary")}
    run.finish("times", path=str(work / "stub"), **environment)
    assert (work / "canary").exists(), "the stub was not used"
    added = step_seconds(work / "times") - step_seconds(work / "plain_times")
    row.land("ms a step added (mean)", max(0, round(1000 * added)))
    late = [] if added < 0.1 else [f"{added:.3f} s a step more"]
    row.trial(run.complaints(alone) + plain.complaints(alone) + late)
    row.check()


def test_a_nan_validation_loss_is_never_the_best(work, tally):
    row = tally("NaN as validation loss: not the best")
    save = rig.saver(work / "run")
    for step, loss in enumerate([float("nan"), 5.0, 4.0, float("nan"), 6.0], 1):
        save(step, loss)
    found = checkpoint.best(work / "run")
    row.trial([] if found and found.name == "step_000003" else [f"best is {found}"])
    row.check()


def test_random_signals_alone(work, fault_bins, alone, tally):
    """One process, SIGTERM at random: exit 0 at a step boundary, and the end is the same."""
    row = tally("SIGTERM to a run of one process")
    chance = random.Random(6)
    for number in range(3):
        run = Run(fault_bins, work / str(number)).finish(f"term:0:{chance.randrange(STEPS)}")
        row.land("before the end", "stopped by a signal" in run.log)
        row.trial(run.finish().complaints(alone))
    row.check()
