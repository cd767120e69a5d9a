import errno
import functools
import json
import math
import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch

import eval_ppl
import train
from nanosynth import UserError, checkpoint, settings
from nanosynth.data import bins
from nanosynth.device import peak_flops
from nanosynth.training import optim
from tiny import (
    ALONE,
    RUN,
    losses,
    random_ids,
    read_metrics,
    run_of,
    tiny_model,
    train_run,
    write_bins,
)
from verdict import figures, runs

# Float32 on a CPU. If a change is meant to move them, renew them with what the failing test prints.
GOLDEN_LOSSES = [4.171517, 4.115343, 4.031237, 3.987547, 3.88429]


def make_scaler(dtype: torch.dtype = torch.float32) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)


def make_optimizer(model, learning_rate: float = 1e-2, name: str = "adamw"):
    optimizer = optim.build_optimizer(
        name, model, weight_decay=0.01, betas=(0.9, 0.95), world=ALONE
    )
    optim.set_learning_rate(optimizer, learning_rate)
    return optimizer


def descent(model) -> torch.optim.Optimizer:
    """Plain gradient descent of rate 1: the step is the gradient, whose size Adam would hide."""
    return torch.optim.SGD(model.parameters(), lr=1.0, fused=True)


def random_batch(seed: int, rows: int = 4) -> bins.Batch:
    return bins.Batch(
        random_ids(rows, 16, seed=seed), random_ids(16 * rows, seed=seed + 1000), None
    )


def step(model, optimizer, batches, *, scaler=None, guard=None, dtype=torch.float32, **changes):
    """[loss, grad_norm, loss_scale, n_skipped] of one train_step over these micro-batches."""
    run = run_of(
        model,
        optimizer,
        len(batches),
        config=train.TrainConfig(**changes),
        scaler=scaler or make_scaler(),
        guard=guard or optim.SpikeGuard(0.0, ALONE.device),
        dtype=dtype,
    )
    return train.train_step(run, enumerate(batches), sum(b.targets.numel() for b in batches))


def state_of(model, optimizer) -> list[torch.Tensor]:
    moments = torch.utils._pytree.tree_leaves(optimizer.state_dict())
    tensors = [value for value in moments if isinstance(value, torch.Tensor)]
    return [value.detach().clone() for value in (*model.parameters(), *tensors)]


def test_golden_losses_of_five_steps():
    model = tiny_model()
    optimizer = make_optimizer(model)
    found = [
        step(model, optimizer, [random_batch(number % 2), random_batch(2)])[0].item()
        for number in range(5)
    ]
    assert found == pytest.approx(GOLDEN_LOSSES, rel=1e-4), (
        "the first losses moved; if that is meant, set GOLDEN_LOSSES in tests/test_train.py to\n"
        f"{[round(loss, 6) for loss in found]}"
    )


def test_step_learns_a_batch():
    model = tiny_model(n_embd=32)
    optimizer = make_optimizer(model)
    found = [step(model, optimizer, [random_batch(0)])[0].item() for _ in range(60)]
    assert found[0] == pytest.approx(math.log(64), rel=0.02) and found[-1] < 0.5 * found[0]


def test_accumulation_4x1_equals_1x4_with_uneven_masks():
    """A mean of micro-batch means would weigh the row of one target as much as that of sixteen."""
    ids, targets = random_ids(4, 16), random_ids(64, seed=1)
    places = [[0], list(range(16)), [2, 3, 5], [15, 1]]
    rows = [
        bins.Batch(ids[b : b + 1], targets[[16 * b + t for t in chosen]], torch.tensor(chosen))
        for b, chosen in enumerate(places)
    ]
    index = torch.tensor([16 * b + t for b, chosen in enumerate(places) for t in chosen])
    whole = bins.Batch(ids, targets[index], index)
    results, weights = [], []
    for batches in (rows, [whole]):
        model = tiny_model()
        result = step(model, descent(model), batches)
        results.append(result)
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    mean_of_means = sum(tiny_model()(*row).mean() for row in rows) / 4
    assert abs(results[0][0] - mean_of_means) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("planted", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_non_finite_gradient_leaves_weights_and_moments(dtype, planted, name):
    model = tiny_model()
    optimizer, scaler = make_optimizer(model, name=name), make_scaler(dtype)
    first = step(model, optimizer, [random_batch(0)], scaler=scaler, dtype=dtype)
    assert first[3] == 0 and first[2] == (1024 if dtype == torch.float16 else 1)
    before = state_of(model, optimizer)
    handle = model.transformer.h[0].mlp.c_fc.weight.register_hook(
        lambda gradient: gradient * planted
    )
    bad = step(model, optimizer, [random_batch(1), random_batch(2)], scaler=scaler, dtype=dtype)
    handle.remove()
    assert bad[3] == 1 and not bad[1].isfinite() and bad[0].isfinite()
    for old, new in zip(before, state_of(model, optimizer), strict=True):
        assert torch.equal(old, new)
    good = step(model, optimizer, [random_batch(1)], scaler=scaler, dtype=dtype)
    assert good[3] == 0 and good[2] == (512 if dtype == torch.float16 else 1)
    assert not torch.equal(before[0], state_of(model, optimizer)[0])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loss_spike_leaves_weights_and_moments(name):
    model = tiny_model()
    optimizer, guard = make_optimizer(model, name=name), optim.SpikeGuard(8.0, ALONE.device)
    for number in range(guard.WINDOW):
        guard.note(torch.tensor(1.0 + 0.01 * (number % 2)), torch.tensor(True))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    spike = step(model, optimizer, [random_batch(0)], guard=guard)  # its loss is ln 64
    assert spike[3] == 1 and spike[1].isfinite()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
    calm = step(model, optimizer, [random_batch(0)], guard=optim.SpikeGuard(0.0, ALONE.device))
    assert calm[3] == 0 and not torch.equal(before[0], next(model.parameters()))


def test_dropout_depends_on_the_micro_batch_and_the_seed_alone():
    model = tiny_model(dropout=0.5)
    optimizer = make_optimizer(model, learning_rate=0.0)
    found = []
    for torch_seed, seed in ((1, 42), (2, 42), (1, 43)):
        torch.manual_seed(torch_seed)
        found.append(step(model, optimizer, [random_batch(0)], seed=seed)[0].item())
    assert found[0] == found[1] != found[2]


def test_gradients_are_clipped():
    weights = []
    for grad_clip in (0.0, 0.01):
        model = tiny_model()
        before = next(model.parameters()).detach().clone()
        norm = step(model, descent(model), [random_batch(0)], grad_clip=grad_clip)[1].item()
        weights.append((next(model.parameters()) - before, norm))
    (free, norm), (clipped, same_norm) = weights
    assert norm == same_norm > 0.01
    torch.testing.assert_close(clipped, free * 0.01 / norm, rtol=1e-3, atol=1e-8)


def test_metrics_have_every_step_and_their_fields(run_dir):
    records = read_metrics(run_dir)
    trained = [record for record in records if record["split"] == "train"]
    assert [record["step"] for record in trained] == list(range(6))
    assert [record["step"] for record in records if record["split"] == "val"] == [3, 6]
    wanted = {"loss", "lr", "grad_norm", "loss_scale", "tokens_per_second", "mfu", "memory_gb"}
    assert all(record.keys() >= {*wanted, "skipped", "epoch"} for record in trained)
    assert trained[0]["lr"] == RUN["learning_rate"] / 2 and trained[-1]["lr"] == pytest.approx(1e-3)
    assert trained[0]["loss"] == pytest.approx(math.log(50_304), rel=0.02)
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.3


def test_another_eval_interval_leaves_training_as_it_is(tiny_bins, tmp_path, run_dir):
    other = train_run(tiny_bins, tmp_path / "run", eval_interval=1, save_interval=6)
    assert losses(other) == losses(read_metrics(run_dir))
    assert losses(other, "val")[2::3] == losses(read_metrics(run_dir), "val")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_three_steps_and_three_after_a_restart_equal_six(tiny_bins, tmp_path, dtype, optimizer):
    changes = {"dropout": 0.2, "dtype": dtype, "save_interval": 3, "eval_interval": 3}
    changes["optimizer"] = optimizer
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = train_run(tiny_bins, whole, **changes)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "step_000006")
    os.unlink(parts / "latest")
    found = train_run(tiny_bins, parts, **changes)
    assert [(r["step"], r["split"], r.get("loss")) for r in found] == [
        (r["step"], r["split"], r.get("loss")) for r in wanted
    ]
    paths = [checkpoint.folder(run, 6) for run in (whole, parts)]
    models = [checkpoint.read_model(path, checkpoint.verify(path)) for path in paths]
    states = [checkpoint.read_train_state(path) for path in paths]
    for tensors in (models, [state["guard"] for state in states]):
        for name, tensor in tensors[0].items():
            assert torch.equal(tensor, tensors[1][name]), name
    moments = [torch.utils._pytree.tree_leaves(state["optimizer"]) for state in states]
    assert any(isinstance(value, torch.Tensor) for value in moments[0])
    for value, wanted_value in zip(*moments, strict=True):
        is_tensor = isinstance(value, torch.Tensor)
        assert torch.equal(value, wanted_value) if is_tensor else value == wanted_value
    assert states[0]["scaler"] == states[1]["scaler"]
    assert bool(states[0]["scaler"]) == (dtype == "float16")


@pytest.mark.parametrize("first", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("second", ["float32", "bfloat16", "float16"])
def test_a_run_goes_on_in_another_dtype(tiny_bins, tmp_path, first, second):
    train_run(tiny_bins, tmp_path / "run", dtype=first, max_steps=3)
    records = train_run(tiny_bins, tmp_path / "run", dtype=second)
    assert [record["step"] for record in records if record["split"] == "train"] == list(range(6))
    scales = [record["loss_scale"] for record in records if record["split"] == "train"]
    assert [scales[0] > 1, scales[-1] > 1] == [first == "float16", second == "float16"]


def test_deterministic(tiny_bins, tmp_path, monkeypatch, run_dir):
    """Torch is told so before anything is computed; on a CPU nothing changes."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    build = train.GPT

    def built(config):
        assert torch.are_deterministic_algorithms_enabled() and torch._inductor.config.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        return build(config)

    monkeypatch.setattr(train, "GPT", built)
    try:
        records = train_run(tiny_bins, tmp_path / "run", deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch._inductor.config.deterministic = False
    assert losses(records) == losses(read_metrics(run_dir))


def test_a_complete_run_is_left_alone(tiny_bins, run_dir, tmp_path, capfd):
    out_dir = shutil.copytree(run_dir, tmp_path / "run")
    assert train_run(tiny_bins, out_dir)[:-1] == read_metrics(run_dir)[:-1]
    assert "the run is complete: 6 steps" in capfd.readouterr().out
    assert checkpoint.steps(out_dir) == checkpoint.steps(run_dir)


def test_a_complete_run_makes_up_for_deletions_that_were_cut_short(tiny_bins, tmp_path):
    train_run(tiny_bins, tmp_path, save_interval=2)
    assert checkpoint.steps(tmp_path) == [2, 4, 6]  # as a kill leaves them before 2 is deleted
    train_run(tiny_bins, tmp_path, save_interval=2, keep_last=2)
    assert checkpoint.steps(tmp_path) == [4, 6]


def test_device_hours_are_counted_to_the_end_and_over_a_resume(tiny_bins, tmp_path, capfd):
    """The report and the console say the same."""
    out_dir = tmp_path / "run"
    first = train_run(tiny_bins, out_dir, save_interval=3, max_steps=5, budget_hours=1e-9)
    assert "over the budget of 1e-09" in capfd.readouterr().out
    shutil.rmtree(out_dir / "step_000005")  # two steps will be taken back; their time was spent
    records = train_run(tiny_bins, out_dir)
    hours = [record["device_hours"] for record in records if record["step"] >= 3]
    assert hours == sorted(hours) and hours[0] > first[-1]["device_hours"]
    assert 0 < first[0]["device_hours"] <= first[-1]["device_hours"] < 1
    assert records[-1] == {"step": 6, "split": "end", "device_hours": hours[-1]}
    said = capfd.readouterr().out
    assert f"{hours[-1]:.3f} device-hours in all, within the budget of 1" in said
    assert figures.figures(runs.read(str(out_dir)))["device-hours"] == hours[-1]


def test_a_damaged_older_checkpoint_does_not_stop_a_run(tiny_bins, run_dir, tmp_path):
    out_dir = shutil.copytree(run_dir, tmp_path / "run")
    (out_dir / "step_000003" / checkpoint.META).write_text("torn")
    records = train_run(tiny_bins, out_dir, max_steps=8)
    assert records[-1]["step"] == 8 and checkpoint.steps(out_dir)[-1] == 8


@pytest.mark.parametrize("changes", [{"seed": 1}, {"rows_per_step": 2}, {"loss_on": "assistant"}])
def test_a_run_of_another_identity_is_refused(tiny_bins, run_dir, tmp_path, changes):
    out_dir = shutil.copytree(run_dir, tmp_path / "run")
    with pytest.raises(UserError, match="was made with .* this run has .*--out_dir"):
        train_run(tiny_bins, out_dir, **changes)
    assert checkpoint.steps(out_dir) == checkpoint.steps(run_dir)


def test_the_activation_is_the_models_own_and_old_runs_have_tanh(tiny_bins, run_dir, tmp_path):
    """A run saved before models had the setting goes on as it was, and as nothing else."""
    out_dir = shutil.copytree(run_dir, tmp_path / "run")
    for path in out_dir.glob("step_*"):
        meta = json.loads((path / checkpoint.META).read_text())
        del meta["identity"]["model"]["activation"], meta["meta_sha256"]
        (path / checkpoint.META).write_bytes(checkpoint._serialise(meta))
    with pytest.raises(
        UserError, match="was made with model=.*'gelu_tanh'.* this run has .*'gelu'"
    ):
        train_run(tiny_bins, out_dir, activation="gelu")
    assert train_run(tiny_bins, out_dir, max_steps=8)[-1]["step"] == 8
    with pytest.raises(UserError, match="another shape; its settings are --activation=gelu_tanh"):
        train_run(tiny_bins, tmp_path / "exact", init_from=str(out_dir), activation="gelu")
    train_run(tiny_bins, tmp_path / "exact", activation="gelu")
    path = tmp_path / "exact" / "step_000006"
    assert checkpoint.read_meta(path)["identity"]["model"]["activation"] == "gelu"


def test_nanogpts_own_data_is_trained_on(tiny_bins, run_dir, tmp_path, capfd, monkeypatch):
    data_dir = tmp_path / "openwebtext"
    data_dir.mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.copy(f"{tiny_bins}/{name}", data_dir)
    every = {"save_interval": 3, "eval_interval": 3}
    records = train_run(str(data_dir), tmp_path / "run", loss_on="assistant", **every)
    assert losses(records) == losses(read_metrics(run_dir))  # text: all of its tokens count
    assert losses(records, "val") == losses(read_metrics(run_dir), "val")
    assert "openwebtext is nanoGPT's (no meta.json): plain text" in capfd.readouterr().out
    looked = data_dir / bins.CHECKED  # found whole, so the next start need not read it all
    assert sorted(data_dir.iterdir()) == [looked, data_dir / "train.bin", data_dir / "val.bin"]
    monkeypatch.setattr(bins.hashlib, "file_digest", None)
    assert bins.Split(str(data_dir), "train").sha256 == bins.Split(tiny_bins, "train").sha256
    monkeypatch.undo()
    flags = {"run": str(tmp_path / "run"), "dtype": "float32", "device": "cpu"}
    eval_ppl.main(eval_ppl.EvalConfig(**flags))  # on the data that it was trained on
    scored = json.loads((tmp_path / "run" / "eval_ppl.json").read_text())
    assert scored["assistant"] == scored["all"] and scored["all"]["tokens"] > 100
    os.truncate(data_dir / "train.bin", 4000)
    with pytest.raises(UserError, match="was made with data_sha256="):
        train_run(str(data_dir), tmp_path / "run", loss_on="assistant", **every)
    (data_dir / "meta.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="a vocabulary of its own .meta.pkl., which is not GPT-2's"):
        bins.Split(str(data_dir), "val")
    (data_dir / "train_mask.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds half a preparation .no meta.json.; run: python pre"):
        bins.Split(str(data_dir), "val")


def test_resume_never_and_a_run_in_the_way(tiny_bins, run_dir, tmp_path):
    out_dir = shutil.copytree(run_dir, tmp_path / "run")
    with pytest.raises(UserError, match="holds .*; use --resume=auto .* or another --out_dir"):
        train_run(tiny_bins, out_dir, resume="never")


def test_a_run_that_ended_before_its_first_checkpoint_is_started_over(tiny_bins, run_dir, tmp_path):
    """And its metrics are kept."""
    out_dir = tmp_path / "run"
    out_dir.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(run_dir / name, out_dir)
    records = train_run(tiny_bins, out_dir, save_interval=3, eval_interval=3)
    assert losses(records) == losses(read_metrics(run_dir))
    kept = (out_dir / "metrics.jsonl.abandoned").read_bytes()
    assert kept == (run_dir / "metrics.jsonl").read_bytes()


def skip_steps(monkeypatch, first: int, last: int) -> None:
    """No gradient of these steps is finite."""
    intact, steps = train.optim.clip_gradients, iter(range(100))

    def clip(*arguments):
        norm = intact(*arguments)
        return norm * math.nan if first <= next(steps) <= last else norm

    monkeypatch.setattr(train.optim, "clip_gradients", clip)


def test_a_save_that_is_due_in_trouble_waits_until_it_is_over(tiny_bins, tmp_path, monkeypatch):
    skip_steps(monkeypatch, 3, 5)
    settings = {"save_interval": 2, "eval_interval": 100, "max_steps": 10, "keep_last": 9}
    train_run(tiny_bins, tmp_path / "run", **settings)
    assert checkpoint.steps(tmp_path / "run") == [2, 7, 8, 10]


def test_no_good_checkpoint_is_deleted_among_skipped_steps(tiny_bins, tmp_path, monkeypatch):
    skip_steps(monkeypatch, 4, 99)
    settings = {"save_interval": 1, "eval_interval": 100, "max_steps": 30, "keep_last": 2}
    # Nothing good is known of 4's weights: they gave the first step that was skipped.
    wanted = r"last good checkpoint: \S*step_000003; go on from it with --resume=\S*step_000003 and"
    with pytest.raises(UserError, match=f"20 steps skipped .* {wanted} a lower"):
        train_run(tiny_bins, tmp_path / "run", **settings)
    assert checkpoint.steps(tmp_path / "run") == [3, 4]


def test_a_stop_among_skipped_steps_is_saved_beside_the_good_ones(tiny_bins, tmp_path, monkeypatch):
    skip_steps(monkeypatch, 4, 9)
    monkeypatch.setattr(train, "evaluate", lambda *_: math.nan)
    settings = {"save_interval": 1, "eval_interval": 100, "max_steps": 8, "keep_last": 2}
    train_run(tiny_bins, tmp_path / "run", **settings)
    assert checkpoint.steps(tmp_path / "run") == [3, 4, 8]


@pytest.mark.parametrize(("rate", "reason"), [(1e38, "20 steps skipped"), (1e39, "not finite")])
def test_ruined_weights_are_not_taken_for_good(tiny_bins, tmp_path, rate, reason):
    """A step that is taken may ruin them: its gradients are finite, its learning rate is insane."""
    settings = {"save_interval": 1, "eval_interval": 100}
    train_run(tiny_bins, tmp_path / "run", max_steps=4, **settings)
    good = f"{tmp_path}/run/step_000004"
    wanted = f"{reason}.* last good checkpoint: {good}; .*--resume={good}"
    with pytest.raises(UserError, match=wanted):
        train_run(tiny_bins, tmp_path / "run", **settings, learning_rate=rate, max_steps=30)
    assert train_run(tiny_bins, tmp_path / "run", **settings, resume=good)[-1]["step"] == 6


def test_resume_from_another_runs_folder(tiny_bins, run_dir, tmp_path):
    records = train_run(tiny_bins, tmp_path / "run", resume=str(run_dir / "step_000003"))
    assert losses(records) == losses(read_metrics(run_dir))[3:]


def test_init_from_takes_the_weights_alone(tiny_bins, run_dir, tmp_path):
    records = train_run(tiny_bins, tmp_path / "run", init_from=str(run_dir), seed=7)
    assert [record["step"] for record in records if record["split"] == "train"] == list(range(6))
    assert losses(records)[0] < losses(read_metrics(run_dir))[0] - 0.3
    with pytest.raises(UserError, match="another shape; its settings are --n_embd=16"):
        train_run(tiny_bins, tmp_path / "other", init_from=str(run_dir), n_embd=32)


def test_loss_on_assistant_counts_its_targets_alone(tiny_bins, tmp_path):
    split = bins.Split(tiny_bins, "train")
    first = train_run(tiny_bins, tmp_path / "run", loss_on="assistant", dropout=0.0)[0]
    order = bins.RowOrder(
        n_rows=split.n_rows(16), micro_batch_size=2, micro_batches_per_step=2, seed=42
    )
    batch = bins.read_batch(split, order.step(0), 16, "assistant")
    assert 0 < batch.targets.numel() < 64
    config = train.TrainConfig(**RUN)
    torch.manual_seed(42)
    model = train.GPT(train.model_config(config))
    assert first["loss"] == pytest.approx(model(*batch).mean().item(), rel=1e-5)


def test_rows_without_an_answer_do_not_end_a_run(tmp_path):
    """Long user turns leave whole steps, and whole evaluations, without a target."""
    documents = [([7] * 17, [0] * 17)]
    tiny_bins = write_bins(tmp_path / "data", {"train": documents * 20, "val": documents * 20})
    records = train_run(tiny_bins, tmp_path / "run", loss_on="assistant", max_steps=3)
    assert checkpoint.steps(tmp_path / "run") == [3]
    assert [record["step"] for record in records if record["split"] == "train"] == [0, 1, 2]
    assert not any(record.get("skipped") for record in records)


def test_warmup_longer_than_the_run_is_refused(tiny_bins, tmp_path):
    with pytest.raises(
        UserError, match="warmup_steps=6, but the run has 6 steps .*--warmup_steps=0"
    ):
        train_run(tiny_bins, tmp_path, warmup_steps=6)


def test_one_epoch_takes_all_rows(tiny_bins):
    split = bins.Split(tiny_bins, "train")
    order = bins.RowOrder(
        n_rows=split.n_rows(16), micro_batch_size=2, micro_batches_per_step=2, seed=42
    )
    config = train.TrainConfig(**{**RUN, "max_steps": 0})
    n_steps = train.count_steps(config, order)
    assert (n_steps - 1) * 4 < order.n_rows <= n_steps * 4


def test_uneven_micro_batches_over_ranks_are_refused():
    config = train.TrainConfig(**{**RUN, "rows_per_step": 12})
    world = replace(ALONE, size=3)
    assert train.row_order(config, world, n_rows=100).micro_batches_per_step == 6
    with pytest.raises(UserError, match="not divide over 4 GPUs .* of 2; use .*=8 or .*=16, or a"):
        train.row_order(config, replace(ALONE, size=4), n_rows=100)
    config = train.TrainConfig(**{**RUN, "rows_per_step": 6, "micro_batch_size": "auto"})
    with pytest.raises(UserError, match="not divide over 4 GPUs .* of 1; use .*=4 or .*=8, or a"):
        train.row_order(config, replace(ALONE, size=4), n_rows=100)


def test_accumulation_steps_are_another_way_to_say_the_rows():
    assert train.TrainConfig(micro_batch_size=3, gradient_accumulation_steps=4).step_rows == 12
    assert train.TrainConfig(micro_batch_size=2).step_rows == 32
    auto = {"micro_batch_size": "auto", "gradient_accumulation_steps": 4, "rows_per_step": 8}
    assert train.TrainConfig(**auto).step_rows == 8


def test_a_flag_of_the_rows_replaces_what_the_file_says_of_them(tmp_path):
    """In either way to say it."""
    file = tmp_path / "config.py"

    def rows(text: str, *flags: str) -> int:
        file.write_text(text)
        argv = [str(file), *flags]
        return settings.load(train.TrainConfig, argv, "train.py", config_file=True).step_rows

    both = "micro_batch_size = 4\ngradient_accumulation_steps = 8\nrows_per_step = 32\n"
    assert rows(both) == rows(both, "--micro_batch_size=auto") == 32
    assert rows(both, "--rows_per_step=64") == 64
    assert rows("rows_per_step = 64\n", "--gradient_accumulation_steps=4") == 16
    # A file of 0.1.0 says both; they must agree.
    with pytest.raises(UserError, match="--rows_per_step=32; but 8 .* of 2 rows make 16"):
        rows(both, "--micro_batch_size=2")
    for n_rows in (24, 32):
        with pytest.raises(UserError, match=f"--rows_per_step={n_rows}; but 2 .* of 4 rows make 8"):
            rows(both, f"--rows_per_step={n_rows}", "--gradient_accumulation_steps=2")
    with pytest.raises(UserError, match="--gradient_accumulation_steps=8; .*; say --rows_per_step"):
        rows("rows_per_step = 18\n", "--micro_batch_size=auto", "--gradient_accumulation_steps=8")


def test_an_out_dir_that_cannot_be_made_is_refused(tiny_bins, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/x"):
        with pytest.raises(UserError, match="--out_dir=.*; wanted a folder that can be written"):
            train_run(tiny_bins, tmp_path / name)


def test_data_shorter_than_a_row_is_refused(tiny_bins, tmp_path):
    with pytest.raises(UserError, match="less than one row of block_size=1000000; use a smaller"):
        train_run(tiny_bins, tmp_path, block_size=1_000_000)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_head": 3},
        {"n_head": 0},
        {"n_embd": 0},
        {"micro_batch_size": 0},
        {"gradient_accumulation_steps": -1},
        {"rows_per_step": -1},
        {"rows_per_step": 5},
        {"eval_interval": 0},
        {"eval_rows": -1},
        {"max_steps": -1},
        {"max_steps": 0, "epochs": 0.0},
        {"min_learning_rate": 1.0},
        {"learning_rate": 0.0, "min_learning_rate": 0.0, "embedding_learning_rate": 0.1},
        {"learning_rate": math.nan},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"grad_clip": -1.0},
        {"grad_clip": math.nan},
        {"dropout": 1.0},
        {"seed": -1},
        {"seed": 10**20},
    ],
    ids=str,
)
def test_a_senseless_setting_is_refused_by_its_flag(changes):
    with pytest.raises(UserError, match="--"):
        train.TrainConfig(**{**RUN, **changes})


def test_flops_and_tokens_of_a_record_agree(run_dir):
    record = read_metrics(run_dir)[0]
    assert record["tokens"] == 64 and record["mfu"] is None
    assert peak_flops("cpu", torch.bfloat16) is None


def test_a_run_whose_last_save_fails_says_so_and_fails(tiny_bins, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full_disk)
    with pytest.raises(UserError, match="step 6 is not saved"):
        train_run(tiny_bins, tmp_path / "run")


def test_out_of_memory_names_the_flags(tiny_bins, tmp_path, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.21 GiB. GPU 0 has")

    monkeypatch.setattr(train, "train", too_large)
    wanted = r"^CUDA out of memory at micro_batch_size=2; halve it, .* --gradient_checkpointing"
    with pytest.raises(UserError, match=wanted):
        train_run(tiny_bins, tmp_path / "run")


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.Graph]:
    """The graphs that a run compiles, by a backend that leaves them as they are."""
    found = []

    def backend(module, inputs):
        found.append(module.graph)
        return module.forward

    compile_parts = train.GPT.compile
    monkeypatch.setattr(train.GPT, "compile", lambda model: compile_parts(model, backend=backend))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=True):  # as torch has it
        yield found
    torch._dynamo.reset()


def is_symbolic(graph: torch.fx.Graph) -> bool:
    values = [node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder"]
    sizes = [value.shape if isinstance(value, torch.Tensor) else [value] for value in values]
    return any(isinstance(size, torch.SymInt) for shape in sizes for size in shape)


@pytest.mark.parametrize("n_layer", [2, 6])
def test_a_compiled_run_has_four_graphs_at_any_depth_and_of_fixed_sizes(
    tiny_bins, tmp_path, graphs, n_layer
):
    """Block and head, in training and in evaluation, whose last batch is short of a row."""
    changes = {"n_layer": n_layer, "eval_rows": 3, "max_steps": 3, "gradient_checkpointing": True}
    records = train_run(tiny_bins, tmp_path / "run", compile=True, **changes)
    assert len(graphs) == 4 and not any(map(is_symbolic, graphs))
    eager = train_run(tiny_bins, tmp_path / "eager", **changes)
    assert losses(records) == losses(eager) and losses(records, "val") == losses(eager, "val")


def test_targets_of_any_number_leave_the_blocks_graph_of_fixed_size(tiny_bins, tmp_path, graphs):
    train_run(tiny_bins, tmp_path / "run", compile=True, loss_on="assistant")
    n_symbolic = sum(map(is_symbolic, graphs))
    assert len(graphs) - n_symbolic == 4 and n_symbolic <= 2  # the head's alone


@pytest.fixture
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_ddp_does_not_cut_the_compiled_graphs(tiny_bins, tmp_path, graphs, group, monkeypatch):
    """Into the pieces that fill its buckets, here of 1 KB."""
    ddp = functools.partial(train.DistributedDataParallel, bucket_cap_mb=0.001)
    monkeypatch.setattr(train, "DistributedDataParallel", ddp)
    flags = {**RUN, "data_dir": tiny_bins, "out_dir": str(tmp_path), "compile": True}
    config = train.TrainConfig(**flags)
    run = train.build(config, replace(ALONE, size=2), train.open_splits(config))
    train.train_step(run, train.micro_batches(run, 0), n_targets=32)
    assert isinstance(run.model, torch.nn.parallel.DistributedDataParallel) and len(graphs) == 2


def test_training_goes_on_while_a_checkpoint_is_written(tiny_bins, tmp_path, monkeypatch, run_dir):
    """And changes nothing of what is written; the end waits for the last one."""
    publish, take, is_ahead = checkpoint.save, train.take_step, threading.Event()

    def slow(run_dir, step, **content):
        assert step == 6 or is_ahead.wait(10), "training waits for the checkpoint"
        time.sleep(0.2)
        return publish(run_dir, step, **content)

    def take_step(run, step, log):
        take(run, step, log)
        if step == 4:
            is_ahead.set()

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(train, "take_step", take_step)
    train_run(tiny_bins, tmp_path / "run", save_interval=3, eval_interval=3)
    for step in (3, 6):
        paths = [checkpoint.folder(of, step) for of in (tmp_path / "run", run_dir)]
        found, wanted = (checkpoint.verify(path)["files"][checkpoint.MODEL] for path in paths)
        assert found == wanted


def test_a_failed_save_costs_its_checkpoint_and_another_error_ends_the_run(
    tiny_bins, tmp_path, monkeypatch, capfd
):
    intact, errors = checkpoint.save, {3: OSError(errno.EIO, "Input/output error")}

    def save(run_dir, step, **content):
        if step in errors:
            raise errors[step]
        return intact(run_dir, step, **content)

    monkeypatch.setattr(checkpoint, "save", save)
    train_run(tiny_bins, tmp_path / "run", save_interval=3)
    assert checkpoint.steps(tmp_path / "run") == [6]
    assert "step      3: checkpoint NOT saved, training goes on" in capfd.readouterr().out
    errors[3] = RuntimeError("planted")
    with pytest.raises(RuntimeError, match="planted"):
        train_run(tiny_bins, tmp_path / "other", save_interval=3)


def test_bins_are_read_whole_on_request(tiny_bins, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(bins, "_check_whole", lambda *_, always: seen.append(always))
    for wanted in (False, True):
        train.open_splits(train.TrainConfig(**RUN, data_dir=tiny_bins, verify_data=wanted))
    assert seen == [False, False, True, True]
