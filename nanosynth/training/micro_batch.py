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
    n_rows: int,
    dtype: torch.dtype,
    world: World,
) -> int:
    """The most rows that fit on every rank, a divisor of `n_rows`, which each takes of a step.

    Call on every rank.
    """
    sizes = [n for n in range(n_rows, 0, -1) if n_rows % n == 0]
    if world.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, world.device)
        trial = (dtype, world.device, gradient_checkpointing)
        n_fitting = next((n for n in sizes if fits(model_config, n, *trial)), 0)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, world.device)
    else:
        n_fitting = next((n for n in sizes if n * model_config.block_size <= CPU_TOKENS), 1)
    least = int(world.gather(torch.tensor([n_fitting])).min())  # the smallest GPU counts
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
