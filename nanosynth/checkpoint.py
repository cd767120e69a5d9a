"""Checkpoints: save, find, verify, read. Knows tensors and names, not the model.

out/RUN/step_NNNNNN/ holds model.safetensors, train_state.pt and meta.json, which has the size and
SHA-256 of the others and of itself. A folder is written under a temporary name, synced and renamed,
so one with a step's name is whole; it is verified all the same before anything in it is used.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nanosynth import UserError
from nanosynth.files import LOCK, HashedFile, published, set_aside, temporary, write_atomically
from nanosynth.schema import fields, misfit
from nanosynth.settings import is_out_of_memory
from nanosynth.terminal import one_line

FORMAT_VERSION = 1
ANEW = "bring one back, or start anew with another --out_dir"
MODEL, TRAIN_STATE, META = "model.safetensors", "train_state.pt", "meta.json"
NAME = re.compile("step_([0-9]{6}|[1-9][0-9]{6,})")  # of a step's folder; as `folder` gives it
FILE = fields("bytes:count sha256:text")
WANTED = {  # of a meta.json
    **fields("format_version:count step:count val_loss:number|nan|null"),
    **{"aliases": {"*": "text"}, "files": {MODEL: FILE, TRAIN_STATE: FILE}},
    "identity": fields("loss_on?:text|null data_sha256?:text|null") | {"model?": {}},
    "settings?": fields("data_dir:text"),
    "source?": {},
}
STATE = {  # of a train_state.pt; the scaler's is empty but in float16
    **{"optimizer": {}, "guard": {}, "metrics_bytes": "count"},
    "scaler": fields(
        "scale?:positive growth_factor?:positive backoff_factor?:positive growth_interval?:count "
        "_growth_tracker?:count"
    ),
}
OLD_MODEL = {"activation": "gelu_tanh"}  # what a model was before its settings had the key


class Damaged(UserError):
    """A checkpoint whose content is not what was written."""


class Linked(Damaged):
    """One that lies elsewhere: whole perhaps, and not used, since it may change there."""


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:06d}"


def steps(run_dir: Path) -> list[int]:
    """The steps that have a folder, in order."""
    names = os.listdir(run_dir) if run_dir.is_dir() else []
    return sorted(int(name.removeprefix("step_")) for name in names if NAME.fullmatch(name))


def on_host(state: dict) -> dict:
    """A copy of nested dicts and lists whose tensors lie in host memory, for a save to read while
    training changes the originals. What is one tensor under several names stays one.
    """
    copies: dict[tuple, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        key = tensor.data_ptr(), tensor.shape
        if key not in copies:
            # Into pinned memory a GPU copies ten times as fast; torch keeps it for the next save.
            twin = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            copies[key] = twin.copy_(tensor, non_blocking=True)
        return copies[key]

    twins = tree_map_only(Tensor, copied, state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the copies are only begun until here
    return twins


def save(
    run_dir: Path, step: int, *, model: dict[str, Tensor], train_state: dict, meta: dict
) -> Path:
    """Publish step_NNNNNN whole or not at all. `train_state` holds tensors and plain values only.

    Tensors that share storage (a tied embedding) are stored once, their other names in the meta.
    """
    firsts: dict[int, str] = {}
    first_names = {name: firsts.setdefault(model[name].data_ptr(), name) for name in model}
    aliases = {name: first for name, first in first_names.items() if first != name}
    stored = {name: model[name].contiguous() for name in model if name not in aliases}
    files: dict[str, dict] = {}
    with published(folder(run_dir, step)) as unfinished:
        with HashedFile(unfinished / MODEL) as file:
            file.write(safetensors.torch.save(stored, metadata={"format": "pt"}))
        files[MODEL] = file.summary()
        with HashedFile(unfinished / TRAIN_STATE) as file:
            try:
                torch.save(train_state, file)
            except RuntimeError as error:
                raise file.error or error from None
        files[TRAIN_STATE] = file.summary()
        own = {"format_version": FORMAT_VERSION, "step": step, "aliases": aliases}
        with HashedFile(unfinished / META) as file:
            file.write(_serialise({**own, **meta, "files": files}))
    return folder(run_dir, step)


def _serialise(meta: dict) -> bytes:
    """The one byte string that stands for `meta`, ending with its own hash."""
    digest = hashlib.sha256(json.dumps(meta).encode()).hexdigest()
    return json.dumps({**meta, "meta_sha256": digest}, indent=2).encode()


def read_meta(path: Path) -> dict:
    """The meta.json of a step folder, whole and its own; raises Damaged."""
    for part in (path, *(path / name for name in (META, MODEL, TRAIN_STATE))):
        if part.is_symlink():
            raise Linked(f"{part} is a symbolic link; put what it names in its place")
    try:
        content = (path / META).read_bytes()
        meta = json.loads(content)
        meta.pop("meta_sha256")
        intact = _serialise(meta) == content and path.name == f"step_{meta['step']:06d}"
        wrong = misfit(meta, WANTED)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{path / META} cannot be read: {type(error).__name__}: {error}") from None
    if not intact:
        raise Damaged(f"{path / META} is not as it was written")
    if meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version")
        raise UserError(f"{path} has format {found!r:.40}; wanted {FORMAT_VERSION}")
    if wrong:
        raise Damaged(f"{path / META} is not of its form: {wrong}")
    identity = meta["identity"]
    if "model" in identity:
        identity["model"] = OLD_MODEL | identity["model"]
    return meta


def verify(path: Path, names: tuple[str, ...] = (MODEL, TRAIN_STATE)) -> dict:
    """The meta of a step folder after checking the size and SHA-256 of the files that are going to
    be read; raises Damaged.
    """
    meta = read_meta(path)
    for name in names:
        file_path, wanted = path / name, meta["files"][name]
        if not file_path.is_file():
            raise Damaged(f"{file_path} is missing or not a plain file")
        if file_path.stat().st_size != wanted["bytes"]:
            size = file_path.stat().st_size
            raise Damaged(f"{file_path} has {size} bytes, not {wanted['bytes']}")
        with open(file_path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                raise Damaged(f"{file_path} is not as it was written: SHA-256 differs")
    return meta


def newest_good(run_dir: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest step folder that verifies; damaged ones before it are said aloud and set aside.

    None where there is no step folder; where none verifies all stay, and a UserError says why.
    """
    damaged: dict[Path, Damaged] = {}
    for step in reversed(steps(run_dir)):
        path = folder(run_dir, step)
        try:
            verify(path)
        except Linked:
            raise
        except Damaged as error:
            damaged[path] = error
            continue
        for worse, error in damaged.items():
            say(f"damaged checkpoint: {error}; set aside, an older one is used")
            set_aside(worse, "damaged")
        return path
    if damaged:
        first = next(iter(damaged.values()))
        raise UserError(f"no checkpoint in {run_dir} is whole: {first}; {ANEW}")
    return None


def _losses(run_dir: Path, say: Callable[[str], None] | None = None) -> dict[Path, float]:
    """Validation losses by step folder. One that is damaged, or being deleted, has none."""
    losses = {}
    for path in (folder(run_dir, step) for step in steps(run_dir)):
        try:
            loss = read_meta(path)["val_loss"]
        except Damaged as error:  # never the best
            if say:
                say(f"damaged checkpoint: {error}; the best of the others is taken")
            continue
        if loss is not None and math.isfinite(loss):
            losses[path] = loss
    return losses


def best(run_dir: Path, say: Callable[[str], None] | None = None) -> Path | None:
    """The step folder with the lowest validation loss; None where none was evaluated. `say` hears
    of damaged ones.
    """
    losses = _losses(run_dir, say)
    return min(losses, key=losses.get, default=None)


def best_loss(run_dir: Path) -> float:
    """The lowest validation loss among the step folders; infinity where none was evaluated."""
    return min(_losses(run_dir).values(), default=math.inf)


def find(run: str, step: str = "best", names: tuple[str, ...] = (MODEL,)) -> Path:
    """A run's step folder: 'best', 'latest' or a number; `run` may be the folder. Its files `names`
    are verified: the training state is twice as large, and who wants the weights does not read it.
    """
    run_dir = Path(run)
    saved = steps(run_dir)
    if NAME.fullmatch(run_dir.name):
        if step != "best":
            raise UserError(f"--run={run} is one step already; leave out --step={step}")
        path = run_dir
    elif not saved:
        refuse_nanogpt(run_dir)
        raise UserError(f"no checkpoint in {run!r}; train one with: python train.py config/NAME.py")
    elif step == "latest":
        path = folder(run_dir, saved[-1])
    elif step == "best":
        path = best(run_dir, partial(print, file=sys.stderr)) or folder(run_dir, saved[-1])
    else:
        path = folder(run_dir, int(step) if re.fullmatch("[0-9]{1,20}", step) else -1)
    if not path.is_dir():
        wanted = ", ".join(map(str, saved))
        raise UserError(f"no step {step!r} in {run!r}; wanted best, latest or one of {wanted}")
    verify(path, names)
    return path


def refuse_nanogpt(run_dir: Path) -> None:
    """Name the command that a ckpt.pt, given as a run or found in its folder, has to go through."""
    theirs = run_dir if run_dir.suffix == ".pt" else run_dir / "ckpt.pt"
    if theirs.is_file():
        bring = f"python -m convert.nanogpt --source={theirs} --to=out/NAME"
        raise UserError(f"{theirs} is nanoGPT's; make a run of it with: {bring}")


def find_start(
    run_dir: Path, resume: str, identity: dict, say: Callable[[str], None] = print
) -> Path | None:
    """The verified step folder that a run of this `identity` goes on from, or None for a new run.

    `resume` is 'auto', 'never' or a step folder; step folders behind the chosen one are set aside.
    Saves and deletions that were cut short are cleaned up. A new run's folder holds no work.
    """
    for leftover in [*run_dir.glob(".tmp-step_*"), *run_dir.glob(".trash-step_*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    if resume == "auto":
        path = newest_good(run_dir, say)
    else:
        path = None if resume == "never" else find(resume, names=(MODEL, TRAIN_STATE))
        if path and os.path.realpath(path.parent) == os.path.realpath(run_dir):
            path = run_dir / path.name  # however it was written
    if path is None or path.parent != run_dir:
        check_new(run_dir, resume)
    if path is None:
        return None
    theirs = read_meta(path)["identity"]
    for key, value in identity.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{path} was made with {key}={theirs.get(key)}, this run has {value}; restore that "
                "setting, or start anew with another --out_dir (and --init_from for the weights)"
            )
    for step in steps(run_dir):
        if step > int(path.name.removeprefix("step_")):
            set_aside(folder(run_dir, step), "abandoned")
    return path


def check_new(run_dir: Path, resume: str) -> None:
    """Refuse to start at step 0 where a run has been; 'auto' minds what tells of checkpoints alone,
    since a run that ended before its first is rightly started over.
    """
    names = sorted(set(os.listdir(run_dir)) - {LOCK}) if run_dir.is_dir() else []
    mend = "use --resume=auto to go on there, or another --out_dir"
    if resume == "auto":
        names = [name for name in names if name.startswith("step_") or name in ("latest", "best")]
        mend = f"but no checkpoint: {ANEW}"
    if names:
        more = ", ..." if len(names) > 5 else ""
        raise UserError(f"{run_dir} holds {', '.join(names[:5])}{more}; {mend}")


def read_model(path: Path, meta: dict) -> dict[str, Tensor]:
    """The model's tensors on the CPU, under all their names, all finite. Verify first."""
    try:
        tensors = safetensors.torch.load_file(path / MODEL)
        aliases = {name: tensors[stored] for name, stored in meta["aliases"].items()}
    except (safetensors.SafetensorError, KeyError) as error:
        raise Damaged(f"{path / MODEL} is not as {META} says: {error}") from None
    if ruined := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        found = f"{path / MODEL} has numbers that are not finite, in {ruined[0]}"
        raise UserError(f"{found}; the run diverged: take an older step")
    return tensors | aliases


def read_train_state(path: Path) -> dict:
    """What training needs beside the model, on the CPU. Verify first."""
    try:
        return torch.load(path / TRAIN_STATE, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise Damaged(f"{path / TRAIN_STATE} is refused: {reason}") from None


@contextlib.contextmanager
def must_fit(path: Path) -> Iterator[None]:
    """What is taken on here of a step folder fits into what takes it, or the folder is Damaged."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # of many classes: torch's, and those of wrong types
        if is_out_of_memory(error):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise Damaged(f"{path} holds what does not fit: {reason}") from None


def prune(run_dir: Path, keep_last: int) -> None:
    """Name the newest and the best folder in `latest` and `best`; delete the others but the newest
    `keep_last`.
    """
    saved, best_path = steps(run_dir), best(run_dir)
    write_atomically(run_dir / "latest", folder(run_dir, saved[-1]).name)
    if best_path:
        write_atomically(run_dir / "best", best_path.name)
    for step in saved[:-keep_last]:
        path = folder(run_dir, step)
        if path != best_path and not path.is_symlink():
            trash = temporary(path, "trash")
            os.rename(path, trash)  # first of all, so that a deletion cut short leaves no torn one
            shutil.rmtree(trash)


def check_space(run_dir: Path, n_parameters: int, keep_last: int) -> None:
    """Refuse a run whose checkpoints will not fit: the kept, the best and the one being written.

    A checkpoint takes 12 bytes a parameter: weights and two moments in float32.
    """
    saved = (folder(run_dir, step) for step in steps(run_dir))  # their room will be free again
    present = sum(file.lstat().st_size for path in saved for file in path.rglob("*"))
    free = shutil.disk_usage(run_dir).free + present
    needed = 12 * n_parameters * (keep_last + 2)
    if free < needed:
        raise UserError(
            f"{run_dir} has room for {free / 1e9:.1f} GB, but {keep_last + 2} checkpoints take "
            f"{needed / 1e9:.1f} GB; free some, lower --keep_last or use another --out_dir"
        )
