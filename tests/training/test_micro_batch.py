import weakref
from dataclasses import replace

import pytest
import torch

from model import GPT, GPTConfig
from nanosynth import UserError, checkpoint
from nanosynth.training import micro_batch
from nanosynth.training.distributed import World
from tiny import ALONE, losses, tiny_model, train_run

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64)
TRIAL = {"dtype": torch.float32, "world": ALONE, "gradient_checkpointing": False}
TRIAL["is_compiled"] = False
GPU = World(rank=0, size=1, device=torch.device("cuda"))


def crowded(room: int):
    """A model on the CPU that runs out of a GPU's memory above `room` rows."""
    model = tiny_model()

    def check(module, arguments):
        if len(arguments[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(check)
    return model


def largest(rows_per_step: int, world: World) -> int:
    return micro_batch.largest(SHAPE, rows_per_step // world.size, **TRIAL | {"world": world})


@pytest.fixture
def gpu(monkeypatch):
    """Lets a trial find `room` rows in a GPU's memory; the memory shares that are set."""
    found = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: found.append(share)
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    fits = micro_batch.fits

    def with_room(room: int) -> list[float]:
        monkeypatch.setattr(micro_batch, "GPT", lambda config: crowded(room))
        monkeypatch.setattr(
            micro_batch, "fits", lambda shape, n, **trial: fits(shape, n, **trial | TRIAL)
        )
        return found

    return with_room


def test_a_trial_leaves_nothing_behind(monkeypatch):
    models = []

    def build(config):
        model = crowded(3)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(micro_batch, "GPT", build)
    assert micro_batch.fits(SHAPE, 3, **TRIAL)
    assert not micro_batch.fits(SHAPE, 4, **TRIAL)
    assert [model() for model in models] == [None, None]


def test_a_trial_is_of_the_runs_own_model(monkeypatch):
    made = []
    monkeypatch.setattr(micro_batch, "GPT", lambda config: made.append(GPT(config)) or made[-1])
    assert micro_batch.fits(SHAPE, 1, **TRIAL | {"gradient_checkpointing": True})
    assert made[0].config == SHAPE and made[0].gradient_checkpointing


def test_a_trial_is_compiled_anew_and_has_ddps_buckets(monkeypatch):
    n_graphs, sizes, empty, compile_parts = [], [], torch.empty, GPT.compile

    def backend(module, inputs):
        n_graphs.append(1)
        assert not any(isinstance(x, torch.SymInt) for x in inputs)
        return module.forward

    monkeypatch.setattr(GPT, "compile", lambda model: compile_parts(model, backend=backend))
    monkeypatch.setattr(
        torch, "empty", lambda *size, **of: sizes.append(size) or empty(*size, **of)
    )
    n_parameters = tiny_model().n_parameters()
    for world, copies in ((ALONE, 2), (replace(ALONE, size=2), 3)):
        for n_rows in (4, 2):
            trial = TRIAL | {"is_compiled": True, "world": world}
            assert micro_batch.fits(SHAPE, n_rows, **trial) and (copies * n_parameters,) in sizes
    assert len(n_graphs) == 4 * 2  # each trial's block and head


def test_a_model_without_room_does_not_fit(monkeypatch):
    def build(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(micro_batch, "GPT", build)
    assert not micro_batch.fits(SHAPE, 1, **TRIAL)


@pytest.mark.parametrize(
    ("rows_per_step", "room", "wanted"), [(32, 9, 8), (32, 32, 32), (12, 5, 4), (7, 6, 1)]
)
def test_the_largest_divisor_that_fits(gpu, rows_per_step, room, wanted):
    shares = gpu(room)
    assert largest(rows_per_step, GPU) == wanted
    assert shares == [micro_batch.MEMORY_SHARE, 1.0]


def test_a_gpu_without_room_for_one_row(gpu):
    gpu(0)
    with pytest.raises(UserError, match="not even one row of block_size=16 fits"):
        largest(32, GPU)


def test_the_smallest_gpu_counts(gpu, monkeypatch):
    """Ranks of 8 and 3 rows: both take the largest divisor of their 8 rows up to 3."""
    gpu(8)
    monkeypatch.setattr(World, "gather", lambda world, found: torch.cat([found, found * 0 + 3]))
    assert largest(16, World(rank=0, size=2, device=GPU.device)) == 2


def test_a_cpu_takes_a_fixed_number_of_tokens():
    assert largest(1024, ALONE) == micro_batch.CPU_TOKENS // 16
    assert largest(6, ALONE) == 6


def test_auto_takes_the_same_steps(tiny_bins, run_dir, tmp_path, capfd):
    """A run of 2 x 2 rows goes on with all 4 at once, and the data stay in order."""
    wanted = train_run(
        tiny_bins, tmp_path / "given", resume=str(run_dir / "step_000003"), dropout=0.0
    )
    found = train_run(
        tiny_bins,
        tmp_path / "auto",
        resume=str(run_dir / "step_000003"),
        dropout=0.0,
        micro_batch_size="auto",
        rows_per_step=4,
    )
    assert "micro_batch_size=auto: 4 rows at once, 1 micro-batches a step" in capfd.readouterr().out
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-5)
    assert len(checkpoint.steps(tmp_path / "auto")) == 1
