"""experiment.sh: its order, what it skips, how it goes on; with a `python` that only pretends."""

import shutil
import subprocess
import sys

import pytest

from tiny import REPO

PRETENDER = """#!/usr/bin/env bash
# Notes its call and leaves what the script of that name would. DIES_AT=NAME: ends half done there.
[ "$0" = "${0%torchrun}" ] || { echo "torchrun $*" >> calls; shift 3; }
for flag in "$@"; do
  case $flag in --data_dir=* | --out_dir=* | --run=*) folder=${flag#*=} ;; esac
done
name=$1; [ "$1" != -m ] || name=$2
[ "$1" = -c ] || echo "${*#-m}" >> calls
dies() { [ "$name" = "${DIES_AT-}" ] && exit 9; return 0; }
case $name in
  -c) if [[ $2 == *torch* ]]; then echo "${GPUS-0}"; else exec PYTHON "$@"; fi ;;
  prepare.py) dies; mkdir -p "$folder"
    echo '{"splits": {"train": {"text_bytes": 90}, "val": {"text_bytes": 9}}}' \\
      > "$folder/meta.json" ;;
  train.py) folder=${3#*=}; mkdir -p "$folder"; echo '{"max_steps": 6}' > "$folder/config.json"
    echo "step_${STEP-000003}" > "$folder/latest"; dies
    echo "step_${STEP-000006}" > "$folder/latest" ;;
  eval_ppl.py) dies; touch "$folder/eval_ppl.json" ;;
  sample.py) dies; touch "$folder/generations.jsonl" ;;
  *) dies ;;
esac
"""


@pytest.fixture
def experiment(tmp_path):
    """A call of experiment.sh in a folder of its own: (exit status, what it said, its calls)."""
    shutil.copy(REPO / "experiment.sh", tmp_path)
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(PRETENDER.replace("PYTHON", sys.executable))
        (tmp_path / name).chmod(0o755)

    def run(**env: str) -> tuple[int, str, list[str]]:
        (tmp_path / "calls").write_text("")
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SOURCE": "a/b", "SIZES": "demo", **env}
        done = subprocess.run(
            ["bash", "experiment.sh"],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout, (tmp_path / "calls").read_text().splitlines()

    return run


def scripts(calls: list[str]) -> list[str]:
    return [call.split()[0] for call in calls]


TRAINED = ["train.py", "eval_ppl.py", "sample.py"]
BEFORE, AFTER = ["benchmarks.plan"], ["verdict", "verdict"]


def test_everything_in_order_and_nothing_twice(experiment):
    code, said, calls = experiment()
    assert code == 0 and said.endswith("the verdict: out/b/report.html\n")
    assert scripts(calls) == [*BEFORE, "prepare.py", *TRAINED, *TRAINED, *AFTER]
    smoke = "train.py config/demo.py --out_dir=out/b/smoke-demo --data_dir=data/b --max_steps=100"
    assert calls[2] == f"{smoke} --warmup_steps=10"
    _, _, calls = experiment()
    assert scripts(calls) == [*BEFORE, *AFTER]


@pytest.mark.parametrize(
    ("stage", "again"),
    [
        ("prepare.py", ["prepare.py", *TRAINED, *TRAINED]),
        ("train.py", [*TRAINED, *TRAINED]),
        ("sample.py", ["sample.py", *TRAINED]),
        ("verdict", []),
    ],
)
def test_it_goes_on_where_it_was_killed(experiment, stage, again):
    code, said, calls = experiment(DIES_AT=stage)
    assert code == 9 and scripts(calls)[-1] == stage and "the verdict:" not in said
    code, _, calls = experiment()
    assert code == 0 and scripts(calls) == [*BEFORE, *again, *AFTER]


def test_a_training_that_a_signal_stopped_is_not_measured(experiment):
    code, said, calls = experiment(STEP="000004")  # train.py saves, and ends well
    assert code == 1 and scripts(calls)[-1] == "train.py"
    assert said.endswith("out/b/smoke-demo was stopped: run this again\n")


def test_seeds_sizes_gpus_and_a_control(experiment):
    flags = {"SEEDS": "42 43", "SIZES": "500m 1b", "GPUS": "2", "CONTROL": "web.jsonl"}
    code, _, calls = experiment(**flags, TRAIN="--dtype=bfloat16 --epochs=2", VERDICT="--tasks=")
    assert code == 0
    assert (
        calls.count("torchrun --standalone --nproc_per_node=2 -- eval_ppl.py --run=out/b/1b-43")
        == 1
    )
    assert "prepare.py --source=web.jsonl --data_dir=data/web --max_bytes=99" in calls
    plan = "benchmarks.plan config/1b.py --data_dir=data/b --n_devices=2"
    assert f"{plan} --dtype=bfloat16 --epochs=2" in map(str.strip, calls)
    control = "train.py config/1b.py --out_dir=out/b/1b-control --data_dir=data/web"
    assert f"{control} --dtype=bfloat16 --epochs=2 --max_steps=6" in calls
    verdicts = [call.strip() for call in calls if "verdict" in call]
    runs = "--run=out/b/1b-42 --run=out/b/1b-43 --control=out/b/1b-control"
    assert verdicts[1] == f"verdict {runs} --output_dir=out/b/1b --tasks="
    assert verdicts[2].count("--run=") == 4 and verdicts[2].endswith("report --output_dir=out/b")


def test_edited_descriptions_are_said_or_mended(experiment, tmp_path):
    experiment()
    (tmp_path / "out/b/demo-42/config.json").write_text("{")
    code, _, calls = experiment()
    assert code == 0 and scripts(calls) == [*BEFORE, "train.py", *AFTER]
    (tmp_path / "data/b/meta.json").write_text('{"splits": 3}')
    code, said, calls = experiment(CONTROL="web.jsonl")
    assert code == 1 and scripts(calls) == BEFORE
    assert said.endswith(
        "meta.json does not tell the bytes of text: remove it, and run this again\n"
    )
