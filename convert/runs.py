"""A model from elsewhere as a run of one checkpoint, its embedding laid out as ours."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from model import GPT, GPTConfig
from nanosynth import UserError, checkpoint, files, tokenizer
from nanosynth.terminal import one_line

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
N_BPE = tokenizer.END_OF_TEXT + 1  # tokens of GPT-2
MOST_ROWS = 50_432  # N_BPE padded to a multiple of 128, and some added tokens


@contextlib.contextmanager
def new_folder(to: str) -> Iterator[Path]:
    """`files.new_folder` of the flag --to."""
    try:
        with files.new_folder(Path(os.path.abspath(to))) as folder:
            yield folder
    except OSError as error:
        raise UserError(f"--to={to} is not written: {error}") from None


@contextlib.contextmanager
def reading(path: Path | str, said: str = "cannot be read") -> Iterator[None]:
    """What goes wrong while a file that a user brings is read, in one line."""
    try:
        yield
    except Exception as error:  # of many classes, each library has its own
        reason = str(error)
        if isinstance(error, UnpicklingError):  # torch goes on with how to run a pickle's code
            reason = reason.split(". ")[0]
        wrong = one_line(f"{type(error).__name__}: {reason}")[:300]
        raise UserError(f"{path} {said}: {wrong}") from None


def as_ours(
    tensors: dict[str, Tensor], shape: dict, chat_rows: dict[int, int], place: str, described: str
) -> dict[str, Tensor]:
    """The tensors of a GPTConfig's `shape`, in float32 and our order: each in its own shape, and
    none more. Integers, which are quantised, and what is not finite are refused. `described` names
    what of `place` tells the shape, which `check_shape` has passed; `chat_rows` as in `lay_out`.
    `tensors` is changed as well, so that none is held in two types.
    """
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            wanted = "a tensor, dense and with its numbers"
            raise UserError(f"{place} has {name}, a {type(tensor).__name__}; wanted {wanted}")
        if tensor.dtype not in DTYPES:
            wanted = ", ".join(map(str, DTYPES))
            raise UserError(f"{place} has {name} in {tensor.dtype}; wanted one of {wanted}")
        tensors[name] = tensor.float()
        if n_wrong := tensor.numel() - int(tensors[name].isfinite().sum()):
            wrong = f"{n_wrong:,} of its {tensor.numel():,} numbers are NaN or infinite in float32"
            raise UserError(f"{place} has {name}, but {wrong}")
    for name, tied in ((HEAD, WTE), (WTE, HEAD)):  # files leave out one of them
        if tied in tensors:
            tensors.setdefault(name, tensors[tied])
    try:
        if shape["n_layer"] > len(tensors):  # nothing of a forged size is built
            raise RuntimeError(f"{len(tensors)} tensors are not of {shape['n_layer']:,} layers")
        with torch.device("meta"):
            model = GPT(GPTConfig(**shape))
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # its text says which are absent, too many or of another shape
        wrong = one_line(str(error).removeprefix("Error(s) in loading state_dict for GPT:"))[:300]
        raise UserError(f"{place} has not the tensors of its {described}: {wrong}") from None
    if not torch.equal(tensors[HEAD], tensors[WTE]):
        raise UserError(f"{place} has {HEAD} apart from {WTE}; our GPT-2 ties the two")
    tensors[WTE] = tensors[HEAD] = lay_out(tensors[WTE], chat_rows)
    return {name: tensors[name] for name in model.state_dict()}


def is_plain(value: object) -> bool:
    """Whether what a file holds is a tensor that is not sparse, nested or without its numbers."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided
    return is_dense and not value.is_nested and not value.is_meta


def check_shape(shape: dict, place: Path, names: dict[str, str] | None = None) -> None:
    """Refuse a `shape` that no GPT-2 has; `names` are those that `place` has for some of ours."""
    sizes = [shape[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")]
    if (
        not all(type(size) is int and 1 <= size < 2**31 for size in sizes)
        or shape["n_embd"] % shape["n_head"]
        or not (type(shape["dropout"]) in (int, float) and 0 <= shape["dropout"] < 1)
    ):
        theirs = {name: name for name in shape} | (names or {})
        found = ", ".join(f"{theirs[name]}={value!r}" for name, value in shape.items())
        wanted = "sizes of 1 or more, n_embd divisible by n_head, a dropout of 0 or more, below 1"
        raise UserError(f"{place} has {found}; wanted {wanted}")


def lay_out(embedding: Tensor, chat_rows: dict[int, int]) -> Tensor:
    """GPT-2's embedding as ours: `chat_rows` says which of its rows stands for each chat mark.

    Rows of no token of ours become padding, as many as there is place for. Rows that are left are
    the mean of GPT-2's: the logit of a mean row is the mean of the logits, so by Jensen's
    inequality a new row is never likelier than the average old one: k new rows beside n take less
    than k/n of the probability. Zero rows would have logit 0, and GPT-2's logits lie far below.
    """
    mean = embedding[:N_BPE].double().mean(dim=0).float()
    rows = torch.cat([embedding[:N_BPE], mean.expand(tokenizer.VOCAB_SIZE - N_BPE, -1)])
    others = sorted(set(range(N_BPE, len(embedding))) - set(chat_rows.values()))
    padding = range(tokenizer.N_IDS, tokenizer.VOCAB_SIZE)
    for ours, theirs in [*chat_rows.items(), *zip(padding, others, strict=False)]:
        rows[ours] = embedding[theirs]
    return rows


def same_rows(n_rows: int) -> dict[int, int]:
    """The `chat_rows` of an embedding whose ids are ours."""
    return {id: id for id in (tokenizer.IM_START, tokenizer.IM_END) if id < n_rows}


def write(folder: Path, name: str, shape: dict, tensors: dict[str, Tensor], source: dict) -> int:
    """Make `folder`, which will be `name`, a run of one checkpoint; its number of parameters."""
    settings = {**shape, "vocab_size": tokenizer.VOCAB_SIZE}
    facts = {
        "settings": {**settings, "data_dir": "", "out_dir": name},
        "source": source,
        "torch": str(torch.__version__),
    }
    # Nothing of how it was trained is known, so no run goes on from it; --init_from takes it.
    unknown = dict.fromkeys(("seed", "rows_per_step", "loss_on", "optimizer", "data_sha256"))
    meta = {"val_loss": None, "identity": {"model": settings, **unknown}, **facts}
    checkpoint.save(folder, 0, model=tensors, train_state={}, meta=meta)
    checkpoint.prune(folder, keep_last=1)
    n_parameters = sum(tensor.numel() for tensor in tensors.values()) - tensors[HEAD].numel()
    facts |= {"parameters": n_parameters, "max_steps": 0}
    (folder / "config.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return n_parameters
