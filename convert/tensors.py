"""GPT-2 in Hugging Face's format: configuration and tensors, both ways.

Knows names, shapes and layouts, not the model. A Conv1D of theirs keeps its matrix as (in, out), a
Linear of ours as (out, in), so those are transposed; all other tensors and all names are the same.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from convert.tokenizer import read_json
from nanosynth import UserError, tokenizer

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
N_GPT2_IDS = tokenizer.END_OF_TEXT + 1  # rows of GPT-2's own embedding
WEIGHTS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_BUFFER = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, which old files store
# What a configuration must say, and what it says where it is silent (GPT2Config's defaults).
_WANTED: dict[str, tuple] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def config_json(model: Mapping) -> dict:
    """config.json of a model of these GPTConfig fields."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model["vocab_size"],
        "n_positions": model["block_size"],
        "n_ctx": model["block_size"],  # llama.cpp's converter reads this one
        "n_embd": model["n_embd"],
        "n_layer": model["n_layer"],
        "n_head": model["n_head"],
        "n_inner": None,
        **{name: values[0] for name, values in _WANTED.items()},
        "resid_pdrop": model["dropout"],
        "embd_pdrop": model["dropout"],
        "attn_pdrop": model["dropout"],
        "bos_token_id": tokenizer.END_OF_TEXT,
        "eos_token_id": tokenizer.IM_END,
        "pad_token_id": tokenizer.END_OF_TEXT,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def generation_config() -> dict:
    """generation_config.json: our stop ids; the rows that are no token are never picked."""
    return {
        "bos_token_id": tokenizer.END_OF_TEXT,
        "eos_token_id": list(tokenizer.STOP_IDS),
        "pad_token_id": tokenizer.END_OF_TEXT,
        "suppress_tokens": list(range(tokenizer.N_IDS, tokenizer.VOCAB_SIZE)),
    }


def to_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as GPT2LMHeadModel's; a model without biases gets zeros, which add nothing."""
    found = {}
    for name, tensor in tensors.items():
        if name == HEAD:
            continue  # tied
        found[name] = tensor.t().contiguous() if _CONV1D.search(name) else tensor
        bias = re.sub("weight$", "bias", name)
        if bias not in tensors and name not in (WTE, WPE):
            found[bias] = torch.zeros(tensor.shape[0])
    return found


def read_config(path: Path) -> dict:
    """GPTConfig's fields from a config.json; one that is not GPT-2's is refused."""
    found = read_json(path)
    if found.get("model_type") != "gpt2":
        raise UserError(f"{path} has model_type={found.get('model_type')!r}; wanted 'gpt2'")
    for name, wanted in _WANTED.items():
        if (value := found.get(name, wanted[0])) not in wanted:
            either = " or ".join(map(repr, wanted))
            raise UserError(f"{path} has {name}={value!r}; our GPT-2 has {either}")
    numbers = {}
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        numbers[name] = value = found.get(name)
        if type(value) is not int or value < 1:
            raise UserError(f"{path} has {name}={value!r}; wanted a number of 1 or more")
    n_head, n_embd = numbers["n_head"], numbers["n_embd"]
    if n_embd % n_head:
        raise UserError(f"{path} has n_head={n_head}, which does not divide n_embd={n_embd}")
    if (n_inner := found.get("n_inner")) not in (None, 4 * n_embd):
        raise UserError(f"{path} has n_inner={n_inner!r}; our GPT-2 has 4 * n_embd = {4 * n_embd}")
    if numbers["vocab_size"] not in (N_GPT2_IDS, tokenizer.VOCAB_SIZE):
        wanted = f"{N_GPT2_IDS} (GPT-2) or {tokenizer.VOCAB_SIZE} (ours)"
        raise UserError(f"{path} has vocab_size={numbers['vocab_size']}; wanted {wanted}")
    dropout = found.get("resid_pdrop", 0.1)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{path} has resid_pdrop={dropout!r}; wanted 0 or more, below 1")
    return {
        "n_layer": numbers["n_layer"],
        "n_head": n_head,
        "n_embd": n_embd,
        "block_size": numbers["n_positions"],
        "vocab_size": numbers["vocab_size"],
        "dropout": float(dropout),
        "bias": True,
    }


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors: safetensors, whole or in shards, else pickled."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        names = sorted(set(places.values())) if isinstance(places, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{folder / INDEX} names no files of its folder (weight_map)")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{folder / INDEX} names {absent[0]}, which is not there")
        return [folder / name for name in names]
    if (folder / PICKLE).is_file():
        return [folder / PICKLE]
    raise UserError(f"no weights in {str(folder)!r}; wanted {WEIGHTS}, {INDEX} or {PICKLE}")


def read_tensors(paths: list[Path]) -> dict[str, Tensor]:
    """All tensors of `weight_files`, on the CPU. A pickle is read without running code of it."""
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            if path.name == PICKLE:
                part = torch.load(path, map_location="cpu", weights_only=True)
            else:
                part = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} is refused: {_first_line(error)}") from None
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read: {_first_line(error)}") from None
        if not isinstance(part, dict):
            raise UserError(f"{path} holds a {type(part).__name__}; wanted tensors by name")
        if strange := [name for name, value in part.items() if not isinstance(value, Tensor)]:
            raise UserError(f"{path} holds {strange[0]!r}, which is no tensor")
        found |= part
    return found


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def from_hf(
    found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], n_rows: int
) -> dict[str, Tensor]:
    """GPT2LMHeadModel's or GPT2Model's tensors as ours, of these names and shapes, in float32.

    `n_rows` are the embedding's that are found; `add_rows` makes up for the others.
    """
    theirs = {}
    for name, tensor in found.items():
        if not _BUFFER.search(name):
            full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if full in theirs:
                raise UserError(f"{full} is there twice, with its prefix and without")
            theirs[full] = tensor
    head = theirs.pop(HEAD, None)
    _check_names(set(theirs), set(shapes) - {HEAD})
    if head is not None and not torch.equal(head.float(), theirs[WTE].float()):
        raise UserError(f"{HEAD} differs from wte.weight; our GPT-2 ties the two")
    ours = {}
    for name, wanted in shapes.items():
        if name == HEAD:
            continue
        tensor = theirs[name]
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{name} is of {tensor.dtype}; wanted float32, float16 or bfloat16")
        is_conv1d = _CONV1D.search(name)
        if name == WTE:
            wanted = (n_rows, *wanted[1:])
        elif is_conv1d:
            wanted = wanted[::-1]
        if tensor.shape != wanted:
            raise UserError(f"{name} is of shape {[*tensor.shape]}; wanted {[*wanted]}")
        ours[name] = (tensor.t() if is_conv1d else tensor).float().contiguous()
    ours[WTE] = add_rows(ours[WTE], shapes[WTE][0])
    return ours | {HEAD: ours[WTE]}


def _check_names(found: set[str], wanted: set[str]) -> None:
    for what, names in (("lack", wanted - found), ("have besides", found - wanted)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"not GPT-2's tensors for this config.json: they {what} {some}")


def add_rows(embedding: Tensor, n_rows: int) -> Tensor:
    """An embedding with new rows, each the mean of the old ones.

    The logit of a mean row is the mean of the old logits, so by Jensen's inequality a new row is
    never likelier than the average old one: k new rows beside n take less than k/n of the
    probability. Zero rows would have logit 0, and GPT-2's logits lie far below that.
    """
    mean = embedding.double().mean(dim=0).float()
    return torch.cat([embedding, mean.expand(n_rows - len(embedding), -1)])
