"""micro_batch_size=auto: the most rows that a device takes at once."""

from collections.abc import Callable

import torch
from torch import nn

from nanosynth import UserError
from nanosynth.device import autocast
from nanosynth.training.distributed import World

CPU_TOKENS = 2048  # more at once are no faster on a CPU, and soon slower
MEMORY_SHARE = 0.92  # of a GPU's: the rest is for DDP's buckets, libraries and fragments


def largest(
    build: Callable[[], nn.Module],
    *,
    rows_per_step: int,
    block_size: int,
    dtype: torch.dtype,
    world: World,
) -> int:
    """The most rows that fit on every rank, a divisor of each rank's share of `rows_per_step`.

    `build` makes a model like the run's on the device, one for each trial. Call on every rank.
    """
    if rows_per_step % world.size:
        below = rows_per_step // world.size * world.size
        near = [f"--rows_per_step={n}" for n in (below, below + world.size) if n]
        raise UserError(
            f"rows_per_step={rows_per_step} does not divide over {world.size} GPUs; use "
            + " or ".join(near)
        )
    share = rows_per_step // world.size
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    if world.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, world.device)
        found = next((n for n in sizes if fits(build, n, dtype)), 0)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, world.device)
    else:
        found = next((n for n in sizes if n * block_size <= CPU_TOKENS), 1)
    least = int(world.gather(torch.tensor([found])).min())
    if not least:
        raise UserError(
            f"not even one row of block_size={block_size} fits in the GPU's memory; use "
            "--gradient_checkpointing=True, or a smaller --block_size or model"
        )
    return next(n for n in sizes if n <= least)


def fits(build: Callable[[], nn.Module], n_rows: int, dtype: torch.dtype) -> bool:
    """Whether a model, AdamW's two moments, and forward and backward of `n_rows` full rows fit.

    Not compiled, which takes more memory than compiled and spares a compilation for each trial.
    """
    try:
        model = build()
        device = next(model.parameters()).device
        moments = torch.empty(2 * model.n_parameters(), device=device)
        ids = torch.zeros(n_rows, model.config.block_size, dtype=torch.long, device=device)
        with autocast(device, dtype):
            loss = model(ids, ids.flatten()).sum()
        loss.backward()
        del moments
        return True
    except torch.OutOfMemoryError:
        return False
