"""Train a GPT on prepared bins: the settings, the loop, the step, a run's start and its saves.

Usage:
    python train.py config/demo.py
    torchrun --standalone --nproc_per_node=8 train.py config/1b.py --learning_rate=3e-4

Read on from `main`: it, `train`, `loop`, `take_step` and `train_step` are the training. What stands
below them builds what they use.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nanosynth import UserError, settings, terminal, tokenizer
from nanosynth.settings import setting

LARGEST_STEP = 1_000_000  # rows


@dataclass(frozen=True, kw_only=True)
class TrainConfig(settings.Settings):
    """Train a GPT on the bins of data_dir; checkpoints and metrics go to out_dir."""

    data_dir: str = setting("data/openhermes", "prepared bins", group="The run", path=True)
    verify_data: bool = setting(False, "read them whole, even where they look unchanged")
    out_dir: str = setting("out/run", "the run's folder", path=True)
    init_from: str = setting("", "weights to start from: a run's folder or a step's", path=True)
    resume: str = setting("auto", "auto: as out_dir stands; never; a step's folder", path=True)
    seed: int = setting(42, "of the weights, the data order and dropout", **settings.SEED)

    n_layer: int = setting(24, "blocks", group="The model", at_least=1, at_most=10_000)
    n_head: int = setting(16, "attention heads", at_least=1, at_most=10_000)
    n_embd: int = setting(1024, "channels", at_least=1, at_most=1_000_000)
    block_size: int = setting(2048, "context, in tokens", at_least=1, at_most=10_000_000)
    dropout: float = setting(0.0, "0 for one epoch; 0.1 or so for several", at_least=0, below=1)
    bias: bool = setting(True, "biases in Linear and LayerNorm, as GPT-2 has them")
    activation: Literal["gelu_tanh", "gelu"] = setting(
        "gelu_tanh", "GPT-2's tanh approximation of GELU, or the exact one, as nanoGPT has it"
    )

    rows_per_step: int = setting(0, "over all GPUs; 0: 32", group="The batch", at_least=0)
    micro_batch_size: int | Literal["auto"] = setting(
        4, "rows a GPU takes at once; auto: as many as fit", at_least=1, at_most=1_000_000
    )
    gradient_accumulation_steps: int = setting(
        0, "rows_per_step in micro-batches, over all GPUs", at_least=0, instead_of="rows_per_step"
    )
    max_steps: int = setting(0, "optimizer steps; 0: as epochs has it", at_least=0, at_most=10**9)
    epochs: float = setting(1.0, "passes over the rows, if not max_steps", above=0, at_most=10_000)

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "muon: on the blocks' matrices, AdamW on the rest", group="The optimizer"
    )
    learning_rate: float = setting(2e-4, "the peak, after warmup", at_least=0)
    embedding_learning_rate: float = setting(
        0.0, "the embeddings' peak, of tokens and positions; 0: learning_rate", at_least=0
    )
    min_learning_rate: float = setting(2e-5, "where the decay ends", at_least=0)
    warmup_steps: int = setting(1000, "steps of linear warmup", at_least=0)
    decay: Literal["cosine", "linear"] = setting("cosine", "how the learning rate falls")
    zero_init: bool = setting(False, "residual projections start at zero, not at GPT-2's noise")
    weight_decay: float = setting(0.01, "on matrices and embeddings", at_least=0)
    beta1: float = setting(0.9, "AdamW's first moment", at_least=0, below=1)
    # 0.999, torch's default, remembers a spike for a thousand steps, a sixth of the run.
    beta2: float = setting(0.95, "AdamW's second moment", at_least=0, below=1)
    grad_clip: float = setting(1.0, "largest norm of the gradients; 0: no clipping", at_least=0)

    spike_sigmas: float = setting(
        8.0, "skip a loss so many sigmas above the last 128; 0: none", group="Trouble", at_least=0
    )
    max_skipped_steps: int = setting(20, "steps skipped in a row that end the run", at_least=1)
    hang_seconds: float = setting(
        600.0, "a step, with what is due, that takes longer ends the run", above=0, at_most=1e6
    )

    dtype: settings.DTYPE = setting(
        "auto", "auto: float16 on CUDA, bfloat16 on a CPU that has it", group="The machine"
    )
    compile: bool | Literal["auto"] = setting("auto", "torch.compile; auto: on CUDA")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    deterministic: bool = setting(False, "the same bits in every run on one kind of GPU; slower")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower")
    loss_on: Literal["all", "assistant"] = setting("all", "targets that count")

    eval_interval: int = setting(1000, "steps between evaluations", group="Records", at_least=1)
    eval_rows: int = setting(256, "validation rows, always the same ones; 0: all", at_least=0)
    save_interval: int = setting(5000, "steps between saves; a new best is saved too", at_least=1)
    # Two: the disk may tear one.
    keep_last: int = setting(3, "newest checkpoints kept, beside the best", at_least=2)
    budget_hours: float = setting(1.0, "device-hours it should take; said if passed", above=0)
    log_interval: int = setting(10, "steps a console line; metrics.jsonl has each", at_least=1)

    wandb: Literal["online", "offline", "disabled"] = setting("disabled", "where else metrics go")
    wandb_project: str = setting("nanosynth", "wandb project")
    wandb_run_name: str = setting("", "wandb run; empty: the name of out_dir")

    @property
    def step_rows(self) -> int:
        """Rows of a step over all GPUs, however they were said."""
        if self.rows_per_step or not self.gradient_accumulation_steps:
            return self.rows_per_step or 32
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def embedding_share(self) -> float:
        """The embeddings' learning rate as a share of the others', all through the schedule."""
        if not self.embedding_learning_rate:
            return 1.0
        return self.embedding_learning_rate / self.learning_rate

    def check(self) -> None:
        if self.learning_rate < self.min_learning_rate:
            why = f"wanted min_learning_rate={self.min_learning_rate} or more"
            self.refuse("learning_rate", why)
        if self.embedding_learning_rate and not self.learning_rate:
            self.refuse("learning_rate", "wanted above 0, with embedding_learning_rate beside it")
        if self.n_embd % self.n_head:
            self.refuse("n_head", f"wanted a divisor of n_embd={self.n_embd}")
        n_steps, size = self.gradient_accumulation_steps, self.micro_batch_size
        if size == "auto" and n_steps and not self.rows_per_step:
            why = "with --micro_batch_size=auto it follows by itself; say --rows_per_step"
            self.refuse("gradient_accumulation_steps", why)
        if self.step_rows > LARGEST_STEP:
            name = "rows_per_step" if self.rows_per_step else "gradient_accumulation_steps"
            self.refuse(name, f"wanted at most {LARGEST_STEP:,} rows a step")
        if size != "auto" and n_steps and self.step_rows != size * n_steps:
            why = f"but {n_steps} micro-batches (gradient_accumulation_steps) of {size} rows make "
            self.refuse("rows_per_step", f"{why}{size * n_steps}; give one of the two")
        check_divides(self, world_size=1)


def check_divides(config: TrainConfig, world_size: int) -> None:
    """Every rank takes as many whole micro-batches of a step as any other."""
    size = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    at_once = size * world_size
    if config.step_rows % at_once:
        below = config.step_rows // at_once * at_once
        wanted = " or ".join(f"--rows_per_step={n}" for n in (below, below + at_once) if n)
        over = f" over {world_size} GPUs" if world_size > 1 else ""
        raise UserError(
            f"{config.step_rows} rows a step do not divide{over} in micro-batches of {size}; use "
            f"{wanted}, or another --micro_batch_size"
        )


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
    make_deterministic,
    peak_flops,
)
from nanosynth.schema import misfit
from nanosynth.training import distributed, micro_batch, optim
from nanosynth.training.log import (
    Console,
    MetricsFile,
    RunLog,
    Wandb,
    device_hours,
    make_way,
    write_config,
)

# A run of some 6,000 steps has no time for torch's defaults (65,536, doubled every 2,000 steps): an
# overflow costs a step, so the scale starts at 2**13, three halvings lower, and where that is too
# low it doubles every 200 steps.
INIT_LOSS_SCALE, SCALE_GROWTH_STEPS = 2.0**13, 200
# Below it the smallest float16 gradients underflow to zero, and the run only seems to train.
MIN_LOSS_SCALE = 1.0


@dataclass(kw_only=True)
class Run:
    """Everything that a step changes or reads. The same on every rank, but for `world`."""

    config: TrainConfig
    world: distributed.World
    train_split: bins.Split
    val_split: bins.Split
    order: bins.RowOrder
    max_steps: int
    raw_model: GPT
    model: torch.nn.Module  # raw_model, or DDP around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the dtype is float16
    guard: optim.SpikeGuard
    dtype: torch.dtype
    identity: dict  # what must not change within a run
    first_step: int = 0
    metrics_bytes: int = 0  # of metrics.jsonl that the checkpoint knows

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    @property
    def tokens_per_step(self) -> int:
        return self.order.rows_per_step * self.config.block_size

    @property
    def n_eval_rows(self) -> int:
        n_rows = self.val_split.n_rows(self.config.block_size)
        return min(self.config.eval_rows or n_rows, n_rows)


def main(config: TrainConfig) -> None:
    started = time.perf_counter()
    splits = open_splits(config)  # before the ranks meet: a wrong folder is said at once
    with distributed.start(config.device, config.hang_seconds) as world:
        try:
            train(config, world, splits, started)
        except RuntimeError as error:
            if not settings.is_out_of_memory(error):
                raise
            reason = str(error).partition(". ")[0]
            raise UserError(
                f"{reason} at micro_batch_size={config.micro_batch_size}; halve it, the steps stay "
                "the same, or use --gradient_checkpointing=True"
            ) from error


def train(
    config: TrainConfig,
    world: distributed.World,
    splits: tuple[bins.Split, bins.Split],
    started: float,
) -> None:
    """Build, train, close. Its own function, so that DDP is gone before the process group: the last
    reference to a group must not be DDP's, whose end waits for gloo's threads with the GIL held.
    """
    stop = distributed.StopSignal()
    with world.own_folder(Path(config.out_dir)):  # two runs in one would delete each other's saves
        run = build(config, world, splits)
        # An error's last lines come after the log's.
        with contextlib.closing(open_log(run, started)) as log:
            if run.first_step < run.max_steps:
                with ThreadPoolExecutor(max_workers=1) as saver:  # its end waits for the last save
                    loop(run, log, stop, saver)
            else:
                if world.is_main and not run.guard.n_skipped:
                    # A kill may have cut short the deletions after the last save.
                    checkpoint.prune(run.out_dir, config.keep_last)
                finish(run, run.first_step, log, stopping=False, saved=True)


def loop(run: Run, log: RunLog, stop: distributed.StopSignal, saver: ThreadPoolExecutor) -> None:
    """One pass for each step: evaluate and save what is due, then train. Call on every rank.

    `step` counts the updates that are done. The last pass only evaluates and saves.
    """
    config, world = run.config, run.world
    is_owed = False  # a save that trouble has put off
    saving = saver.submit(bool, True)  # the last save: whether its checkpoint is there
    # A broken evaluation shows in the first minute, not at the first interval.
    n_rows = min(run.n_eval_rows, 2 * run.order.micro_batch_size * world.size)
    loss = evaluate(run, n_rows)
    log.say(f"step {run.first_step:>6}: validation loss of two batches {loss:.4f}")
    log.restart_clock()
    for step in range(run.first_step, run.max_steps + 1):
        # A rank that waits for another one for ever can't be told by itself: a clock tells it.
        distributed.expect_progress(config.hang_seconds)
        if saving.done():
            saving.result()  # raises what the save has raised
        stopping = world.any(stop.requested)  # a collective, so all ranks stop at one step
        is_last = stopping or step == run.max_steps
        is_new = step > run.first_step  # a resumed step was evaluated and saved before
        # The same on all ranks: an evaluation is a collective.
        eval_due = is_new and (step % config.eval_interval == 0 or step == run.max_steps)
        save_due = is_new and (step % config.save_interval == 0 or is_last or is_owed)
        if eval_due or save_due:
            check_steps(run, log.flush(run.max_steps - step))
            check_weights(run, step)  # what is ruined is neither measured nor saved as good
            val_loss = None
            if eval_due:
                started = time.perf_counter()
                val_loss = evaluate(run, run.n_eval_rows)
                log.val(step, val_loss, time.perf_counter() - started)
            saving.result()  # one save at a time; and only what is saved counts as the best
            best_loss = checkpoint.best_loss(run.out_dir)
            is_best = val_loss is not None and val_loss < best_loss  # NaN never is
            # Among skipped steps there may be no way on from here: what is due waits until one is
            # taken; the last save can't, but no good one is deleted for it.
            in_trouble = bool(run.guard.n_skipped)  # alike on all ranks
            is_owed = save_due and in_trouble and not is_last
            is_due = save_due and not is_owed
            if world.any(is_due or (world.is_main and is_best)):  # a collective
                prune = is_best or not in_trouble
                saving = save(run, step, log, val_loss, saver, prune=prune)
            log.restart_clock()  # neither counts as training in tokens a second
        if is_last:  # the last pass trains nothing
            return finish(run, step, log, stopping=stopping, saved=saving.result())

        take_step(run, step, log)
        if (step + 1) % config.log_interval == 0:
            # Reads figures, so it waits for the GPU; between, the host queues steps ahead of it.
            check_steps(run, log.flush(run.max_steps - step - 1))


def take_step(run: Run, step: int, log: RunLog) -> None:
    """The update that follows `step` updates; its figures wait in the log. Call on every rank."""
    config = run.config
    learning_rate = optim.lr_at(
        step,
        max_steps=run.max_steps,
        warmup_steps=config.warmup_steps,
        learning_rate=config.learning_rate,
        min_learning_rate=config.min_learning_rate,
        decay=config.decay,
    )
    optim.set_learning_rate(run.optimizer, learning_rate)  # of each group, its share of it
    # Counted from the mask before anything is computed, so that each micro-batch's loss can be
    # divided by the whole step's targets at once.
    rows = run.order.step(step)  # by arithmetic: no loader whose state a resume would need
    n_targets = bins.count_targets(run.train_split, rows, config.block_size, config.loss_on)
    n_targets = max(1, n_targets)  # a step may hold no assistant token at all
    stats = train_step(run, micro_batches(run, step), n_targets)
    facts = {
        "step": step,
        "lr": learning_rate,
        "epoch": run.order.epoch(step),
        "tokens": (step + 1) * run.tokens_per_step,
        "rows": rows,
    }
    # Of the model, not of the program: what is computed twice (checkpointing) counts once.
    flops = run.raw_model.flops(run.tokens_per_step, n_targets)
    log.train(facts, stats, n_tokens=run.tokens_per_step, flops=flops)


def train_step(run: Run, batches: Iterable[tuple[int, bins.Batch]], n_targets: int) -> Tensor:
    """One update from this rank's numbered micro-batches; [loss, grad_norm, loss_scale, n_skipped]
    (4,), which stay on the device: nothing here waits for it. Call on every rank.

    A loss spike, or a gradient that is not finite on any rank, leaves weights and moments as they
    are on all ranks.
    """
    config, world, scaler = run.config, run.world, run.scaler
    n_micro_steps = run.order.micro_batches_per_step // world.size  # of this rank
    loss = torch.zeros((), device=world.device)  # for the log and the guard; not what is derived
    for micro_step, (number, batch) in enumerate(batches):
        # Dropout belongs to the micro-batch, not to the process: a resumed run and any number of
        # ranks draw the same masks.
        seeds = np.random.SeedSequence([config.seed, number])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        # Gradients add up in .grad over the micro-batches, and travel with the last one's alone.
        with contextlib.ExitStack() as contexts:
            if world.size > 1 and micro_step < n_micro_steps - 1:
                contexts.enter_context(run.model.no_sync())
            # Products in half precision; weights, norms and the loss in float32.
            with autocast(world.device, run.dtype):
                loss_sum = run.model(*batch.to(world.device)).sum()  # (N,) -> ()
            # The step's loss is a sum over all micro-batches and ranks, divided by all their
            # targets: a mean of means would weigh a micro-batch of few answers as much as one of
            # many. DDP averages gradients over the ranks; times their number makes the sum.
            scaler.scale(loss_sum * (world.size / n_targets)).backward()
        loss += loss_sum.detach() / n_targets
    world.sum(loss)  # a collective: the guard must see the same loss everywhere
    loss_scale = scaler.scale(torch.ones((), device=world.device))
    # float16 holds nothing below 6e-8: gradients are computed of the loss times the scale, and
    # divided by it here, in float32, before they are clipped.
    scaler.unscale_(run.optimizer)
    # DDP has made the gradients the same on all ranks, so their norm is too: not finite on one rank
    # is not finite on all.
    # All gradients as one vector (Pascanu et al. 2013): its direction stays, its length is cut.
    grad_norm = optim.clip_gradients(run.model.parameters(), config.grad_clip)
    accepted = run.guard.accepts(loss) & grad_norm.isfinite()  # alike on all ranks
    run.guard.note(loss, accepted)
    # A fused optimizer leaves everything as it is where found_inf is 1, without asking the host:
    # the way GradScaler.step tells it, used directly so that every dtype, and a spike as well as an
    # overflow, takes the same path. unscale_ has told the scaler of an overflow already.
    run.optimizer.found_inf = (~accepted).float()
    run.optimizer.step()
    scaler.update()  # half the scale after an overflow, twice after SCALE_GROWTH_STEPS without
    run.optimizer.zero_grad(set_to_none=True)  # freed, not filled: the next backward writes anew
    return torch.stack([loss, grad_norm, loss_scale, run.guard.n_skipped])


def micro_batches(run: Run, step: int) -> Iterator[tuple[int, bins.Batch]]:
    """This rank's share of a step: (number in the whole run, batch), read as it is asked for."""
    config = run.config
    for number in run.order.numbers(step, run.world.rank, run.world.size):
        rows = run.order.micro_batch(number)
        yield number, bins.read_batch(run.train_split, rows, config.block_size, config.loss_on)


@torch.no_grad()
def evaluate(run: Run, n_rows: int) -> float:
    """Mean loss over the first `n_rows` validation rows, NaN without a target there: always the
    same rows, so that two evaluations differ by the weights alone. Call on every rank.
    """
    config, world, size = run.config, run.world, run.order.micro_batch_size
    # The bare model: DDP would gather buffers and expects a backward pass.
    run.raw_model.eval()  # no dropout
    # float64, and one division at the end: a mean of batch means would depend on their sizes.
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)  # loss sum, targets
    # Batches are dealt out to the ranks in turn; the sums are the same for any number of them.
    for start in range(world.rank * size, n_rows, world.size * size):
        rows = list(range(start, min(start + size, n_rows)))
        n_targets = bins.count_targets(run.val_split, rows, config.block_size, config.loss_on)
        # All batches are whole, the last one by a row that doesn't count: another shape would make
        # the compiled graphs general, and slow.
        rows += rows[-1:] * (size - len(rows))
        batch = bins.read_batch(run.val_split, rows, config.block_size, config.loss_on)
        with autocast(world.device, run.dtype):
            losses = run.raw_model(*batch.to(world.device))  # (N,)
        totals[0] += losses[:n_targets].double().sum()
        totals[1] += n_targets
    run.raw_model.train()
    loss_sum, n_targets = world.sum(totals).tolist()  # a collective
    return loss_sum / n_targets if n_targets else math.nan


def save(
    run: Run,
    step: int,
    log: RunLog,
    val_loss: float | None,
    saver: ThreadPoolExecutor,
    *,
    prune: bool = True,
) -> Future[bool]:
    """Begin the checkpoint of `step`, by rank 0: copied now, written while training goes on. With
    `prune`, older ones go then. Call on every rank; what it gives is `publish`'s.

    No state of the data order, which is arithmetic on the step, nor of random numbers, which each
    micro-batch seeds anew.
    """
    optimizer = run.optimizer.state_dict()  # a collective, of Muon's
    if not run.world.is_main:
        return saver.submit(bool, True)
    state = {
        "optimizer": optimizer,
        "scaler": run.scaler.state_dict(),  # a scale found anew would cost overflows
        "guard": run.guard.state_dict(),  # the last losses, which the next is judged by
        "metrics_bytes": log.file.size(),  # a resume cuts off what lies behind
    }
    meta = {
        "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
        "identity": run.identity,
        "settings": asdict(run.config),
        "torch": str(torch.__version__),
    }
    model = run.raw_model.state_dict()  # of the bare model: no prefix of DDP's or compile's
    content = checkpoint.on_host({"model": model, "train_state": state, "meta": meta})
    return saver.submit(publish, run, step, log, content, prune=prune)


def publish(run: Run, step: int, log: RunLog, content: dict, *, prune: bool) -> bool:
    """Write what `save` has copied, and delete what is no longer kept; whether the checkpoint is
    there: a full disk costs it, not the run. In the saver's thread.
    """
    try:
        log.file.sync(content["train_state"]["metrics_bytes"])
        path = checkpoint.save(run.out_dir, step, **content)
    except OSError as error:
        log.say(f"step {step:>6}: checkpoint NOT saved, training goes on: {error}")
        return False
    log.say(f"step {step:>6}: saved {path}")
    try:
        if prune:
            checkpoint.prune(run.out_dir, run.config.keep_last)
    except OSError as error:
        log.say(f"step {step:>6}: old checkpoints stay, training goes on: {error}")
    return True


def check_steps(run: Run, records: list[dict]) -> None:
    """Raise UserError where steps tell of too many skipped in a row, or of no loss scale."""
    for record in records:
        step, n_skipped, loss_scale = record["step"], record["skipped"], record["loss_scale"]
        if n_skipped >= run.config.max_skipped_steps or loss_scale < MIN_LOSS_SCALE:
            raise UserError(
                f"stopped at step {step}: {n_skipped} steps skipped in a row, loss "
                f"{record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}, loss scale "
                f"{loss_scale:g}; {way_back(run, step - n_skipped)}, and look at the rows in "
                "metrics.jsonl"
            )


def check_weights(run: Run, step: int) -> None:
    """Raise UserError where weights are ruined: no later step can mend them. Waits for the GPU."""
    if not torch.stack([weights.isfinite().all() for weights in run.raw_model.parameters()]).all():
        raise UserError(f"stopped at step {step}: weights not finite; {way_back(run, step - 1)}")


def way_back(run: Run, step: int) -> str:
    """What to do after trouble. The last good checkpoint is one of `step` or before: the weights
    then gave a step that was taken; of a later one's nothing good is known.
    """
    good = [saved for saved in checkpoint.steps(run.out_dir) if saved <= step]
    lower = "a lower --learning_rate or --dtype=bfloat16"
    if not good:
        return f"no checkpoint is older; try {lower} in another --out_dir"
    path = checkpoint.folder(run.out_dir, good[-1])
    return f"last good checkpoint: {path}; go on from it with --resume={path} and {lower}"


def finish(run: Run, step: int, log: RunLog, *, stopping: bool, saved: bool) -> None:
    """Say how the run ended and what comes next. Call on every rank."""
    if run.world.any(not saved):
        raise UserError(
            f"step {step} is not saved; free some space and run the same command again: it goes on "
            "from the newest checkpoint"
        )
    log.end(step)
    if stopping:
        log.say(f"stopped by a signal at step {step}; the same command goes on from there")
        return
    name = run.config.out_dir
    log.say(f"the run is complete: {step} steps in {name}; what next:")
    log.say(f"  python eval_ppl.py --run={name}       # its perplexity")
    log.say(f"  python sample.py --run={name} --chat  # talk to it")
    log.say(f"  python -m verdict --run={name}        # its answers measured, and a report")


def open_splits(config: TrainConfig) -> tuple[bins.Split, bins.Split]:
    train, val = (
        bins.Split(config.data_dir, name, verify=config.verify_data) for name in bins.SPLITS
    )
    for split in (train, val):
        if not split.n_rows(config.block_size):
            raise UserError(
                f"{split.path} has {split.n_tokens} tokens, less than one row of block_size="
                f"{config.block_size}; use a smaller --block_size or more data"
            )
    return train, val


def model_config(config: TrainConfig) -> GPTConfig:
    return GPTConfig(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        block_size=config.block_size,
        vocab_size=tokenizer.VOCAB_SIZE,
        dropout=config.dropout,
        bias=config.bias,
        activation=config.activation,
    )


def row_order(config: TrainConfig, world: distributed.World, n_rows: int) -> bins.RowOrder:
    """Which rows each step takes, in micro-batches. Call on every rank."""
    check_divides(config, world.size)
    size = config.micro_batch_size
    if size == "auto":
        size = micro_batch.largest(
            model_config(config),
            config.step_rows // world.size,
            world=world,
            dtype=choose_dtype(config.dtype, world.device),
            gradient_checkpointing=config.gradient_checkpointing,
            is_compiled=is_compiled(config, world.device),
        )
        if world.is_main:
            n_steps = config.step_rows // size
            terminal.say(
                f"micro_batch_size=auto: {size} rows at once, {n_steps} micro-batches a step"
            )
    return bins.RowOrder(
        n_rows=n_rows,
        micro_batch_size=size,
        micro_batches_per_step=config.step_rows // size,
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


def is_compiled(config: TrainConfig, device: torch.device) -> bool:
    return config.compile is True or (config.compile == "auto" and device.type == "cuda")


def build(
    config: TrainConfig, world: distributed.World, splits: tuple[bins.Split, bins.Split]
) -> Run:
    """The run as its checkpoint left it, or a new one. Call on every rank."""
    train_split, val_split = splits
    if config.deterministic:
        make_deterministic()
    if world.device.type == "cpu":
        keep_freed_memory()
    order = row_order(config, world, train_split.n_rows(config.block_size))
    max_steps = count_steps(config, order)
    dtype = choose_dtype(config.dtype, world.device)
    raw_model = new_model(config, world.device)
    # The optimizer keeps float32 weights and moments; only products are in half precision.
    run = Run(
        config=config,
        world=world,
        train_split=train_split,
        val_split=val_split,
        order=order,
        max_steps=max_steps,
        raw_model=raw_model,
        model=raw_model,
        optimizer=optim.build_optimizer(
            config.optimizer,
            raw_model,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            world=world,
            embedding_share=config.embedding_share,
            is_compiled=is_compiled(config, world.device),
        ),
        scaler=torch.amp.GradScaler(
            world.device.type,
            init_scale=INIT_LOSS_SCALE,
            growth_interval=SCALE_GROWTH_STEPS,
            enabled=dtype == torch.float16,
        ),
        guard=optim.SpikeGuard(config.spike_sigmas, world.device),
        dtype=dtype,
        identity=identity(config, train_split),
    )
    restore(run)  # before DDP wraps the model, and sends what was loaded
    if is_compiled(config, world.device):
        # Block by block already; DDP's own cuts, by its buckets' 25 MB, would make more graphs.
        torch._dynamo.config.optimize_ddp = False
        raw_model.compile()
    if world.size > 1:  # DDP sends rank 0's weights to the others
        run.model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)
    return run


def new_model(config: TrainConfig, device: torch.device) -> GPT:
    micro_batch.check_fits(model_config(config), device)
    torch.manual_seed(config.seed)  # the same weights on every rank, without sending them
    with device:
        model = GPT(model_config(config))
    if config.zero_init:
        model.zero_projections()
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def identity(config: TrainConfig, train: bins.Split) -> dict:
    """What must not change within a run: the model, the data, and the order in which it is seen.

    Learning rates, intervals, dtype, device and the number of ranks may.
    """
    return {
        "model": asdict(model_config(config)),
        "seed": config.seed,
        "rows_per_step": config.step_rows,
        "loss_on": config.loss_on,
        "optimizer": config.optimizer,
        "data_sha256": train.sha256,
    }


def restore(run: Run) -> None:
    """Take on what the run's checkpoint has, or the weights of --init_from. Call on every rank."""
    config, world = run.config, run.world

    def look() -> Path | None:
        path = checkpoint.find_start(run.out_dir, config.resume, run.identity, terminal.say)
        if path is None:
            make_way(run.out_dir)
        return path

    path = world.on_main(look)  # one rank, since looking sets damaged folders aside
    if path is None:
        if config.init_from:
            start = world.on_main(lambda: checkpoint.find(config.init_from))
            load_weights(run.raw_model, start)
        return
    meta = load_weights(run.raw_model, path)
    state = checkpoint.read_train_state(path)
    if wrong := misfit(state, checkpoint.STATE):
        raise checkpoint.Damaged(f"{path}: its training state is not of its form: {wrong}")
    run.first_step = meta["step"]
    with checkpoint.must_fit(path):
        run.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run was in float32 or bfloat16 until here
            run.scaler.load_state_dict(state["scaler"])
        run.guard.load_state_dict(state["guard"])
    # Of another run's folder, given by --resume, the metrics stay there.
    run.metrics_bytes = state["metrics_bytes"] if path.parent == run.out_dir else 0


def load_weights(raw_model: GPT, path: Path) -> dict:
    """Copy a step folder's weights into the model; the folder's meta."""
    meta = checkpoint.read_meta(path)
    theirs, ours = meta["identity"].get("model", {}), asdict(raw_model.config)
    del ours["dropout"]  # which may change
    different = {key: theirs.get(key) for key in ours if theirs.get(key) != ours[key]}
    if different:
        flags = " ".join(f"--{key}={value}" for key, value in different.items())
        raise UserError(f"{path} holds a model of another shape; its settings are {flags}")
    with checkpoint.must_fit(path):
        raw_model.load_state_dict(checkpoint.read_model(path, meta))
    return meta


def open_log(run: Run, started: float) -> RunLog:
    """The run's log; rank 0 writes config.json and says what is about to run. `started` is when, by
    time.perf_counter().
    """
    config, world, out_dir = run.config, run.world, run.out_dir
    name, metrics = device_name(world.device), out_dir / "metrics.jsonl"
    spent_hours = device_hours(metrics)  # before a resumed run's file is cut off
    file = console = wandb = None
    if world.is_main:
        n_parameters = run.raw_model.n_parameters()
        checkpoint.check_space(out_dir, n_parameters, config.keep_last)
        facts = {
            "settings": asdict(config),
            "parameters": n_parameters,
            "max_steps": run.max_steps,
            "tokens_per_step": run.tokens_per_step,
            "world_size": world.size,
            "device": name,
            "dtype": str(run.dtype).removeprefix("torch."),
        }
        run_id = write_config(out_dir / "config.json", facts, first_step=run.first_step)
        console = Console(run.first_step, run.max_steps)
        console.say(
            f"{settings.describe(config)}\n"
            f"{n_parameters:,} parameters, {run.max_steps:,} steps of {run.tokens_per_step:,} "
            f"tokens, {world.size} x {name}, {facts['dtype']}, torch {torch.__version__}"
        )
        if not run.train_split.has_mask:
            console.say(
                f"{config.data_dir} is nanoGPT's (no meta.json): plain text, every token counts"
            )
        if config.wandb != "disabled":
            wandb = Wandb(
                console.say,
                id=run_id,
                mode=config.wandb,
                project=config.wandb_project,
                name=config.wandb_run_name or out_dir.name,
                dir=str(out_dir),
                config=asdict(config),
            )
        file = MetricsFile(metrics, run.metrics_bytes, console.say)
    return RunLog(
        file,
        console,
        wandb,
        world=world,
        peak=peak_flops(name, run.dtype),
        budget_hours=config.budget_hours,
        spent_hours=spent_hours,
        started=started,
    )


if __name__ == "__main__":
    with settings.one_line_errors():
        distributed.record(main)(arguments)  # torchrun's last words are the first error
