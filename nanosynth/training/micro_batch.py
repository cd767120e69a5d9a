"""micro_batch_size=auto: the most rows that a device takes at once."""

import torch

from model import GPT, GPTConfig
from nanosynth import UserError
from nanosynth.device import autocast
from nanosynth.training.distributed import World

CPU_TOKENS = 2048  # more at once are no faster on a CPU, and soon slower
MEMORY_SHARE = 0.92  # of a GPU's: the rest is for DDP's buckets, libraries and fragments


def largest(
    model_config: GPTConfig,
    *,
    gradient_checkpointing: bool,
    rows_per_step: int,
    dtype: torch.dtype,
    world: World,
) -> int:
    """The most rows that fit on every rank, a divisor of each rank's share of `rows_per_step`.

    Call on every rank.
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
        found = 0
        for n_rows in sizes:
            if fits(model_config, n_rows, dtype, world.device, gradient_checkpointing):
                found = n_rows
                break
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, world.device)
    else:
        found = next((n for n in sizes if n * model_config.block_size <= CPU_TOKENS), 1)
    least = int(world.gather(torch.tensor([found])).min())  # the smallest GPU counts
    if not least:
        raise UserError(
            f"not even one row of block_size={model_config.block_size} fits in the GPU's memory; "
            "use --gradient_checkpointing=True, or a smaller --block_size or model"
        )
    return next(n for n in sizes if n <= least)


def fits(
    model_config: GPTConfig,
    n_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    gradient_checkpointing: bool,
) -> bool:
    """Whether a model, AdamW's two moments, and forward and backward of `n_rows` full rows fit.

    Not compiled, which takes more memory than compiled and spares a compilation for each trial.
    """
    try:
        with device:
            model = GPT(model_config)
            moments = torch.empty(2 * model.n_parameters())
            ids = torch.zeros(n_rows, model_config.block_size, dtype=torch.long)
        model.gradient_checkpointing = gradient_checkpointing
        with autocast(device, dtype):
            loss = model(ids, ids.flatten()).sum()
        loss.backward()
        del moments
        return True
    except torch.OutOfMemoryError:
        return False
