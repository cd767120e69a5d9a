"""When a run no longer learns: it ends, its checkpoints stay, and the error says the way back."""

from pathlib import Path

import torch
from torch import nn

from nanosynth import UserError, checkpoint

# Below it the smallest float16 gradients underflow to zero, and the run only seems to train.
MIN_LOSS_SCALE = 1.0


def check_steps(records: list[dict], max_skipped_steps: int, run_dir: Path) -> None:
    """Raise UserError where the records of steps tell of too many skipped, or of no loss scale."""
    for record in records:
        step, n_skipped, loss_scale = record["step"], record["skipped"], record["loss_scale"]
        if n_skipped >= max_skipped_steps or loss_scale < MIN_LOSS_SCALE:
            raise UserError(
                f"stopped at step {step}: {n_skipped} steps skipped in a row, loss "
                f"{record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}, loss scale "
                f"{loss_scale:g}; {way_back(run_dir, step - n_skipped)}, and look at the rows in "
                "metrics.jsonl"
            )


def check_weights(model: nn.Module, step: int, run_dir: Path) -> None:
    """Raise UserError where weights are ruined: no later step can mend them. Waits for the GPU."""
    if not torch.stack([weights.isfinite().all() for weights in model.parameters()]).all():
        raise UserError(
            f"stopped at step {step}: weights not finite; {way_back(run_dir, step - 1)}"
        )


def way_back(run_dir: Path, step: int) -> str:
    """What to do after trouble. The last good checkpoint is one of `step` or before: the weights
    then gave a step that was taken; of a later one's nothing good is known.
    """
    good = [saved for saved in checkpoint.steps(run_dir) if saved <= step]
    lower = "a lower --learning_rate or --dtype=bfloat16"
    if not good:
        return f"no checkpoint is older; try {lower} in another --out_dir"
    path = checkpoint.folder(run_dir, good[-1])
    return f"last good checkpoint: {path}; go on from it with --resume={path} and {lower}"
