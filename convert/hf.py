"""A run as a folder that Hugging Face's transformers loads, and a GPT-2 of theirs as a run.

Usage:
    python -m convert.hf --run=out/500m --to=out/500m-hf
    python -m convert.hf --source=downloads/gpt2-medium --to=out/gpt2-medium
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

from nanosynth import UserError, settings
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class HFConfig(settings.Settings):
    """A run to Hugging Face's GPT-2 format (--run), or from it (--source)."""

    run: str = setting("", "a run's folder, or a step's in it", group="A run to export", path=True)
    step: str = setting("best", "which checkpoint of it: best, latest or a step's number")
    source: str = setting("", "with config.json and weights", group="A GPT-2 to bring", path=True)
    to: str = setting("", "a new or empty folder", group="What is written", path=True)

    def check(self) -> None:
        if bool(self.run) == bool(self.source):
            raise UserError("wanted one of --run=RUN (to export it) and --source=FOLDER (to bring)")
        if self.source and self.step != "best":
            self.refuse("step", "it goes with --run; --source has one set of weights")
        if not self.to:
            raise UserError("wanted --to=FOLDER, a new one")
        if not importlib.util.find_spec("transformers"):
            raise UserError("transformers is missing; pip install -r requirements-eval.txt")


if __name__ == "__main__":
    arguments = settings.from_argv(HFConfig)  # before torch takes its time

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import load_state_dict

from convert import hf_tokenizer
from convert.hf_tokenizer import read_json
from nanosynth import checkpoint, tokenizer
from nanosynth.files import new_folder

transformers.logging.set_verbosity_error()  # what is wrong is said here, in one line
transformers.logging.disable_progress_bar()

WEIGHTS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MASK = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, which old files store
# What our GPT-2 computes. Where a config.json is silent, it means GPT2Config's default.
OURS: dict[str, tuple] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "vocab_size": (tokenizer.END_OF_TEXT + 1, tokenizer.VOCAB_SIZE),  # OpenAI's and ours
}


def export_run(run: str, step: str, folder: Path) -> str:
    """Write a run's checkpoint into an empty folder as transformers reads it; what was written."""
    path = checkpoint.find(run, step)
    meta = checkpoint.read_meta(path)
    shape = meta["identity"]["model"]
    if shape["vocab_size"] != tokenizer.VOCAB_SIZE:
        found = f"{path} has a vocabulary of {shape['vocab_size']}"
        raise UserError(f"{found}; the tokenizer's model has {tokenizer.VOCAB_SIZE}")
    model = to_hf(shape, checkpoint.read_model(path, meta))
    model.save_pretrained(folder)
    # safetensors makes a file that its owner alone may read.
    shutil.copymode(folder / "config.json", folder / WEIGHTS)
    hf_tokenizer.save(folder, shape["block_size"])
    filled = "" if shape["bias"] else "; it has no biases, zeros stand for them"
    return f"{path}, {model.num_parameters():,} parameters in float32{filled}"


def to_hf(shape: dict, tensors: dict[str, Tensor]) -> GPT2LMHeadModel:
    """transformers' GPT-2 of our tensors; zeros stand for absent biases, they add nothing."""
    ids = dict.fromkeys(("bos_token_id", "pad_token_id"), tokenizer.END_OF_TEXT)
    config = GPT2Config(
        **{name: shape[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        n_positions=shape["block_size"],
        n_ctx=shape["block_size"],  # llama.cpp's converter reads this one
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape["dropout"]),
        eos_token_id=tokenizer.IM_END,
        **ids,
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    zeros = {name: torch.zeros(shapes[name]) for name in shapes if name.endswith("bias")}
    model.load_state_dict(zeros | swap_layout(tensors), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        eos_token_id=list(tokenizer.STOP_IDS),
        suppress_tokens=list(range(tokenizer.N_IDS, tokenizer.VOCAB_SIZE)),  # rows of no token
        **ids,
    )
    return model


def swap_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours as theirs, or theirs as ours: a Linear of ours has its matrix as (out, in), a Conv1D of
    theirs as (in, out). All other tensors, and all names, are the same.
    """
    return {
        name: tensor.t().contiguous() if CONV1D.search(name) else tensor
        for name, tensor in tensors.items()
    }


def bring_model(source: Path, folder: Path, name: str) -> str:
    """Make a run of one checkpoint in `folder` from a GPT-2 of transformers; what was read."""
    config = read_config(source / "config.json")
    tokenizer_file = hf_tokenizer.check(source)
    files = weight_files(source)
    tensors = from_hf(config, read_tensors(files))
    shape = {
        **{name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")},
        "block_size": config.n_positions,
        "vocab_size": tokenizer.VOCAB_SIZE,
        "dropout": float(config.resid_pdrop),
        "bias": True,
    }
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    facts = {
        "settings": {**shape, "data_dir": "", "out_dir": name},
        "source": {"folder": str(source), "sha256": hashes},
        "torch": str(torch.__version__),
    }
    # Nothing of how it was trained is known, so no run goes on from it; --init_from takes it.
    unknown = dict.fromkeys(("seed", "rows_per_step", "loss_on", "optimizer", "data_sha256"))
    meta = {"val_loss": None, "identity": {"model": shape, **unknown}, **facts}
    checkpoint.save(folder, 0, model=tensors, train_state={}, meta=meta)
    checkpoint.prune(folder, keep_last=1)
    n_parameters = sum(tensor.numel() for tensor in tensors.values()) - tensors[HEAD].numel()
    facts |= {"parameters": n_parameters, "max_steps": 0}
    (folder / "config.json").write_text(json.dumps(facts, indent=2))
    said = f"its {tokenizer_file} is" if tokenizer_file else "it has no tokenizer, assumed is"
    return f"{source}, {n_parameters:,} parameters; {said} GPT-2's"


def read_config(path: Path) -> GPT2Config:
    """A config.json's settings of the model; those that our GPT-2 cannot have are refused."""
    content = read_json(path)
    if content.get("model_type") != "gpt2":
        raise UserError(f"{path} has model_type={content.get('model_type')!r}; wanted 'gpt2'")
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "resid_pdrop")
    read = {name: content[name] for name in (*sizes, "n_inner", *OURS) if name in content}
    try:
        config = GPT2Config(**read)
    except Exception as error:  # a value of a wrong type; the class is huggingface_hub's
        raise UserError(f"{path} is refused by transformers: {one_line(str(error))}") from None
    for name, values in {**OURS, "n_inner": (None, 4 * config.n_embd)}.items():
        if (value := getattr(config, name)) not in values:
            either = " or ".join(map(repr, values))
            raise UserError(f"{path} has {name}={value!r}; our GPT-2 has {either}")
    *numbers, dropout = (getattr(config, name) for name in sizes)
    if min(numbers) < 1 or config.n_embd % config.n_head or not 0 <= dropout < 1:
        found = ", ".join(f"{name}={getattr(config, name)}" for name in sizes)
        wanted = "1 or more of each, n_embd divisible by n_head, a dropout of 0 or more, below 1"
        raise UserError(f"{path} has {found}; wanted {wanted}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors: safetensors, whole or in shards, else a pickle."""
    names = [name for name in (WEIGHTS, INDEX, PICKLE) if (folder / name).is_file()][:1]
    if not names:
        raise UserError(f"no weights in {str(folder)!r}; wanted {WEIGHTS}, {INDEX} or {PICKLE}")
    if names == [INDEX]:
        places = read_json(folder / INDEX).get("weight_map")
        names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{folder / INDEX} names no files of its folder (weight_map)")
    return [folder / name for name in names]


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of `weight_files`, on the CPU. A pickle is read without running code of it."""
    tensors = {}
    for file in files:
        try:
            tensors |= load_state_dict(file, weights_only=True)
        except Exception as error:  # of many classes, each library has its own
            reason = str(error).split(". ")[0]  # torch goes on with how to run a pickle's code
            wrong = one_line(f"{type(error).__name__}: {reason}")
            raise UserError(f"{file} cannot be read: {wrong}") from None
    return tensors


def from_hf(config: GPT2Config, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a GPT2LMHeadModel, or of its bare GPT2Model, as ours in float32.

    Not by from_pretrained: it starts what is absent at random and casts any type to any other.
    """
    is_bare = not any(str(name).startswith("transformer.") for name in found)
    tensors = {
        f"transformer.{name}" if is_bare and name != HEAD else str(name): tensor
        for name, tensor in found.items()
        if not MASK.search(str(name))
    }
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.dtype not in DTYPES:
            raise UserError(f"--source has {name} in {tensor.dtype}; wanted one of {DTYPES}")
    tensors.setdefault(HEAD, tensors.get(WTE))
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # its text says which are absent, too many or of another shape
        wrong = one_line(str(error).partition(":")[2])
        raise UserError(f"--source has not the tensors of its config.json: {wrong}") from None
    if not torch.equal(tensors[HEAD], tensors[WTE]):
        raise UserError(f"--source has {HEAD} apart from {WTE}; our GPT-2 ties the two")
    ours = swap_layout({name: tensor.float() for name, tensor in model.state_dict().items()})
    ours[WTE] = ours[HEAD] = add_rows(ours[WTE], tokenizer.VOCAB_SIZE)
    return ours


def add_rows(embedding: Tensor, n_rows: int) -> Tensor:
    """An embedding with new rows, each the mean of the old ones.

    The logit of a mean row is the mean of the old logits, so by Jensen's inequality a new row is
    never likelier than the average old one: k new rows beside n take less than k/n of the
    probability. Zero rows would have logit 0, and GPT-2's logits lie far below that.
    """
    mean = embedding.double().mean(dim=0).float()
    return torch.cat([embedding, mean.expand(n_rows - len(embedding), -1)])


def one_line(text: str) -> str:
    return textwrap.shorten(text, 300, placeholder=" ...")


def main(config: HFConfig) -> None:
    try:
        with new_folder(Path(os.path.abspath(config.to))) as folder:
            if config.run:
                said = export_run(config.run, config.step, folder)
            else:
                said = bring_model(Path(config.source), folder, config.to)
    except OSError as error:
        raise UserError(f"--to={config.to} is not written: {error}") from None
    print(f"{said}\nwritten to {config.to}")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
