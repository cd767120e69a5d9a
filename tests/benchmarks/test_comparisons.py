"""The comparisons' own machinery, with toys for contenders; the peers are in benchmarks/."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from benchmarks import alternate, compare_training
from benchmarks.alternate import Contender
from nanosynth import UserError, settings
from tiny import REPO, random_ids, tiny_model

TICKS = (
    "import time\nprint('ready')\nn = 0\nwhile True:\n time.sleep({0}); n += 1; print('step', n)"
)
ANSWERS = "import sys, time\nprint('step')\nfor _ in sys.stdin: time.sleep({0}); print('step')"


def toy(name: str, program: str, **changes) -> Contender:
    fields = {"command": ["-c", program], "line": "^step", "n_tokens": 10}
    return Contender(name=name, **{**fields, **changes})


def take_turns(*contenders: Contender, **changes) -> tuple[dict, dict]:
    fields = {"n_pairs": 2, "n_units": 2, "n_untimed": 0, "n_first": 0, "fresh": False}
    return alternate.alternate(list(contenders), **{**fields, **changes})


def test_ratios_by_hand():
    speeds = {"ours": [20.0, 30.0, 90.0], "peer": [10.0, 10.0, 20.0]}
    (ratio,) = alternate.pair_up(speeds, [("ours", "peer")])
    assert ratio.ratios == [2.0, 3.0, 4.5] and ratio.median == 3.0
    assert (ratio.ours_per_second, ratio.peer_per_second) == (30.0, 10.0)
    row = alternate.markdown([ratio], "tokens").splitlines()[-1]
    assert row == "| ours | peer | 30 | 10 | **3.00** (2.00 to 4.50, 3) |"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_unit_is_timed_by_its_lines(fresh):
    slow, fast = toy("slow", TICKS.format(0.08)), toy("fast", TICKS.format(0.02))
    speeds, lines = take_turns(slow, fast, fresh=fresh)
    assert all(40 < speed < 11 / 0.08 for speed in speeds["slow"])
    (ratio,) = alternate.pair_up(speeds, [("fast", "slow")])
    assert 1.5 < ratio.median < 5
    assert lines["slow"].startswith("step")


def test_a_contender_stands_still_between_its_turns():
    with alternate.running(toy("a", TICKS.format(0.02))) as process:
        process.turn(2, 0)
        before = int(process.last_line.split()[1])
        time.sleep(0.4)
        process.turn(1, 0)
        # Running on, it would be some twenty lines further.
        assert int(process.last_line.split()[1]) - before < 8


def test_a_contender_that_asks_works_when_asked():
    speeds, _ = take_turns(toy("a", ANSWERS.format(0.05), asks=True), n_untimed=1)
    assert all(50 < speed <= 11 / 0.05 for speed in speeds["a"])


def test_no_process_is_left():
    program = f"import os\nprint('pid', os.getpid())\n{TICKS.format(0.01)}"
    with alternate.running(toy("a", program, line="^pid")) as process:
        pid = int(process.last_line.split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_terminated_comparison_leaves_no_process(tmp_path):
    program = f"""
from benchmarks import alternate
ticks = "import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid()))\\n" + {TICKS!r}
toy = alternate.Contender(name="a", command=["-c", ticks.format(0.01)], line="^step", n_tokens=1)
alternate.alternate([toy], n_pairs=10**6, n_units=1, n_untimed=0, n_first=0, fresh=False)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPO, stderr=subprocess.PIPE) as run:
        run.stderr.readline()  # the first turn is over
        run.terminate()
        assert run.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_contender_that_ends_is_told_with_its_last_words():
    with pytest.raises(UserError, match="(?s)a ended: .*ValueError: no data"):
        take_turns(toy("a", "raise ValueError('no data')"))


def test_starts_count_from_the_process_to_the_line():
    speeds = alternate.starts([toy("a", "import time; time.sleep(0.2); print('step')")], 2)
    assert len(speeds["a"]) == 2 and all(0.2 < 1 / speed < 5 for speed in speeds["a"])


def test_each_peer_meets_our_fastest_and_ours_of_its_dtype():
    names = ["nanosynth, bfloat16", "nanosynth, float32", "nanoGPT, float32", "Trainer, bfloat16"]
    assert compare_training.pairs(names) == [
        ("nanosynth, bfloat16", "nanoGPT, float32"),
        ("nanosynth, bfloat16", "Trainer, bfloat16"),
        ("nanosynth, float32", "nanoGPT, float32"),
        ("nanosynth, bfloat16", "nanosynth, float32"),
    ]


def test_our_commands_are_such_as_train_takes(tmp_path):
    config = compare_training.CompareConfig(trainer=False)
    sizes = {name: getattr(config, name) for name in compare_training.SIZES}
    for ours in compare_training.contenders(config, sizes, tmp_path):
        taken = settings.load(train.TrainConfig, ours.command[1:], "train.py")
        assert taken.rows_per_step == config.rows_per_step
        assert taken.resume == "auto"  # a turn starts where the last one has left its folder


def test_transformers_gets_the_same_model():
    from benchmarks.compare_sampling import as_transformers

    ours = tiny_model().eval()
    theirs = as_transformers(ours.config, ours.state_dict()).eval()
    ids = random_ids(2, 8)
    with torch.no_grad():
        wanted = ours(ids).view(2, 8, -1)
        torch.testing.assert_close(theirs(ids).logits, wanted, atol=1e-5, rtol=1e-5)
