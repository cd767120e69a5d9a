import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanosynth.training.log import Console, MetricsFile, RunLog, commit, device_hours, write_config
from tiny import ALONE, train_run

FOUR = replace(ALONE, size=4)


def run_log(*outputs, peak: float | None = 1e15) -> RunLog:
    return RunLog(*outputs, world=FOUR, peak=peak)


def stats(loss: float = 2.0, grad_norm: float = 1.0, scale: float = 8.0, n_skipped: float = 0.0):
    return torch.tensor([loss, grad_norm, scale, n_skipped])


def test_throughput_and_mfu_come_from_one_clock():
    log = run_log()
    for step in range(3):
        log.train({"step": step, "rows": []}, stats(), n_tokens=1000, flops=5e9)
    records = log.flush(0)
    assert [record["step"] for record in records] == [0, 1, 2]
    per_second = records[0]["tokens_per_second"]
    # 5e6 FLOPs a token on four devices of 1e15 FLOP/s.
    assert records[0]["mfu"] == pytest.approx(per_second * 5e6 / 4e15)
    assert log.flush(0) == []


def test_throughput_is_tokens_over_elapsed_time():
    log = run_log()
    time.sleep(0.2)
    log.restart_clock()  # an evaluation is left out, and so is what the flush before has counted
    for _ in range(2):
        started = time.perf_counter()
        for _ in range(2):
            log.train({"step": 0, "rows": []}, stats(), n_tokens=1000, flops=1e12)
        time.sleep(0.1)
        record = log.flush(0)[0]
        elapsed = time.perf_counter() - started
        assert 2000 / elapsed < record["tokens_per_second"] < 2000 / 0.1
        assert 2e12 / elapsed < record["mfu"] * 4 * 1e15 < 2e12 / 0.1


def test_a_record(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    log = run_log(file, peak=None)
    log.train({"step": 0, "lr": 0.5, "rows": [1]}, stats(), n_tokens=10, flops=1.0)
    bad = stats(loss=math.nan, grad_norm=math.inf, n_skipped=2.0)
    log.train({"step": 1, "lr": 0.5, "rows": [2, 3]}, bad, n_tokens=10, flops=1.0)
    log.flush(0)
    log.val(2, 1.5, 0.1)
    log.close()

    def refuse(name):
        raise ValueError(name)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second, val = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["split"], first["loss"], first["lr"], first["skipped"]) == ("train", 2.0, 0.5, 0)
    assert first["loss_scale"] == 8.0 and first["grad_norm"] == 1.0 and first["mfu"] is None
    assert second["skipped"] == 2 and second["loss"] is None and second["grad_norm"] is None
    assert second["rows"] == [2, 3]
    assert (val["step"], val["split"], val["loss"]) == (2, "val", 1.5)


def test_the_console_tells_how_the_run_is(capfd):
    """The last evaluation beside the loss, and how many steps were skipped, also between lines."""
    console = Console(0, 10)
    log = RunLog(None, console, world=FOUR, peak=None, budget_hours=1.0)
    for step, n_skipped in enumerate((0.0, 1.0, 2.0, 0.0)):
        fields = {"step": step, "lr": 0.5, "rows": []}
        log.train(fields, stats(n_skipped=n_skipped), n_tokens=10, flops=1.0)
    log.flush(0)
    log.val(4, 1.5, 0.1)
    log.train({"step": 4, "lr": 0.5, "rows": []}, stats(), n_tokens=10, flops=1.0)
    log.flush(0)
    log.close()
    first, evaluation, second = capfd.readouterr().out.splitlines()
    assert "| loss 2.0000 | " in first and "| 2 skipped |" in first and "tokens/s" in first
    assert "| 0.000 of 1 device-hours |" in first
    assert evaluation == "step      4: validation loss 1.5000 (0.1s)"
    assert "| loss 2.0000 (validation 1.5000) | " in second and "| 2 skipped |" in second


def test_a_resumed_file_loses_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 0})
    size = file.size()
    assert size == path.stat().st_size > 0
    file.sync(size)
    file.write({"step": 1})
    file.close()
    file = MetricsFile(path, size)
    file.write({"step": 10})
    assert file.size() == path.stat().st_size
    file.close()
    assert path.read_text() == '{"step": 0}\n{"step": 10}\n'


def test_a_file_shorter_than_the_checkpoint_knows_is_not_padded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    MetricsFile(path, 1000).close()
    assert path.read_text() == '{"step": 0}\n'


def test_a_line_that_was_cut_by_hand_takes_no_record_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st')
    file = MetricsFile(path, 1000)
    file.write({"step": 2})
    assert file.size() == path.stat().st_size
    file.close()
    assert path.read_text() == '{"step": 0}\n{"st\n{"step": 2}\n'


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("old\n")
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


def starts(path: Path, first_step: int = 0) -> list[dict]:
    """Those that config.json has after one more."""
    write_config(path, {"world_size": 8, "device": "x"}, first_step=first_step)
    return json.loads(path.read_text())["starts"]


def test_a_run_keeps_its_starts(tiny_bins, tmp_path):
    for max_steps in (3, 6):
        train_run(tiny_bins, tmp_path / "x", max_steps=max_steps, save_interval=3)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert [start["first_step"] for start in config["starts"]] == [0, 3]
    assert all(start["command"] and start["date"] for start in config["starts"])
    assert config["torch"] == torch.__version__ and config["python"]
    first, second = (start["id"] for start in config["starts"])  # wandb goes on with the same run
    assert first == second != starts(tmp_path / "other.json")[0]["id"] and len(first) == 16


def test_a_torn_config_is_kept_beside_the_new_one(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"starts": [{"comm')
    assert [start["first_step"] for start in starts(path, 3)] == [3]
    assert "config.json.damaged" in capsys.readouterr().out
    assert (tmp_path / "config.json.damaged").read_text() == '{"starts": [{"comm'


def test_the_command_is_kept_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # a script, no module
    monkeypatch.setattr("sys.argv", ["/a/train.py", "config/500m.py", "--out_dir=out/a b"])
    (start,) = starts(tmp_path / "config.json")
    assert start["command"] == "train.py config/500m.py '--out_dir=out/a b'"


def test_the_commit_is_dirty_where_files_differ_and_none_without_git(tmp_path):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x")
    assert commit(tmp_path / "missing") is None
    subprocess.run([*git, "init", "-q"], check=True)
    assert commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    clean = commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == f"{clean}-dirty"


def test_starts_of_a_broken_config_are_forgotten(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert len(starts(tmp_path / "config.json")) == 1
    assert [start["first_step"] for start in starts(tmp_path / "config.json", 5)] == [0, 5]


def test_hours_over_the_budget_are_foretold_once_and_not_from_the_first_steps():
    console = Console(0, 4)
    log = RunLog(
        None,
        console,
        world=replace(ALONE, size=8),
        peak=None,
        budget_hours=2.0,
        spent_hours=1.5,
    )
    said = []
    console.say = said.append
    for step in range(4):
        log.train({"step": step, "lr": 0.5, "rows": []}, stats(), n_tokens=10, flops=1.0)
        time.sleep(0.01)
        log.flush(steps_left=30_000)  # 300 s or more of 8 devices: 0.67 device-hours
        assert len(said) == (step > 0)
    assert "device-hours, more than budget_hours=2" in said[0]
    log.close()


HOURS = ("1" + "0" * 400, "1e999", "NaN", "-1", "true", '"9"', "null")
EDITED = [*(f'{{"device_hours": {hours}}}' for hours in HOURS), "[" * 100_000, "{}", "x", "[]"]


@pytest.mark.parametrize("line", EDITED)
def test_device_hours_of_an_edited_file(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"device_hours": 2.5}}\n{line}\n')
    assert device_hours(tmp_path / "metrics.jsonl") == 2.5
