"""A checkpoint of nanoGPT as a run.

Usage:
    python -m convert.nanogpt --source=out-owt/ckpt.pt --to=out/owt
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from nanosynth import UserError, settings
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class NanoGPTConfig(settings.Settings):
    """nanoGPT's ckpt.pt to a run, for sample.py, eval_ppl.py, verdict and train.py --init_from."""

    source: str = setting("", "nanoGPT's ckpt.pt", group="What is brought", path=True)
    to: str = setting("", "a new or empty folder", path=True)

    def check(self) -> None:
        if not self.source or not self.to:
            raise UserError("wanted --source=.../ckpt.pt and --to=FOLDER, a new one")


if __name__ == "__main__":
    arguments = settings.from_argv(NanoGPTConfig)  # before torch takes its time

import torch

from convert import runs
from nanosynth import tokenizer

MASK = re.compile(r"\.attn\.bias$")  # the causal mask, kept where torch had no flash attention
ROWS = (runs.N_BPE, tokenizer.VOCAB_SIZE)  # GPT-2's tokens, and padded


def bring_model(source: Path, folder: Path, name: str) -> str:
    """Make a run of one checkpoint in `folder` from a ckpt.pt; what was read."""
    found = read_checkpoint(source)
    shape = read_shape(source, found["model_args"])
    tensors = {
        str(key).removeprefix("_orig_mod."): tensor  # which torch.compile put there
        for key, tensor in found["model"].items()
        if not MASK.search(str(key))
    }
    chat_rows = runs.same_rows(shape["vocab_size"])
    tensors = runs.as_ours(tensors, shape, chat_rows, str(source), "model_args")
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    steps = found["iter_num"] if isinstance(found.get("iter_num"), int) else None
    origin = {"folder": str(source), "sha256": digest, "steps": steps}
    n_parameters = runs.write(folder, name, shape, tensors, origin)
    after = "" if steps is None else f" after {steps} steps of nanoGPT"
    return f"{source}, {n_parameters:,} parameters{after}"


def read_checkpoint(source: Path) -> dict:
    """What nanoGPT saves, on the CPU. It is read without running code of it."""
    with runs.reading(source, "is not read as a ckpt.pt of nanoGPT"):
        found = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(found.get(key), dict) for key in ("model", "model_args")):
            there = ", ".join(f"{key} ({type(found[key]).__name__})" for key in found)
            raise TypeError(f"it has {there}; wanted model and model_args, a dict each")
    return found


def read_shape(source: Path, arguments: dict) -> dict:
    """A GPTConfig's settings from nanoGPT's model_args."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    if absent := [name for name in names if arguments.get(name) is None]:
        raise UserError(f"{source}: its model_args lack {', '.join(absent)}")
    if (n_rows := arguments["vocab_size"]) not in ROWS:
        either = " or ".join(map(str, ROWS))
        raise UserError(f"{source} has vocab_size={n_rows}; wanted {either}, of GPT-2's tokenizer")
    # nanoGPT computes the exact GELU, of GPT-2's own weights too.
    shape = {**{name: arguments[name] for name in names}, "activation": "gelu"}
    runs.check_shape(shape, source)
    return shape


def main(config: NanoGPTConfig) -> None:
    with runs.new_folder(config.to) as folder:
        said = bring_model(Path(config.source), folder, config.to)
    print(f"{said}\nwritten to {config.to}")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
