import json
import math
import time

import pytest
import torch

from nanosynth.training.log import Console, MetricsFile, Outputs, RunLog
from tiny import CPU


def run_log(outputs=None, peak: float | None = 1e15) -> RunLog:
    return RunLog(outputs, device=CPU, n_devices=4, peak=peak)


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
    log = run_log(Outputs(file, Console(0, 10), None), peak=None)
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


def test_a_resumed_file_loses_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 0})
    size = file.synced_size()
    assert size == path.stat().st_size > 0
    file.write({"step": 1})
    file.close()
    file = MetricsFile(path, size)
    file.write({"step": 10})
    assert file.synced_size() == path.stat().st_size
    file.close()
    assert path.read_text() == '{"step": 0}\n{"step": 10}\n'


def test_a_file_shorter_than_the_checkpoint_knows_is_not_padded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    MetricsFile(path, 1000).close()
    assert path.read_text() == '{"step": 0}\n'


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("old\n")
    MetricsFile(path, 0).close()
    assert path.read_text() == ""
