"""Train a GPT on prepared bins.

Usage:
    python train.py config/demo.py
    torchrun --standalone --nproc_per_node=8 train.py config/1b.py --learning_rate=3e-4
"""

import contextlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from nanosynth import UserError, settings, tokenizer
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class TrainConfig(settings.Settings):
    """Train a GPT on the bins of data_dir; checkpoints and metrics go to out_dir."""

    data_dir: str = setting(
        "data/openhermes", "prepared bins, see prepare.py", group="The run", path=True
    )
    out_dir: str = setting("out/run", "the run's folder", path=True)
    init_from: str = setting(
        "", "weights to start from: a run's folder (its best) or a step folder", path=True
    )
    resume: str = setting(
        "auto", "auto: go on where out_dir stands; never; or a step folder", path=True
    )
    seed: int = setting(42, "of the weights, the data order and dropout", at_least=0)

    n_layer: int = setting(24, "blocks", group="The model", at_least=1)
    n_head: int = setting(16, "attention heads", at_least=1)
    n_embd: int = setting(1024, "channels", at_least=1)
    block_size: int = setting(2048, "context, in tokens", at_least=1)
    dropout: float = setting(
        0.0, "0 for a single epoch; 0.1 or so for several", at_least=0, below=1
    )
    bias: bool = setting(True, "biases in Linear and LayerNorm, as GPT-2 has them")

    rows_per_step: int = setting(
        32, "rows of block_size tokens a step, over all GPUs", group="The batch", at_least=1
    )
    micro_batch_size: int | Literal["auto"] = setting(
        4, "rows a GPU takes at once; auto: as many as fit", at_least=1
    )
    gradient_accumulation_steps: int = setting(
        0,
        "another way to say rows_per_step: micro_batch_size times this; 0: it is not said so",
        at_least=0,
        instead_of="rows_per_step",
    )
    max_steps: int = setting(0, "optimizer steps; 0: as many as `epochs` takes", at_least=0)
    epochs: float = setting(1.0, "passes over the training rows, where max_steps is 0", above=0)

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "muon: on the blocks' matrices, AdamW on the rest", group="The optimizer"
    )
    learning_rate: float = setting(2e-4, "the peak, after warmup", at_least=0)
    min_learning_rate: float = setting(2e-5, "where the decay ends", at_least=0)
    warmup_steps: int = setting(1000, "steps of linear warmup", at_least=0)
    decay: Literal["cosine", "linear"] = setting("cosine", "how the learning rate falls")
    zero_init: bool = setting(False, "residual projections start at zero, not at GPT-2's noise")
    weight_decay: float = setting(0.01, "on matrices and embeddings", at_least=0)
    beta1: float = setting(0.9, "AdamW's first moment", at_least=0, below=1)
    beta2: float = setting(
        0.95, "AdamW's second moment; 0.95 forgets a spike sooner than 0.999", at_least=0, below=1
    )
    grad_clip: float = setting(1.0, "largest norm of the gradients; 0: no clipping", at_least=0)

    spike_sigmas: float = setting(
        8.0,
        "skip a step whose loss is so many standard deviations above the last 128; 0: none",
        group="Trouble",
        at_least=0,
    )
    max_skipped_steps: int = setting(20, "steps skipped in a row that end the run", at_least=1)
    hang_seconds: float = setting(
        600.0, "a step, save or evaluation that takes longer ends the run", above=0
    )

    dtype: Literal["auto", "float16", "bfloat16", "float32"] = setting(
        "auto",
        "of the matrix products; auto: float16 on CUDA, bfloat16 on a CPU that has it",
        group="The machine",
    )
    compile: bool | Literal["auto"] = setting("auto", "torch.compile; auto: on CUDA")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower")
    loss_on: Literal["all", "assistant"] = setting("all", "targets that count")

    eval_interval: int = setting(
        1000, "steps between evaluations", group="What is kept and told", at_least=1
    )
    eval_rows: int = setting(
        256, "validation rows an evaluation takes, always the same; 0: all", at_least=0
    )
    save_interval: int = setting(
        5000, "steps between checkpoints; a new best is saved too", at_least=1
    )
    keep_last: int = setting(
        3, "newest checkpoints kept, beside the best; the disk may tear one", at_least=2
    )
    log_interval: int = setting(
        10, "steps between lines on the console; metrics.jsonl has every step", at_least=1
    )

    wandb: Literal["online", "offline", "disabled"] = setting(
        "disabled", "where metrics go besides"
    )
    wandb_project: str = setting("nanosynth", "wandb project")
    wandb_run_name: str = setting("", "wandb run; empty: the name of out_dir")

    @property
    def step_rows(self) -> int:
        """Rows of a step over all GPUs, however they were said."""
        if self.gradient_accumulation_steps and self.micro_batch_size != "auto":
            return self.micro_batch_size * self.gradient_accumulation_steps
        return self.rows_per_step

    def check(self) -> None:
        if self.learning_rate < self.min_learning_rate:
            self.refuse(
                "learning_rate", f"wanted min_learning_rate={self.min_learning_rate} or more"
            )
        if self.n_embd % self.n_head:
            divisors = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.n_head))[:3])
            self.refuse("n_head", f"wanted a divisor of n_embd={self.n_embd}, as {near}")
        if self.micro_batch_size != "auto" and self.step_rows % self.micro_batch_size:
            below = self.step_rows // self.micro_batch_size * self.micro_batch_size
            near = [n for n in (below, below + self.micro_batch_size) if n]
            self.refuse("rows_per_step", f"wanted a multiple of micro_batch_size, as {near}")


if __name__ == "__main__":
    arguments = settings.from_argv(TrainConfig, config_file=True)  # before torch takes its time

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig
from nanosynth import checkpoint
from nanosynth.data import bins
from nanosynth.device import (
    autocast,
    choose_dtype,
    device_name,
    keep_freed_memory,
    peak_flops,
)
from nanosynth.files import write_atomically
from nanosynth.training import distributed, micro_batch, optim, provenance
from nanosynth.training.log import Console, MetricsFile, RunLog, WandbThread

MIN_LOSS_SCALE = 1.0  # below it float16 gradients underflow, and the run only seems to train


def model_config(config: TrainConfig) -> GPTConfig:
    return GPTConfig(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        block_size=config.block_size,
        vocab_size=tokenizer.VOCAB_SIZE,
        dropout=config.dropout,
        bias=config.bias,
    )


def fit_micro_batch(config: TrainConfig, world: distributed.World) -> TrainConfig:
    """`config` with micro_batch_size=auto as a number, and said. Call on every rank."""
    if config.micro_batch_size != "auto":
        return config

    def build() -> GPT:
        with world.device:
            model = GPT(model_config(config))
        model.gradient_checkpointing = config.gradient_checkpointing
        return model

    size = micro_batch.largest(
        build,
        rows_per_step=config.step_rows,
        block_size=config.block_size,
        dtype=choose_dtype(config.dtype, world.device),
        world=world,
    )
    n_steps = config.step_rows // size
    if world.is_main:
        print(f"micro_batch_size=auto: {size} rows at once, {n_steps} micro-batches a step")
    return replace(config, micro_batch_size=size, gradient_accumulation_steps=0)


def row_order(config: TrainConfig, split: bins.Split) -> bins.RowOrder:
    return bins.RowOrder(
        n_rows=split.n_rows(config.block_size),
        micro_batch_size=config.micro_batch_size,
        micro_batches_per_step=config.step_rows // config.micro_batch_size,
        seed=config.seed,
    )


def count_steps(config: TrainConfig, order: bins.RowOrder) -> int:
    """Optimizer steps of the run; the last step of an epoch is filled up from the next one."""
    steps = config.max_steps or math.ceil(config.epochs * order.n_rows / order.rows_per_step)
    if steps <= config.warmup_steps:
        raise UserError(
            f"warmup_steps={config.warmup_steps}, but the run has {steps} steps ({order.n_rows:,} "
            f"rows of {config.block_size} tokens, {order.rows_per_step} a step): the learning rate "
            f"would never come down; try --warmup_steps={steps // 10}, or more data or epochs"
        )
    return steps


def check_divides(config: TrainConfig, world_size: int) -> None:
    """Every rank takes as many micro-batches as any other."""
    at_once = config.micro_batch_size * world_size
    if config.step_rows % at_once:
        below = config.step_rows // at_once * at_once
        wanted = " or ".join(f"--rows_per_step={n}" for n in (below, below + at_once) if n)
        raise UserError(
            f"rows_per_step={config.step_rows} does not divide over {world_size} GPUs that take "
            f"micro_batch_size={config.micro_batch_size} each; use {wanted}"
        )


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | optim.Muon,
    scaler: torch.amp.GradScaler,
    guard: optim.SpikeGuard,
    batches: Iterable[tuple[int, bins.Batch]],
    *,
    n_micro_steps: int,
    n_targets: int,
    world: distributed.World,
    dtype: torch.dtype,
    grad_clip: float,
    seed: int,
) -> Tensor:
    """One update from this rank's micro-batches; [loss, grad_norm, loss_scale, n_skipped] (4,).

    `n_targets` counts the targets of the step over all ranks: each loss is a sum divided by it, so
    any division into micro-batches and ranks gives the same mean. A loss spike, or a gradient that
    is not finite on any rank, leaves weights and moments as they are on all. Call on every rank.
    """
    loss = torch.zeros((), device=world.device)
    for micro_step, (number, batch) in enumerate(batches):
        # Dropout belongs to the micro-batch, not to the process: a resumed run and any number of
        # ranks draw the same.
        torch.manual_seed(
            int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
        )
        is_last = micro_step == n_micro_steps - 1
        distributed_model = isinstance(model, DistributedDataParallel)
        alone = model.no_sync() if distributed_model and not is_last else contextlib.nullcontext()
        with alone:
            with autocast(world.device, dtype):
                loss_sum = model(*batch.to(world.device)).sum()
            # DDP averages gradients over the ranks; times their number makes the sum.
            scaler.scale(loss_sum * (world.size / n_targets)).backward()
        loss += loss_sum.detach() / n_targets
    world.sum(loss)
    loss_scale = scaler.scale(torch.ones((), device=world.device))
    scaler.unscale_(optimizer)
    grad_norm = optim.clip_gradients(model.parameters(), grad_clip)
    accepted = guard.accepts(loss) & grad_norm.isfinite()
    guard.note(loss, accepted)
    # Fused AdamW leaves everything as it is where found_inf is 1: the way GradScaler.step tells it,
    # used directly so that every dtype, and a spike as well as an overflow, takes the same path.
    optimizer.found_inf = (~accepted).float()
    optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, grad_norm, loss_scale, guard.n_skipped])


def open_splits(config: TrainConfig) -> tuple[bins.Split, bins.Split]:
    train, val = (bins.Split(config.data_dir, name) for name in bins.SPLITS)
    for split in (train, val):
        if not split.n_rows(config.block_size):
            raise UserError(
                f"{split.path} has {split.n_tokens} tokens, less than one row of block_size="
                f"{config.block_size}; use a smaller --block_size or more data"
            )
    return train, val


def identity(config: TrainConfig, train: bins.Split) -> dict:
    """What must not change within a run: the model, the data, and the order in which it is seen."""
    return {
        "model": asdict(model_config(config)),
        "seed": config.seed,
        "rows_per_step": config.step_rows,
        "loss_on": config.loss_on,
        "optimizer": config.optimizer,
        "data_sha256": train.sha256,
    }


def find_start(config: TrainConfig, world: distributed.World, wanted: dict) -> Path | None:
    """The step folder to go on from, or None. Rank 0 looks and all hear. Call on every rank."""
    path, error = None, None
    if world.is_main:
        try:
            path = checkpoint.find_start(Path(config.out_dir), config.resume, wanted)
        except UserError as found:
            error = str(found)
    path, error = world.from_main((path, error))
    if error:
        raise UserError(error)
    return path


def load_weights(raw_model: GPT, path: Path) -> dict:
    """Copy a step folder's weights into the model; the folder's meta."""
    meta = checkpoint.read_meta(path)
    found, wanted = meta["identity"]["model"], asdict(raw_model.config)
    different = {
        key: found[key] for key in wanted if key != "dropout" and found[key] != wanted[key]
    }
    if different:
        flags = " ".join(f"--{key}={value}" for key, value in different.items())
        raise UserError(f"{path} holds a model of another shape; its settings are {flags}")
    raw_model.load_state_dict(checkpoint.read_model(path, meta))
    return meta


class Training(NamedTuple):
    """Everything that a step changes or reads, built or restored."""

    raw_model: GPT
    model: torch.nn.Module  # raw_model, or DDP around it
    optimizer: torch.optim.Optimizer | optim.Muon
    scaler: torch.amp.GradScaler
    guard: optim.SpikeGuard
    dtype: torch.dtype
    identity: dict
    first_step: int
    metrics_bytes: int  # of metrics.jsonl that the checkpoint knows


def build(config: TrainConfig, world: distributed.World, train_split: bins.Split) -> Training:
    """A new run, or one restored from its checkpoint. Call on every rank."""
    dtype = choose_dtype(config.dtype, world.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    with world.device:
        raw_model = GPT(model_config(config))
    if config.zero_init:
        raw_model.zero_projections()
    raw_model.gradient_checkpointing = config.gradient_checkpointing
    optimizer = optim.build_optimizer(
        config.optimizer,
        raw_model,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        world=world,
    )
    # A run has few steps: the scale starts low and grows soon (defaults: 65,536 and 2,000).
    scaler = torch.amp.GradScaler(
        world.device.type, init_scale=2.0**13, growth_interval=200, enabled=dtype == torch.float16
    )
    guard = optim.SpikeGuard(config.spike_sigmas, world.device)
    run_identity = identity(config, train_split)
    resume_from = find_start(config, world, run_identity)
    first_step, metrics_bytes = 0, 0
    if resume_from:
        first_step = load_weights(raw_model, resume_from)["step"]
        state = checkpoint.read_train_state(resume_from)
        if absent := {"optimizer", "scaler", "guard", "metrics_bytes"} - state.keys():
            raise checkpoint.Damaged(f"{resume_from}: its training state lacks {sorted(absent)}")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        guard.load_state_dict(state["guard"])
        if resume_from.parent == Path(config.out_dir):
            metrics_bytes = state["metrics_bytes"]
    elif config.init_from:
        load_weights(raw_model, checkpoint.find(config.init_from))
    if config.compile is True or (config.compile == "auto" and world.device.type == "cuda"):
        raw_model.compile()
    model: torch.nn.Module = raw_model
    if world.size > 1:
        model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)
    return Training(
        raw_model, model, optimizer, scaler, guard, dtype, run_identity, first_step, metrics_bytes
    )


@torch.no_grad()
def evaluate(
    training: Training,
    split: bins.Split,
    world: distributed.World,
    config: TrainConfig,
    *,
    n_rows: int,
) -> float:
    """Mean loss over the first `n_rows` rows, NaN without a target there. Call on every rank."""
    training.raw_model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)  # loss sum, targets
    size = config.micro_batch_size
    for start in range(world.rank * size, n_rows, world.size * size):
        rows = list(range(start, min(start + size, n_rows)))
        batch = bins.read_batch(split, rows, config.block_size, config.loss_on)
        with autocast(world.device, training.dtype):
            losses = training.raw_model(*batch.to(world.device))
        totals[0] += losses.double().sum()
        totals[1] += losses.numel()
    training.raw_model.train()
    loss_sum, n_targets = world.sum(totals).tolist()
    return loss_sum / n_targets if n_targets else math.nan


def save(
    config: TrainConfig, step: int, training: Training, log: RunLog, val_loss: float | None
) -> bool:
    """Whether the checkpoint of `step` is published; a full disk costs it, not the run."""
    run_dir = Path(config.out_dir)
    state = {
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "guard": training.guard.state_dict(),
    }
    meta = {
        "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
        "identity": training.identity,
        "settings": asdict(config),
        "torch": str(torch.__version__),
    }
    tensors = training.raw_model.state_dict()
    try:
        state["metrics_bytes"] = log.synced_size()
        path = checkpoint.save(run_dir, step, model=tensors, train_state=state, meta=meta)
    except OSError as error:
        log.say(f"step {step:>6}: checkpoint NOT saved, training goes on: {error}")
        return False
    log.say(f"step {step:>6}: saved {path}")
    try:
        checkpoint.prune(run_dir, config.keep_last)
    except OSError as error:
        log.say(f"step {step:>6}: old checkpoints stay, training goes on: {error}")
    return True


def check_health(config: TrainConfig, records: list[dict]) -> None:
    """End a run that no longer learns; its checkpoints stay."""
    for record in records:
        if record["skipped"] >= config.max_skipped_steps or record["loss_scale"] < MIN_LOSS_SCALE:
            saved = checkpoint.steps(Path(config.out_dir))
            last = checkpoint.folder(Path(config.out_dir), saved[-1]) if saved else "none"
            raise UserError(
                f"stopped at step {record['step']}: {record['skipped']} steps skipped in a row, "
                f"loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}, loss scale "
                f"{record['loss_scale']:g}; last good checkpoint: {last}; try a lower "
                "--learning_rate or --dtype=bfloat16, and look at the rows in metrics.jsonl"
            )


def open_log(
    config: TrainConfig,
    world: distributed.World,
    training: Training,
    max_steps: int,
) -> RunLog:
    """The run's log; rank 0 writes config.json and says what is about to run."""
    name = device_name(world.device)
    outputs = None
    if world.is_main:
        run_dir = Path(config.out_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.check_space(run_dir, training.raw_model.n_parameters(), config.keep_last)
        facts = {
            "settings": asdict(config),
            "parameters": training.raw_model.n_parameters(),
            "max_steps": max_steps,
            "tokens_per_step": training.identity["rows_per_step"] * config.block_size,
            "world_size": world.size,
            "device": name,
            "dtype": str(training.dtype).removeprefix("torch."),
            **provenance.versions(),
            "starts": provenance.starts(
                run_dir / "config.json",
                first_step=training.first_step,
                world_size=world.size,
                device=name,
            ),
        }
        write_atomically(run_dir / "config.json", json.dumps(facts, indent=2))
        print(settings.describe(config))
        print(
            f"{facts['parameters']:,} parameters, {max_steps:,} steps of "
            f"{facts['tokens_per_step']:,} tokens, {world.size} x {name}, {facts['dtype']}, "
            f"torch {facts['torch']}",
            flush=True,
        )
        wandb = None
        if config.wandb != "disabled":
            wandb = WandbThread(
                mode=config.wandb,
                project=config.wandb_project,
                name=config.wandb_run_name or run_dir.name,
                folder=run_dir,
                config=asdict(config),
            )
        file = MetricsFile(run_dir / "metrics.jsonl", training.metrics_bytes)
        outputs = (file, Console(training.first_step, max_steps), wandb)
    return RunLog(
        outputs,
        device=world.device,
        n_devices=world.size,
        peak=peak_flops(name, training.dtype),
    )


def main(config: TrainConfig) -> None:
    splits = open_splits(config)
    with distributed.start(config.device, config.hang_seconds) as world:
        config = fit_micro_batch(config, world)
        try:
            run(config, world, splits)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
            raise UserError(
                f"{reason} at micro_batch_size={config.micro_batch_size}; halve it, the steps stay "
                "the same; or use --gradient_checkpointing=True"
            ) from error


def run(
    config: TrainConfig,
    world: distributed.World,
    splits: tuple[bins.Split, bins.Split],
) -> None:
    """Build, train, close. Its own function, so that DDP is gone before the process group: the last
    reference to a group must not be DDP's, whose end waits for gloo's threads with the GIL held.
    """
    check_divides(config, world.size)
    order = row_order(config, splits[0])
    max_steps = count_steps(config, order)
    stop = distributed.StopSignal()
    training = build(config, world, splits[0])
    log = open_log(config, world, training, max_steps)
    if training.first_step >= max_steps:
        log.say(f"the run is complete: {training.first_step} steps in {config.out_dir}")
    else:
        loop(config, world, training, log, stop, splits, order, max_steps)
    log.close()


def loop(
    config: TrainConfig,
    world: distributed.World,
    training: Training,
    log: RunLog,
    stop: distributed.StopSignal,
    splits: tuple[bins.Split, bins.Split],
    order: bins.RowOrder,
    max_steps: int,
) -> None:
    """One pass for each step: evaluate and save what is due, then train. Call on every rank.

    `step` counts the updates that are done. The last pass only evaluates and saves.
    """
    train_split, val_split = splits
    n_val_rows = val_split.n_rows(config.block_size)
    n_eval_rows = min(config.eval_rows, n_val_rows) if config.eval_rows else n_val_rows
    best_loss = checkpoint.best_loss(Path(config.out_dir))
    saved = True  # rank 0 alone saves; the others hear of a failure at the end
    # A broken evaluation shows in the first minute, not at the first interval.
    two_batches = min(n_eval_rows, 2 * config.micro_batch_size * world.size)
    loss = evaluate(training, val_split, world, config, n_rows=two_batches)
    log.say(f"step {training.first_step:>6}: validation loss of two batches {loss:.4f}")
    log.restart_clock()
    for step in range(training.first_step, max_steps + 1):
        distributed.expect_progress(config.hang_seconds)
        stopping = world.any(stop.requested)
        is_last = stopping or step == max_steps
        is_new = step > training.first_step  # a resumed step was evaluated and saved before
        eval_due = is_new and (step % config.eval_interval == 0 or step == max_steps)
        save_due = is_new and (step % config.save_interval == 0 or is_last)
        if eval_due or save_due:
            check_health(config, log.flush(max_steps - step))
            val_loss = None
            if eval_due:
                started = time.perf_counter()
                val_loss = evaluate(training, val_split, world, config, n_rows=n_eval_rows)
                log.val(step, val_loss, time.perf_counter() - started)
                save_due |= val_loss < best_loss
            if save_due and world.is_main:
                saved = save(config, step, training, log, val_loss)
                best_loss = checkpoint.best_loss(Path(config.out_dir))
            log.restart_clock()
        if is_last:
            if world.any(not saved):
                raise UserError(
                    f"step {step} is not saved; free some space and run the same command again: it "
                    "goes on from the newest checkpoint"
                )
            if stopping:
                log.say(f"stopped by a signal at step {step}; the same command goes on from there")
            return
        train_one(config, world, training, log, train_split, order, step, max_steps)
        if (step + 1) % config.log_interval == 0:
            check_health(config, log.flush(max_steps - step - 1))


def train_one(
    config: TrainConfig,
    world: distributed.World,
    training: Training,
    log: RunLog,
    split: bins.Split,
    order: bins.RowOrder,
    step: int,
    max_steps: int,
) -> None:
    """Take the step that follows `step` updates, and queue its figures. Call on every rank."""
    learning_rate = optim.lr_at(
        step,
        max_steps=max_steps,
        warmup_steps=config.warmup_steps,
        learning_rate=config.learning_rate,
        min_learning_rate=config.min_learning_rate,
        decay=config.decay,
    )
    optim.set_learning_rate(training.optimizer, learning_rate)
    n_targets = bins.count_targets(split, order.step(step), config.block_size, config.loss_on)
    numbers = order.numbers(step, world.rank, world.size)
    stats = train_step(
        training.model,
        training.optimizer,
        training.scaler,
        training.guard,
        ((n, read_micro_batch(config, split, order, n)) for n in numbers),
        n_micro_steps=len(numbers),
        n_targets=max(1, n_targets),  # a step may hold no assistant token at all
        world=world,
        dtype=training.dtype,
        grad_clip=config.grad_clip,
        seed=config.seed,
    )
    n_tokens = order.rows_per_step * config.block_size
    fields = {
        "step": step,
        "lr": learning_rate,
        "epoch": order.epoch(step),
        "tokens": (step + 1) * n_tokens,
        "rows": order.step(step),
    }
    flops = training.raw_model.flops(n_tokens, n_targets)
    log.train(fields, stats, n_tokens=n_tokens, flops=flops)


def read_micro_batch(
    config: TrainConfig, split: bins.Split, order: bins.RowOrder, number: int
) -> bins.Batch:
    return bins.read_batch(split, order.micro_batch(number), config.block_size, config.loss_on)


if __name__ == "__main__":
    with settings.one_line_errors():
        distributed.record(main)(arguments)  # torchrun's last words are the first error
