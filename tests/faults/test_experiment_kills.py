"""experiment.sh whole, with every script as it is: killed in three stages and run again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faults import rig
from nanosynth.data import bins
from tiny import REPO, chat_row, read_metrics, write_jsonl

STAGES = {  # what the log says when it is killed
    "in prepare.py": "prepare:",
    "in training": "saved out/rows/demo-42/step_000006",
    "in the verdict": "measuring answers",
}
FLAGS = {
    "SOURCE": "rows.jsonl",
    "SIZES": "demo",
    "TRAIN": "--max_steps=12 --n_embd=16 --n_layer=1 --warmup_steps=2 --compile=False "
    "--eval_interval=6 --save_interval=6 --eval_rows=8",
    "VERDICT": "--tasks= --max_new_tokens=8 --num_prompts=10",
}


def prepare_folder(folder: Path) -> Path:
    """A checkout by links, with data and runs of its own, and 200 conversations."""
    (folder / "data").mkdir(parents=True)
    for path in REPO.iterdir():
        if path.name not in ("data", "out") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    for path in ("tasks", "gpt2.tiktoken"):
        (folder / "data" / path).symlink_to(REPO / "data" / path)
    write_jsonl(
        folder / "rows.jsonl", [chat_row(f"What is {n}?", f"It is {n}.") for n in range(200)]
    )
    return folder


def start(folder: Path, log: Path) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **FLAGS}
    with open(log, "w") as file:
        return subprocess.Popen(
            ["bash", "experiment.sh"],
            cwd=folder,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def results(folder: Path) -> dict:
    """What two experiments have in common, however often they were killed."""
    out = folder / "out" / "rows"
    found = json.loads((out / "report.json").read_text())
    measured = [figure for figure in found["criteria"] if figure["criterion"] != "stability"]
    return {
        "data": bins.read_meta(str(folder / "data" / "rows"))["files"],
        "steps": rig.progress(read_metrics(out / "demo-42")),
        "criteria": [(figure["criterion"], figure["figure"]) for figure in measured],
        "answers": (out / "demo-42" / "task_generations.jsonl").read_text(),
    }


def test_killed_in_three_stages(work, tally, campaign):
    if not campaign:
        pytest.skip("takes minutes; make faults has it")
    row = tally("experiment.sh: SIGKILL in three stages, run again")
    whole, killed = prepare_folder(work / "whole"), prepare_folder(work / "killed")
    assert start(whole, work / "log").wait(900) == 0, (work / "log").read_text()[-2000:]
    for stage, said in STAGES.items():
        log = work / f"log {stage}"
        process = start(killed, log)
        rig.wait(lambda log=log, said=said: said in log.read_text(), 600, log)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        row.land(stage)
    assert start(killed, work / "log").wait(900) == 0, (work / "log").read_text()[-2000:]
    wanted, found = results(whole), results(killed)
    row.trial([f"{name} differs" for name in wanted if wanted[name] != found[name]])
    row.check()
