"""Rows of files, folders and the hub, and what names these very rows.

A row that cannot be read comes as a Reject in its place: prepare.py counts these. What conversation
a row holds is told by conversations.py.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nanosynth import UserError
from nanosynth.data import json_array
from nanosynth.data.conversations import Reject

OPENHERMES = "teknium/OpenHermes-2.5"
# The data has one file, unchanged since 2023-11-12; later revisions touch its card alone.
OPENHERMES_FILE, OPENHERMES_REVISION = "openhermes2_5.json", "b820378"
MAKE_SAMPLE = (
    "python data/make_sample.py --to=data/sample.jsonl && "
    "python prepare.py --source=data/sample.jsonl --data_dir=data/demo"
)
HUB = "https://huggingface.co"
KINDS = (".json", ".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LONGEST_LINE = 1 << 28  # bytes; a longer one is no JSON line


@dataclass
class Part:
    """One file, or one data set of the hub."""

    name: str
    identity: dict  # what names these very rows: source, and its revision or SHA-256
    size: int | None  # in `unit`; None: not known before it was read
    unit: str  # 'B' or 'rows'
    read: Callable[["Part"], Iterator[object]]
    position: int = field(default=0, init=False)  # moves up to `size`


@dataclass
class Source:
    """All rows, part after part; `rows()` reads anew."""

    parts: list[Part]
    part: Part = field(init=False)  # that the last row came from
    row: int = field(default=0, init=False)  # its number there, from 1
    n_rows: int = field(default=0, init=False)  # of all parts

    def __post_init__(self):
        self.part = self.parts[0]
        units, sizes = {part.unit for part in self.parts}, [part.size for part in self.parts]
        self._has_one_unit = len(units) == 1
        self.unit = self.part.unit if self._has_one_unit else "rows"
        # None where a part does not know its own, or unlike units have no sum.
        self.size = sum(sizes) if self._has_one_unit and None not in sizes else None

    def rows(self) -> Iterator[object]:
        self.n_rows = 0
        for part in self.parts:
            part.position = 0
        for part in self.parts:
            self.part, self.row = part, 0
            for row in part.read(part):
                self.row += 1
                self.n_rows += 1
                yield row

    @property
    def stated_rows(self) -> int | None:
        """How many they are, where that is known before they were read."""
        return self.size if self.unit == "rows" else None

    @property
    def position(self) -> int:
        """How far it was read, in `unit`."""
        return sum(part.position for part in self.parts) if self._has_one_unit else self.n_rows

    @property
    def identity(self) -> dict:
        """For meta.json. One part's keys stand alone, too, as `source` and what names it."""
        identities = [part.identity for part in self.parts]
        alone = identities[0] if len(identities) == 1 else {}
        names = ", ".join(identity["source"] for identity in identities)
        return {"source": names, **alone, "sources": identities}


def open_sources(names: Sequence[str], revision: str = "") -> Source:
    """`names`: each a local file or folder of files, or a hub id 'owner/name'."""
    parts = [part for name in names for part in _parts(name, revision)]
    if not parts:
        raise UserError("no source; wanted --source=FILE, a folder or a hub id")
    return Source(parts)


def _parts(name: str, revision: str) -> list[Part]:
    path = Path(name)
    if path.is_file():
        return [_file(path, path.name)]
    if path.is_dir():
        return _folder(path)
    is_local = is_readable(path) or path.parent.is_dir()  # a mistyped name beside other files
    if is_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        wanted = f"wanted {_file_kinds()}, a folder or a hub id such as {OPENHERMES}"
        if path.stem == "sample":
            wanted = f"the demo's is made first: {MAKE_SAMPLE}"
        raise UserError(f"no source {name!r}; {wanted}")
    return [_hub(name, revision)]


def _file_kinds() -> str:
    return f"a {', '.join(KINDS)} file (or one of them with {' or '.join(COMPRESSIONS)})"


def is_readable(path: Path) -> bool:
    """Whether a file's name tells of a kind that can be read."""
    suffixes = path.suffixes[-2:]
    plain = suffixes[:-1] if suffixes and suffixes[-1] in COMPRESSIONS else suffixes
    return bool(plain) and plain[-1] in KINDS


def _folder(folder: Path) -> list[Part]:
    """Its files and those of its folders, by name; hidden ones and other kinds are left out."""
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    seen = [path for path in inside if not any(name.startswith(".") for name in path.parts)]
    parts = [_file(folder / path, str(path)) for path in sorted(seen) if is_readable(path)]
    if not parts:
        raise UserError(f"nothing to read in {folder} ({len(seen)} files); wanted {_file_kinds()}")
    return parts


def _file(path: Path, name: str) -> Part:
    if not is_readable(path):
        raise UserError(f"cannot read {path}; wanted {_file_kinds()}")
    before = path.stat()
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def read(part: Part) -> Iterator[object]:
        with open(path, "rb") as raw:
            try:
                yield from _rows(raw, path, part)
            except OSError as error:
                where = f"near byte {raw.tell()} of {part.size}"
                raise UserError(f"{path}: cannot be read {where}: {error}") from error
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            sizes = f"{after.st_size} bytes at its end, {before.st_size} at first"
            raise UserError(f"{path} changed while it was read ({sizes}); prepare it again")
        part.position = part.size

    return Part(name, {"source": name, "sha256": sha256}, before.st_size, "B", read)


def _rows(raw: BinaryIO, path: Path, part: Part) -> Iterator[object]:
    """The rows of an opened file, decompressed and parsed as its name tells."""
    compression = COMPRESSIONS.get(path.suffix)
    kind = path.suffixes[-2] if compression else path.suffix
    file = _decompressed(raw, compression) if compression else raw
    if kind == ".parquet":
        return _parquet_rows(file, path, part)
    first = file.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if kind == ".json" and first != b"{":  # which would be JSON lines under that name
        return _array_rows(file, raw, path, part)
    return _line_rows(file, raw, path, part)


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """Arrow's streams: they say so when a file ends too early, which zstandard's do not."""
    import pyarrow  # slow to import

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), compression)
    return io.BufferedReader(stream, 1 << 20)


def _array_rows(file: BinaryIO, raw: BinaryIO, path: Path, part: Part) -> Iterator[object]:
    n_rows = 0
    try:
        for row in json_array.items(file):
            part.position = raw.tell()
            n_rows += 1
            yield row
    except json_array.BrokenArray as error:
        size = f" of {part.size}" if file is raw else ", decompressed"
        where = f"after {n_rows} rows, near byte {error.offset}{size}"
        raise UserError(f"{path}: broken JSON {where}: {error}") from None


def _line_rows(file: BinaryIO, raw: BinaryIO, path: Path, part: Part) -> Iterator[object]:
    """One row a line; blank lines are no rows, and a line that is not JSON comes as a Reject."""
    n_lines = 0
    while line := file.readline(LONGEST_LINE):
        n_lines += 1
        part.position = raw.tell()
        if len(line) == LONGEST_LINE:
            raise UserError(f"{path}: line {n_lines} is longer than {LONGEST_LINE >> 20} MB")
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if line:
            # Bytes that are not UTF-8 come as lone surrogates, which no conversation may have.
            text = line.decode("utf-8", "surrogateescape")
            try:
                yield json.loads(text, parse_int=float)
            except (ValueError, RecursionError):
                yield Reject("line is not JSON", text[:1000])


def _parquet_rows(file: BinaryIO, path: Path, part: Part) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as copy:
        if not isinstance(file.raw, io.FileIO):  # a compressed one: it is read from its end
            shutil.copyfileobj(file, copy, 1 << 20)
            file = copy
        try:
            table = pyarrow.parquet.ParquetFile(file)
            total = table.metadata.num_rows
            n_rows = 0
            for batch in table.iter_batches(batch_size=1024):
                n_rows += batch.num_rows
                part.position = part.size * n_rows // total
                yield from _batch_rows(batch)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a readable parquet file: {error}") from error


def _batch_rows(batch: object) -> Iterator[object]:
    """The rows of an Arrow batch; one whose text is not UTF-8 comes as a Reject."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield Reject("text is not valid Unicode")


def _hub(name: str, revision: str) -> Part:
    """A hub data set. OpenHermes is its one file, downloaded and then read like any local one."""
    import huggingface_hub

    with _hub_errors(name, revision):
        if name == OPENHERMES:
            return _openhermes(revision or OPENHERMES_REVISION)
        import datasets

        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision or None).sha
        table = datasets.load_dataset(name, revision=commit, split="train", streaming=True)
    splits = table.info.splits or {}
    size = splits["train"].num_examples or None if "train" in splits else None

    def read(part: Part) -> Iterator[object]:
        with _hub_errors(name, revision):
            for row in table:
                part.position += 1
                yield row

    return Part(name, {"source": name, "revision": commit}, size, "rows", read)


def _openhermes(revision: str) -> Part:
    """The client resumes a broken download, keeps the file in its cache and checks it."""
    import huggingface_hub

    path = Path(
        huggingface_hub.hf_hub_download(
            OPENHERMES, OPENHERMES_FILE, repo_type="dataset", revision=revision
        )
    )
    part = _file(path, OPENHERMES_FILE)
    commit = path.parent.name  # the cache's folder of the file is named by it
    part.identity |= {"source": OPENHERMES, "file": OPENHERMES_FILE}
    part.identity |= {"revision": revision, "commit": commit}
    return part


@contextlib.contextmanager
def _hub_errors(name: str, revision: str) -> Iterator[None]:
    """The hub's clients raise what their own libraries raise: all of it means no data set."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        file, place = "FILE.json", "its file"
        if name == OPENHERMES:
            file = OPENHERMES_FILE
            place = f"{HUB}/datasets/{name}/resolve/{revision or OPENHERMES_REVISION}/{file}"
        raise UserError(
            f"cannot get {name} from the hub: {reason}\n  Without a network: bring {place} here "
            f"by other means, and run: python prepare.py --source={file} --data_dir=data/NAME"
        ) from error
