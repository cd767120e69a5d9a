"""What fits in memory: a model at all, and the most rows at once (micro_batch_size=auto)."""

import gc

import torch

from model import GPT, GPTConfig
from nanosynth import UserError
from nanosynth.device import autocast, total_memory
from nanosynth.settings import is_out_of_memory
from nanosynth.training.distributed import World

CPU_TOKENS = 2048  # more at once are no faster on a CPU, and soon slower
MEMORY_SHARE = 0.92  # of a GPU's: the rest is for libraries and fragments


def check_fits(shape: GPTConfig, device: torch.device) -> None:
    """Refuse a model that no memory holds, before it is built."""
    # In float32: weights, gradients, and the optimizer's moments, of which Muon has one.
    needed, there = 12 * shape.n_weights, total_memory(device)
    if needed > there:
        raise UserError(
            f"{shape.n_weights:,} parameters take more than {needed / 1e9:,.0f} GB to train, and "
            f"the device ({device}) has {there / 1e9:,.0f}; use a smaller --n_layer or --n_embd"
        )


def largest(model_config: GPTConfig, n_rows: int, *, world: World, **trial) -> int:
    """The most rows that fit on every rank, a divisor of `n_rows`, which each takes of a step;
    `trial` as `try_step` takes it. Call on every rank.
    """
    sizes = [n for n in range(n_rows, 0, -1) if n_rows % n == 0]
    if world.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, world.device)
        n_fitting = next((n for n in sizes if fits(model_config, n, world=world, **trial)), 0)
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


def fits(model_config: GPTConfig, n_rows: int, *, is_compiled: bool, **trial) -> bool:
    """Whether a step of `n_rows` full rows at once fits; `trial` as `try_step` takes it.

    Nothing of it is left: neither memory, nor what compiling it has taught torch of sizes, which
    would make the next graphs general, and slow.
    """
    try:
        try_step(model_config, n_rows, is_compiled=is_compiled, **trial)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if is_compiled:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def try_step(
    model_config: GPTConfig,
    n_rows: int,
    *,
    dtype: torch.dtype,
    world: World,
    gradient_checkpointing: bool,
    is_compiled: bool,
) -> None:
    """Forward and backward as they will run, beside what stays in memory."""
    with world.device:
        model = GPT(model_config)
        # AdamW's two moments; and DDP's buckets, which have room for all gradients beside those
        # that add up over the micro-batches.
        rest = torch.empty((2 + (world.size > 1)) * model.n_parameters())
        ids = torch.zeros(n_rows, model_config.block_size, dtype=torch.long)
    model.gradient_checkpointing = gradient_checkpointing
    if is_compiled:
        model.compile()
    with autocast(world.device, dtype):
        loss = model(ids, ids.flatten()).sum()
    loss.backward()
    del rest
