"""A run as a folder that Hugging Face's transformers loads, and a GPT-2 of theirs as a run.

Usage:
    python -m convert.hf --run=out/500m --to=out/500m-hf
    python -m convert.hf --source=downloads/gpt2-medium --to=out/gpt2-medium
"""

import hashlib
import importlib.util
import re
import shutil
from dataclasses import asdict, dataclass
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
    license: str = setting("", "the model card's licence field, as mit; with --run")
    license_file: str = setting("", "the licence's text, to become LICENSE; with --run", path=True)

    def check(self) -> None:
        if bool(self.run) == bool(self.source):
            raise UserError("wanted one of --run=RUN (to export it) and --source=FOLDER (to bring)")
        for name, default in {"step": "best", "license": "", "license_file": ""}.items():
            if self.source and getattr(self, name) != default:
                self.refuse(name, "it goes with --run")
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

from convert import card, hf_tokenizer, runs
from convert.hf_tokenizer import read_json
from convert.runs import HEAD, WTE
from nanosynth import checkpoint, tokenizer
from nanosynth.inference.load import restored
from sample import SampleConfig

transformers.logging.set_verbosity_error()  # what is wrong is said here, in one line
transformers.logging.disable_progress_bar()

# Where a folder's weights are, the first that is there counts. An index names files of its folder.
INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
SOURCES = (WEIGHTS, INDEX, PICKLE, PICKLE_INDEX, "*.safetensors", "*.bin")
# What our GPT-2 computes. Where a config.json is silent, it means GPT2Config's default.
OURS: dict[str, tuple] = {
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
# Their names of our two activations; the first of each is written.
ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
}
SIZES = ("n_layer", "n_head", "n_embd")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
READ = (
    *(*SIZES, "n_positions", "vocab_size", "n_inner", "activation_function"),
    *(*DROPOUTS, *OURS, *GPT2Config.attribute_map),
)
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
MASK = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, which old files store
# Another form of a model, by a file of its own; what to do first.
QUANTISED = "of a quantised model; bring the one that it was made from"
FOREIGN = {
    "adapter_*": "an adapter; merge it into its model first (peft's merge_and_unload)",
    "*quant*config.json": QUANTISED,
}


def export_run(config: HFConfig, folder: Path) -> str:
    """Write a run's checkpoint into an empty folder as transformers reads it; what was written."""
    path = checkpoint.find(config.run, config.step)
    meta = checkpoint.read_meta(path)
    model = restored(path, meta, copy=False)
    shape = asdict(model.config)
    if shape["vocab_size"] < tokenizer.N_IDS:
        found = f"{path} has a vocabulary of {shape['vocab_size']}"
        raise UserError(f"{found}; the tokenizer has {tokenizer.N_IDS} tokens")
    model = to_hf(shape, model.state_dict())
    model.save_pretrained(folder, max_shard_size="5GB")
    for weights in folder.glob("*.safetensors"):  # which its owner alone may read
        shutil.copymode(folder / "config.json", weights)
    hf_tokenizer.save(folder, shape["block_size"])
    card.write(folder, path, meta, config.license, config.license_file)
    filled = "" if shape["bias"] else "; it has no biases, zeros stand for them"
    return f"{path}, {model.num_parameters():,} parameters in float32{filled}"


def to_hf(shape: dict, tensors: dict[str, Tensor]) -> GPT2LMHeadModel:
    """transformers' GPT-2 of our tensors, without the embedding's padding; zeros stand for absent
    biases, they add nothing.
    """
    ids = dict.fromkeys(("bos_token_id", "pad_token_id"), tokenizer.END_OF_TEXT)
    config = GPT2Config(
        **{name: shape[name] for name in SIZES},
        vocab_size=tokenizer.N_IDS,
        n_positions=shape["block_size"],
        n_ctx=shape["block_size"],  # llama.cpp's converter reads this one
        activation_function=next(n for n in ACTIVATIONS if ACTIVATIONS[n] == shape["activation"]),
        **dict.fromkeys(DROPOUTS, shape["dropout"]),
        eos_token_id=tokenizer.IM_END,
        **ids,
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    zeros = {name: torch.zeros(shapes[name]) for name in shapes if name.endswith("bias")}
    embedding = dict.fromkeys((WTE, HEAD), tensors[WTE][: tokenizer.N_IDS].contiguous())
    model.load_state_dict(zeros | swap_layout(tensors) | embedding, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=SampleConfig.temperature,
        top_p=SampleConfig.top_p,
        top_k=SampleConfig.top_k,  # transformers' own default is 50
        eos_token_id=list(tokenizer.STOP_IDS),
        **ids,
    )
    return model


def swap_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours as theirs, or theirs as ours: a Linear of ours has its matrix as (out, in), a Conv1D of
    theirs as (in, out). All other tensors, and all names, are the same.
    """

    def is_matrix(name: str, tensor: Tensor) -> bool:  # a file may hold anything by that name
        return bool(CONV1D.search(name)) and runs.is_plain(tensor) and tensor.ndim == 2

    return {
        name: tensor.t().contiguous() if is_matrix(name, tensor) else tensor
        for name, tensor in tensors.items()
    }


def bring_model(source: Path, folder: Path, name: str) -> str:
    """Make a run of one checkpoint in `folder` from a GPT-2 of transformers; what was read."""
    for pattern, what in FOREIGN.items():
        for file in sorted(source.glob(pattern)):
            raise UserError(f"{file} is {what}")
    checkpoint.refuse_nanogpt(source)
    config = read_config(source / "config.json")
    shape = {
        **{name: getattr(config, name) for name in SIZES},
        "block_size": config.n_positions,
        "vocab_size": config.vocab_size,
        "dropout": float(config.resid_pdrop),
        "bias": True,
        "activation": ACTIVATIONS[config.activation_function],
    }
    names = {"block_size": "n_positions", "dropout": "resid_pdrop"}
    runs.check_shape(shape, source / "config.json", names)
    tokenizer_file, chat_rows = hf_tokenizer.check(source, config.vocab_size)
    files = weight_files(source)
    tensors = from_hf(read_tensors(files))
    described = "config.json (c_* matrices as out, in)"  # as they stand after from_hf
    tensors = runs.as_ours(tensors, shape, chat_rows, str(source), described)
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    origin = {"folder": str(source), "sha256": hashes}
    n_parameters = runs.write(folder, name, shape, tensors, origin)
    said = f"its {tokenizer_file} is" if tokenizer_file else "it has no tokenizer, assumed is"
    dropouts = {name: getattr(config, name) for name in DROPOUTS}
    differ = f"; its dropouts {dropouts} became the first" if len({*dropouts.values()}) > 1 else ""
    return f"{source}, {n_parameters:,} parameters; {said} GPT-2's{differ}"


def read_config(path: Path) -> GPT2Config:
    """A config.json's settings of the model; those that our GPT-2 cannot have are refused."""
    content = read_json(path)
    if (kind := content.get("model_type", "gpt2")) != "gpt2":  # the oldest files don't say it
        raise UserError(f"{path} has model_type={kind!r}; wanted 'gpt2'")
    if content.get("quantization_config") or content.get("compression_config"):
        raise UserError(f"{path} is {QUANTISED}")
    if "n_ctx" in content and not {"n_positions", "max_position_embeddings"} & content.keys():
        content["n_positions"] = content["n_ctx"]
    read = {name: content[name] for name in READ if name in content}
    with runs.reading(path, "is refused by transformers"):  # a value of a wrong type
        config = GPT2Config(**read)
    own = {"activation_function": tuple(ACTIVATIONS), "n_inner": (None, 4 * config.n_embd)}
    for name, values in {**OURS, **own}.items():
        if (value := getattr(config, name)) not in values:
            either = " or ".join(map(repr, values))
            raise UserError(f"{path} has {name}={value!r}; our GPT-2 has {either}")
    if not runs.N_BPE <= config.vocab_size <= runs.MOST_ROWS:
        wanted = f"{runs.N_BPE} to {runs.MOST_ROWS}, GPT-2's and a few"
        raise UserError(f"{path} has vocab_size={config.vocab_size}; wanted {wanted}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors."""
    found = next(filter(None, ([*folder.glob(name)] for name in SOURCES)), [])
    if len(found) != 1:
        there = ", ".join(sorted(path.name for path in found or folder.iterdir()))
        wanted = f"{WEIGHTS} or {PICKLE}, or shards and their index"
        raise UserError(f"no weights in {str(folder)!r}, which has {there}; wanted {wanted}")
    if found[0].name not in (INDEX, PICKLE_INDEX):
        return found
    places = read_json(found[0]).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{found[0]} names no files of its folder (weight_map)")
    return [folder / name for name in names]


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of `weight_files`, on the CPU. A pickle is read without running code of it."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        with runs.reading(file):
            found = load_state_dict(file, weights_only=True)
            twice = tensors.keys() & found.keys()
            tensors |= found
        if twice:
            raise UserError(f"{file} has {min(twice)}, and another file of the folder has it too")
    return tensors


def from_hf(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a GPT2LMHeadModel, or of its bare GPT2Model, by our names and in our layout.

    Not by from_pretrained, which starts what is absent at random, casts any type to any other,
    takes either of two tensors of one name, and follows an index out of its folder.
    """
    found = {str(name): found[name] for name in found if not MASK.search(str(name))}
    is_bare = not any(name.startswith("transformer.") for name in found)
    return swap_layout(
        {
            f"transformer.{name}" if is_bare and name != HEAD else name: tensor
            for name, tensor in found.items()
        }
    )


def main(config: HFConfig) -> None:
    with runs.new_folder(config.to) as folder:
        if config.run:
            said = export_run(config, folder)
        else:
            said = bring_model(Path(config.source), folder, config.to)
    print(f"{said}\nwritten to {config.to}")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
