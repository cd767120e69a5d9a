import json
import time

import pytest
import torch

from benchmarks import plan, timing
from benchmarks.step import PHASES, StepConfig, main, random_bins, throughput
from model import GPT
from nanosynth import UserError, settings
from nanosynth.data import bins
from tiny import CPU, RUN

SHAPE = {**RUN, "untimed_steps": 1, "timed_steps": 8, "log_interval": 3}


def run_bench(*argv: str, **changes) -> None:
    flags = [f"--{name}={value}" for name, value in {**SHAPE, **changes}.items()]
    main(settings.load(StepConfig, [*argv, *flags], "-m benchmarks.step", config_file=True))


def test_throughput_by_hand():
    found = throughput(
        [1.0, 2.0, 3.0, 4.0, 10.0],
        n_tokens=1000,
        n_flops=8e12,
        n_devices=2,
        peak=10e12,
        matmul=4e12,
    )
    # Five steps in 20 seconds; between the ordered values the percentiles are linear.
    assert found["tokens_per_second"] == pytest.approx(250.0)
    assert found["step_seconds"] == pytest.approx({"median": 3.0, "p10": 1.4, "p90": 7.6})
    assert found["flops_per_second"] == pytest.approx(2e12)
    assert found["mfu"] == pytest.approx(0.1)
    assert found["mfu_of_matmul"] == pytest.approx(0.25)


def test_no_mfu_without_a_known_peak():
    shape = {"n_tokens": 1, "n_flops": 1.0, "n_devices": 1}
    assert throughput([1.0, 1.0], **shape, peak=None, matmul=2.0)["mfu"] is None


@pytest.mark.parametrize(
    ("operators", "wanted"),
    [
        (
            {
                "aten::_scaled_dot_product_cudnn_attention",
                "aten::_scaled_dot_product_cudnn_attention_backward",
                "aten::scaled_dot_product_attention",
                "aten::mm",
            },
            "cudnn_attention",
        ),
        ({"aten::_scaled_dot_product_flash_attention"}, "flash_attention"),
        ({"aten::_scaled_dot_product_attention_math"}, "attention_math"),
        (
            {
                "aten::_scaled_dot_product_efficient_attention",
                "aten::_scaled_dot_product_flash_attention",
            },
            "efficient_attention, flash_attention",
        ),
        ({"aten::mm"}, "none: plain matrix products"),
    ],
)
def test_attention_backend(operators, wanted):
    assert timing.attention_backend(operators) == wanted


def test_a_profiled_step_shows_the_backend_that_torch_takes():
    q = torch.randn(1, 2, 8, 16)
    with torch.profiler.profile() as profiler:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    fused = {event.name for event in profiler.events()}
    assert timing.attention_backend(fused) == "flash_attention_for_cpu"
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.profiler.profile() as profiler, math_only:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    plain = {event.name for event in profiler.events()}
    assert timing.attention_backend(plain) == "attention_math"


def test_the_clock_adds_up_intervals_of_a_name():
    clock = timing.Clock(CPU)
    for name in ("data", "forward", "data"):
        clock.mark(name)
        time.sleep(0.02)
    clock.mark()
    intervals = clock.intervals()
    assert [interval.name for interval in intervals] == ["data", "forward", "data"]
    assert all(0.02 <= interval.host == interval.device for interval in intervals)
    totals = timing.by_name(intervals)
    assert totals["data"].host == pytest.approx(intervals[0].host + intervals[2].host)
    assert totals["forward"].host == intervals[1].host


def test_the_matrix_product_is_timed_one_by_one():
    seconds = timing.matmul_seconds(CPU, torch.float32, 256, 5)
    assert len(seconds) == 5 and min(seconds) > 0


def test_random_bins_can_be_read(tmp_path):
    split = bins.Split(random_bins(str(tmp_path / "data"), 16, n_rows=5), "train")
    assert split.n_rows(16) == 5
    assert bins.count_targets(split, list(range(5)), 16, "assistant") == 5 * 8


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_bench_measures_the_step(loss_on, tmp_path, capsys):
    run_bench(json=str(tmp_path / "a.json"), profile=str(tmp_path / "b"), loss_on=loss_on)
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["tokens_per_step"] == 64 and result["timed_steps"] == 8
    step = result["step_seconds"]
    assert 0 < step["p10"] <= step["median"] <= step["p90"]
    assert 64 / step["p90"] / 2 < result["tokens_per_second"] < 2 * 64 / step["p10"]
    assert list(result["phases"]) == list(PHASES)
    spent = {name: phase["host"] for name, phase in result["phases"].items()}
    assert min(spent.values()) > 0
    assert step["p10"] / 3 < sum(spent.values()) < 3 * step["p90"]
    assert result["attention"] == "flash_attention_for_cpu"
    assert result["compile_seconds"] is None and result["mfu"] is None
    assert 0 < result["mfu_of_matmul"] < 1
    assert result["dearest"] and (tmp_path / "b" / "trace.json").stat().st_size > 1000
    said = capsys.readouterr().out
    assert f"{result['tokens_per_second']:,.0f} over 8 steps" in said and "optimizer" in said


def test_the_step_is_compiled_where_training_is(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(GPT, "compile", lambda model: compiled.append(model))
    run_bench(json=str(tmp_path / "a.json"), compile=True, timed_steps=2)
    assert len(compiled) == 1
    assert json.loads((tmp_path / "a.json").read_text())["compile_seconds"] is not None


def test_the_plan_of_a_measurement(monkeypatch):
    found = []
    monkeypatch.setattr(plan, "main", found.append)
    run_bench("--plan", n_layer=5)
    assert isinstance(found[0], plan.PlanConfig) and found[0].n_layer == 5


def test_random_tokens_unless_the_command_line_names_bins(tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(f"data_dir = {str(tmp_path / 'missing')!r}\n")
    run_bench(str(file))
    with pytest.raises(UserError, match="no prepared data"):
        run_bench(data_dir=str(tmp_path / "missing"))


def test_the_command_line():
    with pytest.raises(UserError, match="did you mean 'timed_steps'?"):
        run_bench("--timed_step=3")
