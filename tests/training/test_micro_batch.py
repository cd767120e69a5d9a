import weakref

import pytest
import torch

from nanosynth import UserError, checkpoint
from nanosynth.training import micro_batch
from nanosynth.training.distributed import World
from tiny import ALONE, CPU, losses, tiny_model, train_run

GPU = World(rank=0, size=1, device=torch.device("cuda"))


def crowded(room: int):
    """A model on the CPU that runs out of a GPU's memory above `room` rows."""
    model = tiny_model()

    def check(module, arguments):
        if len(arguments[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(check)
    return model


def largest(rows_per_step: int, world: World, room: int = 0) -> int:
    return micro_batch.largest(
        lambda: crowded(room),
        rows_per_step=rows_per_step,
        block_size=16,
        dtype=torch.float32,
        world=world,
    )


@pytest.fixture
def shares(monkeypatch):
    """The memory shares that are set, on a machine without a GPU."""
    found = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: found.append(share)
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return found


def test_a_trial_leaves_nothing_behind():
    models = []

    def build():
        model = crowded(3)
        models.append(weakref.ref(model))
        return model

    assert micro_batch.fits(build, 3, torch.float32)
    assert not micro_batch.fits(build, 4, torch.float32)
    assert [model() for model in models] == [None, None]


def test_a_model_without_room_does_not_fit():
    def build():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert not micro_batch.fits(build, 1, torch.float32)


@pytest.mark.parametrize(
    ("rows_per_step", "room", "wanted"), [(32, 9, 8), (32, 32, 32), (12, 5, 4), (7, 6, 1)]
)
def test_the_largest_divisor_that_fits(shares, rows_per_step, room, wanted):
    assert largest(rows_per_step, GPU, room) == wanted
    assert shares == [micro_batch.MEMORY_SHARE, 1.0]


def test_a_gpu_without_room_for_one_row(shares):
    with pytest.raises(UserError, match="not even one row of block_size=16 fits"):
        largest(32, GPU, room=0)


def test_the_smallest_gpu_counts(shares, monkeypatch):
    """Ranks of 8 and 3 rows: both take the largest divisor of their 8 rows up to 3."""
    monkeypatch.setattr(World, "gather", lambda world, found: torch.cat([found, found * 0 + 3]))
    assert largest(16, World(rank=0, size=2, device=GPU.device), room=8) == 2


def test_rows_that_do_not_divide_over_the_gpus():
    with pytest.raises(UserError, match="rows_per_step=6 .* over 4 GPUs; use .*=4 or .*=8"):
        largest(6, World(rank=0, size=4, device=CPU))


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
    with pytest.raises(UserError, match="rows_per_step=0; wanted 1 or more with --micro_batch"):
        train_run(tiny_bins, tmp_path / "none", micro_batch_size="auto")
