"""The bin format: writing it, checking it, reading it, and the batch as a pure function.

data/NAME/{train,val}.bin are little-endian uint16 token ids, documents end to end; the uint8
{train,val}_mask.bin beside them are 1 on assistant tokens, {train,val}_sources.bin number each
document's source and category. meta.json comes last: a folder that has it is complete. Reads are
positioned reads, not memory maps: a file shortened under a run is an error with its place, not a
SIGBUS, and resident memory stays flat.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanosynth import UserError
from nanosynth.data import FILES, LABELS, PICTURE
from nanosynth.files import HashedFile, lock, sync, write_atomically
from nanosynth.schema import fields, misfit
from nanosynth.tokenizer import END_OF_TEXT, VOCAB_SIZE

FORMAT_VERSION = 1
SPLITS = ("train", "val")
BINS = ("train.bin", "val.bin")
SPOOLS = ("ids.spool", "mask.spool")  # of all documents, as they were read
OUR_MARK = "nanosynth prepare.py"  # in the picture's file
FILE = fields("bytes:count sha256:text")
WANTED = {  # of a meta.json, beside format and vocabulary
    "files": dict.fromkeys(FILES, FILE),
    "label_files?": {"*": FILE},
    "label_names?": {"*": ["text"]},
    "tokenizer?": fields("ranks_sha256:text"),
}
CHECKED = ".checked.json"  # what a start found whole, so that the next need not read it all
SAMPLES, SAMPLE_BYTES = 64, 4096  # of a bin that looks unchanged


class BinWriter:
    """Collects documents in reading order, shuffles them into the bins and publishes these.

    As a context it removes on leaving, whatever happened, what was not published. It holds the
    folder's lock, and refuses to touch what another has put there.
    """

    def __init__(self, data_dir: str, *, has_picture: bool = False):
        self.data_dir = Path(data_dir)
        self.partial = self.data_dir / ".partial"
        if self.data_dir.exists() and not self.data_dir.is_dir():
            raise UserError(f"--data_dir={data_dir} is no folder")
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.data_dir))
            self._refuse_foreign(has_picture)
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
            self._spools = [open(self.partial / name, "w+b", 1 << 20) for name in SPOOLS]
            self._stack = stack.pop_all()
        self._lengths = array("q")  # of documents, in tokens
        self._files: dict[str, dict] = {}  # that are shuffled: bytes and SHA-256

    def _refuse_foreign(self, has_picture: bool) -> None:
        """Bins of ours have masks, or a meta.json that tells of them; others are not replaced, as
        nanoGPT's bins or a checkpoint's meta.json. In `partial` the names tell what is ours.
        """
        meta = _our_meta(self.data_dir)
        if not meta and not any((self.data_dir / f"{split}_mask.bin").exists() for split in SPLITS):
            for name in ("meta.json", *BINS, *LABELS):
                if os.path.lexists(path := self.data_dir / name):
                    raise UserError(f"{path} is not of prepare.py; name another --data_dir")
        picture = self.data_dir / PICTURE
        self._owns_picture = (
            not picture.exists()
            or OUR_MARK.encode() in _head(picture, 1024)
            or bool(meta and "label_files" not in meta)  # version 0.1.0, which made no mark
        )
        if has_picture and not self._owns_picture:
            raise UserError(f"{picture} is not of prepare.py; move it, or say --picture=False")
        if os.path.lexists(self.partial):
            is_folder = self.partial.is_dir() and not self.partial.is_symlink()
            names = os.listdir(self.partial) if is_folder else [""]
            older = {f"{name}.spool" for name in FILES}  # of version 0.1.0
            if {*names} - {*older, *SPOOLS, *FILES, *LABELS, PICTURE, "meta.json"}:
                raise UserError(f"{self.partial} is not of prepare.py; move it away")

    def add(self, ids: Sequence[int], mask: Sequence[int]) -> None:
        """One document. An id past 65,535 raises instead of wrapping round."""
        if not isinstance(ids, np.ndarray):
            ids = np.array(ids, dtype="<u2")
        self._spools[0].write(ids.astype("<u2", casting="safe", copy=False))
        self._spools[1].write(bytes(mask))
        self._lengths.append(len(ids))

    def shuffle(
        self,
        seed: int,
        split: Sequence[int],
        chosen: np.ndarray | None = None,
        labels: np.ndarray | None = None,
    ) -> None:
        """Write the bins, still unpublished, in a seeded random order of documents.

        Of each document as it was added: `split`, its place in SPLITS; `chosen`, (documents,) bool,
        leaves some out; `labels`, (documents, columns), are written in the bins' order.
        """
        lengths = np.frombuffer(self._lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        orders = {}
        for number, name in enumerate(SPLITS):
            places = np.flatnonzero(np.equal(split, number))
            order = places[np.random.default_rng(seed).permutation(len(places))]
            orders[name] = order if chosen is None else order[chosen[order]]
        for spool, of, itemsize in zip(self._spools, ("", "_mask"), (2, 1), strict=True):
            spool.flush()
            for name, order in orders.items():
                places = zip(starts[order] * itemsize, lengths[order] * itemsize, strict=True)
                documents = (os.pread(spool.fileno(), size, start) for start, size in places)
                self._write(f"{name}{of}.bin", documents)
            spool.truncate(0)  # for the disk's sake
        if labels is not None:
            for name, order in orders.items():
                self._write(f"{name}_sources.bin", [labels[order].astype("<u2").tobytes()])

    def _write(self, name: str, parts: Iterable[bytes]) -> None:
        with HashedFile(self.partial / name) as file:
            for part in parts:
                file.write(part)
        self._files[name] = file.summary()

    def publish(self, meta: dict) -> None:
        """Put the bins in their place, with the picture where one stands in `partial`, then
        meta.json.

        The old meta.json goes first: never does one vouch for a mix of old and new.
        """
        meta = {
            "format_version": FORMAT_VERSION,
            **meta,
            "vocab_size": VOCAB_SIZE,
            "files": {name: self._files[name] for name in FILES},
            "label_files": {name: self._files[name] for name in LABELS if name in self._files},
        }
        with HashedFile(self.partial / "meta.json") as file:
            file.write(json.dumps(meta, indent=2).encode())
        pictures = [PICTURE] if self._owns_picture else []
        for name in (*pictures, "meta.json", CHECKED, *LABELS):
            (self.data_dir / name).unlink(missing_ok=True)
        sync(self.data_dir)
        pictures = [PICTURE] if (self.partial / PICTURE).is_file() else []
        # A mask comes before all else: it tells that the rest is ours, should this be killed.
        for name in (*sorted(self._files, key=lambda name: "_mask" not in name), *pictures):
            os.replace(self.partial / name, self.data_dir / name)
        sync(self.data_dir)
        os.replace(self.partial / "meta.json", self.data_dir / "meta.json")  # vouches for all
        sync(self.data_dir)

    def __enter__(self) -> "BinWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for spool in self._spools:
            with contextlib.suppress(OSError):  # its last bytes, to a full disk
                spool.close()
        shutil.rmtree(self.partial, ignore_errors=True)
        self._stack.close()


def _head(path: Path, n_bytes: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(n_bytes)


def _our_meta(folder: Path) -> dict:
    """meta.json where it tells of bins of ours, whole or not; else empty."""
    meta = _json_object(folder / "meta.json")
    files = meta.get("files")
    return meta if isinstance(files, dict) and "train_mask.bin" in files else {}


def _json_object(path: Path) -> dict:
    """What a file holds; empty where it is not there, or is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_meta(data_dir: str) -> dict:
    """meta.json of a complete folder, after checking version, vocabulary and the bins' sizes."""
    path = Path(data_dir) / "meta.json"
    try:
        is_nanogpt = not path.exists() and all((path.parent / name).is_file() for name in BINS)
        return _nanogpt_meta(path.parent) if is_nanogpt else _checked_meta(path)
    except UserError as error:
        said = str(error)
    except FileNotFoundError:
        said = f"no prepared data in {data_dir!r} (no meta.json)"
    except OSError as error:
        said = f"no prepared data in {data_dir!r}: {error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"{path} is not a bin description ({type(error).__name__}: {error})"
    raise UserError(f"{said}; run: python prepare.py --source=... --data_dir={data_dir}")


def _checked_meta(path: Path) -> dict:
    meta = json.loads(path.read_bytes())
    has = (meta["format_version"], meta["vocab_size"])
    if has != (FORMAT_VERSION, VOCAB_SIZE):
        said = "{} has format {!r:.20}, vocabulary {!r:.20}; wanted format {}, vocabulary {}"
        raise UserError(said.format(path, *has, FORMAT_VERSION, VOCAB_SIZE))
    if wrong := misfit(meta, WANTED):
        raise ValueError(wrong)
    files = {name: meta["files"][name]["bytes"] for name in FILES}
    for name, wanted in files.items():
        bin_path = path.parent / name
        size = bin_path.stat().st_size if bin_path.is_file() else 0
        if size != wanted:
            raise UserError(f"{bin_path} has {size} bytes, not {wanted}")
    for split in SPLITS:
        n_ids, n_mask = files[f"{split}.bin"], files[f"{split}_mask.bin"]  # bytes
        if n_ids != 2 * n_mask:
            said = f"{split}.bin has {n_ids} bytes, {split}_mask.bin {n_mask}; wanted 2 to 1"
            raise UserError(f"{path}: {said}")
    return meta


def _nanogpt_meta(folder: Path) -> dict:
    """What a meta.json would say of nanoGPT's bins, which have none: text, without masks."""
    for name, what in {
        "train_mask.bin": "half a preparation (no meta.json)",
        "meta.pkl": "a vocabulary of its own (meta.pkl), which is not GPT-2's",
    }.items():
        if (folder / name).exists():
            raise UserError(f"{str(folder)!r} holds {what}")
    for name in BINS:
        if (size := (folder / name).stat().st_size) % 2:
            raise UserError(f"{folder / name} has {size} bytes; wanted 2 of each token")
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in _sha256s(folder, BINS, always=False).items()
    }
    return {"format_version": FORMAT_VERSION, "source": "nanoGPT's bins", "files": files}


def _check_whole(folder: Path, files: dict, *, always: bool = False) -> None:
    """Refuse files whose content is not what meta.json says, by SHA-256."""
    for name, sha256 in _sha256s(folder, files, always=always).items():
        if sha256 != files[name]["sha256"]:
            raise UserError(f"{folder / name} has changed since it was prepared; prepare it again")


def _sha256s(folder: Path, names: Iterable[str], *, always: bool) -> dict[str, str]:
    """The SHA-256 of each file. All of it is read where `always`, and where size, time or a sample
    are not those that were found the last time; where the folder cannot be written to, each time.
    """
    known, found = _json_object(folder / CHECKED), {}
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                status = os.fstat(file.fileno())
                looks = [status.st_mtime_ns, _sample(file.fileno(), status.st_size)]
                found[name] = known.get(name)
                if always or not isinstance(found[name], list) or found[name][:-1] != looks:
                    found[name] = [*looks, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}") from None
    if not found.items() <= known.items():
        with contextlib.suppress(OSError):
            write_atomically(folder / CHECKED, json.dumps(known | found))
    return {name: sha256 for name, (*_, sha256) in found.items()}


def _sample(descriptor: int, size: int) -> str:
    """A hash of some bytes from all over a file."""
    digest = hashlib.blake2b(digest_size=16)
    for offset in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES).astype(int).tolist():
        digest.update(os.pread(descriptor, SAMPLE_BYTES, offset))
    return digest.hexdigest()


class Split:
    """The tokens and mask of one split, read in place."""

    def __init__(self, data_dir: str, split: str, *, verify: bool = False):
        """`verify`: read all of it, and compare its SHA-256, even where it looks unchanged."""
        self.meta = read_meta(data_dir)
        self.path = Path(data_dir) / f"{split}.bin"
        self._mask_path = Path(data_dir) / f"{split}_mask.bin"
        names = (self.path.name, self._mask_path.name)
        files = {name: self.meta["files"][name] for name in names if name in self.meta["files"]}
        _check_whole(self.path.parent, files, always=verify)
        self.sha256 = files[self.path.name]["sha256"]
        self.n_tokens = files[self.path.name]["bytes"] // 2
        self._ids = os.open(self.path, os.O_RDONLY)
        self.has_mask = self._mask_path.name in files  # nanoGPT's bins have none
        self._mask = os.open(self._mask_path, os.O_RDONLY) if self.has_mask else None

    def ids(self, start: int, count: int) -> np.ndarray:
        """(count,) uint16."""
        return self._read(self._ids, self.path, start, count, np.dtype("<u2"), VOCAB_SIZE)

    def mask(self, start: int, count: int) -> np.ndarray:
        """(count,) uint8, 1 on assistant tokens, and on all of a plain text."""
        if self._mask is None:
            return np.ones(count, dtype=np.uint8)
        return self._read(self._mask, self._mask_path, start, count, np.dtype(np.uint8), 2)

    def _read(
        self, descriptor: int, path: Path, start: int, count: int, dtype: np.dtype, limit: int
    ) -> np.ndarray:
        """(count,) numbers below `limit`, one a token."""
        end = (start + count) * dtype.itemsize
        data = os.pread(descriptor, count * dtype.itemsize, start * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise UserError(f"{path}: ends before byte {end}; prepare it again")
        values = np.frombuffer(data, dtype)
        if count and (most := values.max()) >= limit:
            place = start + int(values.argmax())
            raise UserError(f"{path}: {most} at token {place}, not below {limit}; prepare it again")
        return values

    def n_rows(self, block_size: int) -> int:
        """Rows of block_size + 1 tokens, each sharing its last token with the next row's first."""
        return max(0, (self.n_tokens - 1) // block_size)

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, mask) of each document, <|endoftext|> included. Reads the split whole."""
        ids, mask = self.ids(0, self.n_tokens), self.mask(0, self.n_tokens)
        ends = np.flatnonzero(ids == END_OF_TEXT) + 1
        return zip(np.split(ids, ends)[:-1], np.split(mask, ends)[:-1], strict=True)

    def labels(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """'source' and 'category': the names there are, and each document's number among them,
        (documents,) uint16. Empty of bins that do not say it.
        """
        path = self.path.with_name(f"{self.path.stem}_sources.bin")
        entry = self.meta.get("label_files", {}).get(path.name)
        if not entry:
            return {}
        _check_whole(path.parent, {path.name: entry})
        try:
            names = self.meta["label_names"]
            n_documents = np.count_nonzero(self.ids(0, self.n_tokens) == END_OF_TEXT)
            numbers = np.fromfile(path, dtype="<u2").reshape(n_documents, len(names))
            if (numbers.max(axis=0, initial=0) >= list(map(len, names.values()))).any():
                raise ValueError("it has other numbers")
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} and label_names differ: {error}; prepare it again") from None
        return {use: (names[use], numbers[:, place]) for place, use in enumerate(names)}


def prompts_and_answers(ids: np.ndarray, mask: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) ids of each assistant turn of a document; an answer ends with <|im_end|>.

    A plain text has none: nothing stands before it.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0])).astype(np.int8)))
    return [
        (ids[:start].tolist(), ids[start:end].tolist())
        for start, end in zip(edges[::2], edges[1::2], strict=True)
        if start
    ]


class Batch(NamedTuple):
    """One micro-batch: what GPT.forward takes."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (N,) int64, the tokens that count
    logit_index: Tensor | None  # (N,) int64, their places in the flattened (B*T); None: all

    def to(self, device: torch.device) -> "Batch":
        """On `device`; from pinned memory, so that the host does not wait for a GPU."""
        pin = device.type == "cuda"
        parts = (part if part is None or not pin else part.pin_memory() for part in self)
        return Batch(*(p if p is None else p.to(device, non_blocking=pin) for p in parts))


@functools.lru_cache(maxsize=2)
def _permutation(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """Which rows each step and micro-batch takes, by arithmetic alone.

    Each epoch is a permutation of all rows, seeded by (seed, epoch); the epochs follow one another
    without end. So the order needs no state, and is the same for any number of GPUs: micro-batches
    are numbered through the whole run, and a step's are dealt to the ranks in turn.
    """

    n_rows: int
    micro_batch_size: int  # rows of one micro-batch
    micro_batches_per_step: int  # over all ranks
    seed: int

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_size * self.micro_batches_per_step

    def numbers(self, step: int, rank: int, world_size: int) -> range:
        """The micro-batches that a rank takes in a step."""
        first = step * self.micro_batches_per_step
        return range(first + rank, first + self.micro_batches_per_step, world_size)

    def micro_batch(self, number: int) -> list[int]:
        """The rows of one micro-batch."""
        return self._samples(number * self.micro_batch_size, self.micro_batch_size)

    def step(self, step: int) -> list[int]:
        """The rows of a whole step."""
        return self._samples(step * self.rows_per_step, self.rows_per_step)

    def epoch(self, step: int) -> float:
        """Epochs seen before a step."""
        return step * self.rows_per_step / self.n_rows

    def _samples(self, start: int, count: int) -> list[int]:
        places = (divmod(sample, self.n_rows) for sample in range(start, start + count))
        return [int(_permutation(self.n_rows, self.seed, epoch)[place]) for epoch, place in places]


def read_batch(split: Split, rows: list[int], block_size: int, loss_on: str) -> Batch:
    """Rows as inputs and next-token targets; 'assistant' keeps the targets that the mask marks."""
    tokens = np.stack([split.ids(row * block_size, block_size + 1) for row in rows])  # (B, T+1)
    ids = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64)).flatten()
    if loss_on == "all":
        return Batch(ids, targets, None)
    masks = np.concatenate([split.mask(row * block_size + 1, block_size) for row in rows])
    logit_index = torch.from_numpy(np.flatnonzero(masks))
    return Batch(ids, targets[logit_index], logit_index)


def count_targets(split: Split, rows: list[int], block_size: int, loss_on: str) -> int:
    """Targets that `read_batch` would give over these rows, from the mask alone."""
    if loss_on == "all":
        return len(rows) * block_size
    return sum(int(split.mask(row * block_size + 1, block_size).sum()) for row in rows)
