"""A run as a folder that Hugging Face's transformers loads, and a GPT-2 of theirs as a run.

Usage:
    python export_hf.py --run=out/500m --to=out/500m-hf
    python export_hf.py --source=downloads/gpt2-medium --to=out/gpt2-medium
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nanosynth import UserError, settings
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class ExportConfig(settings.Settings):
    """A run to Hugging Face's GPT-2 format (--run), or from it (--source)."""

    run: str = setting("", "a run's folder, or one of its step folders, to export")
    step: str = setting("best", "which checkpoint of it: best, latest or a step's number")
    source: str = setting("", "a folder with a GPT-2 in Hugging Face's format, to make a run of")
    to: str = setting("", "the new folder; must not exist, or be empty")

    def check(self) -> None:
        if bool(self.run) == bool(self.source):
            raise UserError("wanted one of --run=RUN (to export it) and --source=FOLDER (to bring)")
        if self.source and self.step != "best":
            raise UserError(f"--step={self.step} goes with --run; --source has one set of weights")
        if not self.to:
            raise UserError("wanted --to=FOLDER, a new one")


if __name__ == "__main__":
    arguments = settings.from_argv(ExportConfig)  # before torch takes its time

import safetensors.torch
import torch

from convert.tensors import (
    HEAD,
    WEIGHTS,
    config_json,
    from_hf,
    generation_config,
    read_config,
    read_tensors,
    to_hf,
    weight_files,
)
from convert.tokenizer import check, special_tokens_map, tokenizer_config, tokenizer_json
from model import GPT, GPTConfig
from nanosynth import checkpoint
from nanosynth.files import new_folder
from nanosynth.tokenizer import VOCAB_SIZE


def export_run(run: str, step: str, folder: Path) -> str:
    """Write a run's checkpoint into `folder` as transformers reads it; what was written."""
    path = checkpoint.find(run, step)
    meta = checkpoint.read_meta(path)
    model = meta["identity"]["model"]
    if model["vocab_size"] != VOCAB_SIZE:
        found = f"{path} has a vocabulary of {model['vocab_size']}"
        raise UserError(f"{found}; the tokenizer's model has {VOCAB_SIZE}")
    tensors = to_hf(checkpoint.read_model(path, meta))
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    contents = {
        "config.json": config_json(model),
        "generation_config.json": generation_config(),
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": tokenizer_config(model["block_size"]),
        "special_tokens_map.json": special_tokens_map(),
    }
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    # safetensors makes a file that its owner alone may read.
    shutil.copymode(folder / "config.json", folder / WEIGHTS)
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    filled = "" if model["bias"] else "; it has no biases, zeros stand for them"
    return f"{path}, {n_parameters:,} parameters in float32{filled}"


def bring_model(source: Path, folder: Path, name: str) -> str:
    """Make a run of one checkpoint in `folder` from a GPT-2 of transformers; what was read."""
    if not source.is_dir():
        raise UserError(f"no folder {str(source)!r}; wanted one with config.json and weights")
    theirs = read_config(source / "config.json")
    model = {**theirs, "vocab_size": VOCAB_SIZE}
    checked = check(source)
    paths = weight_files(source)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in GPT(GPTConfig(**model)).state_dict().items()}
    try:
        tensors = from_hf(read_tensors(paths), shapes, theirs["vocab_size"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    # Nothing of how it was trained is known, so no run goes on from it; --init_from takes it.
    unknown = dict.fromkeys(("seed", "rows_per_step", "loss_on", "optimizer", "data_sha256"))
    facts = {
        "settings": {**model, "data_dir": "", "out_dir": name},
        "source": {"folder": str(source), "sha256": {path.name: sha256(path) for path in paths}},
        "torch": str(torch.__version__),
    }
    meta = {"val_loss": None, "identity": {"model": model, **unknown}, **facts}
    checkpoint.save(folder, 0, model=tensors, train_state={}, meta=meta)
    checkpoint.prune(folder, keep_last=1)
    n_parameters = sum(tensors[key].numel() for key in tensors if key != HEAD)
    facts = {**facts, "parameters": n_parameters, "max_steps": 0}
    (folder / "config.json").write_text(json.dumps(facts, indent=2))
    said = f"its {checked} is GPT-2's" if checked else "it has no tokenizer, GPT-2's is assumed"
    return f"{source}, {n_parameters:,} parameters; {said}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(config: ExportConfig) -> None:
    to = Path(os.path.abspath(config.to))
    try:
        with new_folder(to) as folder:
            if config.run:
                said = export_run(config.run, config.step, folder)
            else:
                said = bring_model(Path(config.source), folder, config.to)
    except OSError as error:
        raise UserError(f"--to={config.to} is not written: {error}") from None
    print(said)
    print(f"written to {config.to}")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
