"""A run's checkpoint as a model that is ready for inference: the one way to open a run."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT, GPTConfig
from nanosynth import UserError, checkpoint, tokenizer
from nanosynth.inference.speed import speed_up_inference


class LoadedRun(NamedTuple):
    model: GPT  # in evaluation mode, on its device
    path: Path  # the step folder
    meta: dict  # its meta.json


def load(
    run: str, step: str = "best", *, device: torch.device, dtype: torch.dtype, cast: bool = True
) -> LoadedRun:
    """The model of a run's step folder, which is verified first; `run` and `step` as in
    `checkpoint.find`. Raises UserError.

    With `cast` the weights are in `dtype`; without, they stay in float32 for autocast to multiply
    in `dtype`, as training does.
    """
    path = checkpoint.find(run, step)
    meta = checkpoint.read_meta(path)
    model = restored(path, meta)
    # Text is read and written with one tokenizer, so a model that lacks some of its ids is no use.
    if model.config.vocab_size < tokenizer.N_IDS:
        wanted = f"{tokenizer.N_IDS} or more: GPT-2's tokens and the chat marks"
        raise UserError(f"{path} has a vocabulary of {model.config.vocab_size}; wanted {wanted}")
    model.to(device, dtype if cast else torch.float32).eval()
    speed_up_inference(model, dtype)
    return LoadedRun(model, path, meta)


def restored(path: Path, meta: dict, *, copy: bool = True) -> GPT:
    """The model of a step folder; raises Damaged where the tensors are not of the shape that its
    meta.json tells, before a model of a forged size is built. Without `copy` it holds the tensors
    as they are read, and takes no memory of its own.
    """
    tensors = checkpoint.read_model(path, meta)
    n_stored = sum(tensor.numel() for tensor in tensors.values())
    with checkpoint.must_fit(path):
        config = GPTConfig(**meta["identity"]["model"])
        if not 1 <= config.n_layer <= len(tensors):
            raise ValueError(f"{config.n_layer} layers of {len(tensors)} tensors")
        if config.n_weights > n_stored:
            raise ValueError(f"{config.n_weights} weights wanted, {n_stored} there")
        with contextlib.nullcontext() if copy else torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(tensors, assign=not copy)
    return model
