import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks import plan
from model import Block, GPTConfig
from nanosynth import UserError
from tiny import RUN

SHAPE = GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=32, vocab_size=1024)


def config_of(**changes) -> plan.PlanConfig:
    return plan.PlanConfig(**{**RUN, "data_dir": "missing", **changes})


def test_what_a_block_keeps_by_hand():
    with FakeTensorMode():
        x = torch.empty(4, 32, 64, requires_grad=True)
        found = plan.trace(Block(SHAPE, 0), x, dtype=torch.float16)
    # Of each token and channel: x in float32; in float16 both LayerNorms' results, q, k and v, the
    # heads' results, their projection, and the MLP before and after its GELU, four times as wide.
    per_token = 64 * (4 + 2 * (2 + 3 + 1 + 1 + 4 + 4))
    per_token += 4 * (2 * 2 + 2)  # mean and deviation of two LayerNorms, a log-sum of each head
    weights = 2 * 12 * 64**2  # the matrices in float16
    assert found.saved == pytest.approx(4 * 32 * per_token + weights, rel=0.02)
    assert found.saved < found.backward < 2 * found.saved


def test_fused_results_take_no_memory():
    def two_products(a, b, c):
        return ((a @ b).relu() + 1) @ c

    sizes = {"a": (10, 20), "b": (20, 30), "c": (30, 5)}
    tensors = [torch.empty(shape) for shape in sizes.values()]
    graph = make_fx(two_products, tracing_mode="fake")(*tensors).graph
    # a, b, c and the first product; then the first, c and what comes of relu and add.
    assert plan.peak_bytes(graph, set()) == 4 * (200 + 600 + 150 + 300)
    inputs = {node.name for node in graph.find_nodes(op="placeholder")}
    assert plan.peak_bytes(graph, inputs) == 4 * (300 + 300)


def test_a_steps_peak():
    compiled, checkpointed = plan.step_bytes(SHAPE, 16, torch.float16)
    # Of three blocks and what follows them: blocks' inputs, and the logits with their gradient.
    inputs, logits = 3 * 16 * 32 * 64 * 4, 16 * 32 * 1024 * 2
    assert inputs + 2 * logits < checkpointed < inputs + 3 * logits
    assert compiled - checkpointed == pytest.approx(3 * 16 * 32 * 64 * (34 - 4), rel=0.2)


def test_what_stays_by_hand():
    matrices, all_others = 3 * 12 * 64**2, 1024 * 64 + 32 * 64 + 3 * 13 * 64 + 2 * 64
    assert plan.state_bytes(SHAPE, "adamw") == 16 * (matrices + all_others)
    assert plan.state_bytes(SHAPE, "muon") == 12 * matrices + 16 * all_others


def test_hours_by_hand():
    config = config_of(
        block_size=1000, eval_interval=10, eval_rows=36, start_seconds=90.0, n_devices=8
    )
    found = plan.hours(config, 100, rate=4000.0)
    assert found.training == pytest.approx(100 * 4 * 1000 / 4000 / 3600)
    assert found.evaluating == pytest.approx(10 * 36 / 3 * 1000 / 4000 / 3600)
    assert found.starting == pytest.approx(8 * 90 / 3600)
    assert found.whole == pytest.approx(found.training + found.evaluating + found.starting)


def test_the_report(tiny_bins, monkeypatch, capsys):
    """At 16 tokens/s a step of 4 rows of 16 takes 4 s: 900 steps an hour."""
    monkeypatch.setattr(plan, "step_bytes", lambda shape, n_rows, dtype: (n_rows * 10**7, 10**7))
    changes = {
        "rate": 16.0,
        "start_seconds": 0.0,
        "n_devices": 1,
        "eval_rows": 0,
        "max_steps": 1800,
    }
    plan.main(config_of(**changes))
    said = capsys.readouterr().out
    assert "1,800 of 64 tokens, of 412,000,000 (assumed: no bins in data_dir)" in said
    assert "16 a GPU (assumed)" in said and "2.00: 2.00 training" in said
    assert "over the budget of 1, in which fit --max_steps=900" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("|   ")]
    # Of the sizes those that a step of 4 rows divides in, and the run's own.
    assert [row[1] for row in rows] == ["2", "4"] and "too much" not in said
    said = plan.report(config_of(**changes, data_dir=tiny_bins, memory_gb=0.05))
    assert f"({tiny_bins})" in said and said.count("(too much)") == 1


def test_gpus_that_are_too_many(monkeypatch):
    monkeypatch.setattr(plan, "step_bytes", lambda *_: (1, 1))
    changes = {"rate": 1e9, "start_seconds": 7200.0, "n_devices": 2}
    assert "which starting alone takes; use fewer GPUs" in plan.report(config_of(**changes))
    with pytest.raises(UserError, match="4 rows a step do not divide over 8 GPUs"):
        plan.report(config_of())


def test_an_unknown_gpu_is_refused():
    with pytest.raises(UserError, match="--gpu=H9; wanted one whose peak is known: B200, H200"):
        plan.report(config_of(gpu="H9"))
