"""The rows of one opened file, which its bytes tell how to read, and its name where they do not.

A row that cannot be read comes as a Reject in its place. Which files there are is told by
sources.py, what a row holds by conversations.py.
"""

import io
import itertools
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nanosynth import UserError
from nanosynth.data import json_array, utf8
from nanosynth.data.conversations import COLUMNS, FORMS, Columns, PlainText, Reject

KINDS = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".zst", ".bz2")
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
FOREIGN = {  # what a file may be in spite of its name; in lower case
    b"pk\x03\x04": "a zip archive",
    b"\xfd7zxz": "compressed by xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x89hdf": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer in place of the file",
    b"<!doctype": "a web page",
    b"<html": "a web page",
}
ARROW_STREAM = b"\xff\xff\xff\xff"  # before the length of its first message
HEAD_BYTES = 1 << 20  # enough for some rows
END_OF_FILE = b"\xff"  # a byte that UTF-8 never has
LONGEST = 1 << 28  # bytes of a line, or of a document of text


@dataclass(frozen=True)
class Reading:
    """What the user says of the sources."""

    columns: Columns = field(default_factory=lambda: COLUMNS)
    split: str = ""  # of a data set that has several; empty: train
    separator: str = "<|endoftext|>"  # of the documents of a text file

    def takes(self, column: str) -> bool:
        return any(column in names for names in self.columns.values())

    def may_be_row(self, row: dict) -> bool:
        """Whether it has a column that rows hold their text in."""
        return any(name in row for form in FORMS for use in form for name in self.columns[use])


@dataclass
class Part:
    """One file, or one data set of the hub, and what its reading has found so far."""

    name: str
    identity: dict  # what names these very rows: source, and its revision or SHA-256
    size: int | None  # bytes of a file, rows of others; None: not known before it was read
    read: Callable[["Part"], Iterator[object]]
    reading: Reading
    path: Path | None = None  # of a file
    has_splits: bool = False  # of which --split has named one
    number: int = 0  # among the parts
    source: int = 0  # the number of its --source
    position: int = 0  # bytes of a file that were read
    unread: Counter[str] = field(default_factory=Counter)  # rows by column of text that is not read


def kind_of(path: Path) -> str:
    """The one of KINDS that a file's name tells; '' for another."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def rows(raw: BinaryIO, part: Part) -> Iterator[object]:
    """The rows of an opened file."""
    path, kind, file = part.path, kind_of(part.path), raw
    for magic, compression in COMPRESSIONS.items():
        if raw.peek(8).startswith(magic):
            file = _decompressed(raw, compression)
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    for magic, name in FOREIGN.items():
        if head[:64].lower().startswith(magic):
            raise UserError(f"{path} is {name}; wanted a {', '.join(KINDS)} file")
    if head.startswith(b"PAR1") or kind == ".parquet":
        yield from _parquet_rows(file, part)
        return
    if head.startswith((b"ARROW1", ARROW_STREAM)) or kind == ".arrow":
        found = _arrow_rows(file, part)
    else:
        utf8.check(head, path)
        found = _documents(file, part) if kind == ".txt" else _json_rows(file, part)
    for row in found:
        part.position = raw.tell()
        yield row


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """Arrow's streams: they say so when a file ends too early, which zstandard's do not."""
    import pyarrow  # slow to import

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), compression)
    return io.BufferedReader(stream, HEAD_BYTES)


def _json_rows(file: BinaryIO, part: Part) -> Iterator[object]:
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES].decode("utf-8", "surrogateescape")
    form = json_array.form_of(head)
    first = head.lstrip("\ufeff \t\r\n")[:1]
    if form == "lines" and (first == "{" or kind_of(part.path) != ".json"):
        return _unwrapped(_lines(file, part), part)
    if form == "values":
        return _unwrapped(json_array.values(file, part.path), part)
    return json_array.items(file, part.path)


def _lines(file: BinaryIO, part: Part) -> Iterator[object]:
    """One row a line; blank lines are no rows, and a line that is not JSON comes as a Reject."""
    for number in itertools.count(1):
        line = file.readline(LONGEST)
        if len(line) == LONGEST:
            raise UserError(f"{part.path}: line {number} is longer than {LONGEST >> 20} MB")
        if not line:
            return
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if line:
            # Bytes that are not UTF-8 come as lone surrogates, which no conversation may have.
            text = line.decode("utf-8", "surrogateescape")
            try:
                yield json.loads(text, parse_int=float)
            except (ValueError, RecursionError):
                yield Reject("line is not JSON", words=text[:1000])


def _unwrapped(found: Iterator[object], part: Part) -> Iterator[object]:
    """`found`, or the rows within it where it is one object around them."""
    first, split = list(itertools.islice(found, 2)), part.reading.split
    lists = dict(_lists_of_rows(first[0], part.reading)) if len(first) == 1 else {}
    if len(lists) > 1:
        part.has_splits = True
        if split not in lists:
            names = ", ".join([*lists][:20])
            raise UserError(f"{part.path} has several lists of rows ({names}); name one by --split")
        lists = {split: lists[split]}
    yield from next(iter(lists.values()), itertools.chain(first, found))


def _lists_of_rows(value: object, reading: Reading) -> Iterator[tuple[str, list]]:
    """(name, rows) of each list within an object that is no row itself; its values may be rows."""
    if not isinstance(value, dict):
        return
    rows = list(value.values())
    if rows and all(isinstance(row, dict) and reading.may_be_row(row) for row in rows):
        yield "", rows
        return
    found = []
    for name, inside in value.items():
        first = inside[0] if isinstance(inside, list) and inside else None
        # A column of turns is no list of rows, unless each of them has turns.
        nested = isinstance(first, dict) and any(key in first for key in reading.columns["turns"])
        if reading.may_be_row({name: inside}) and not nested:
            return  # it is one
        if isinstance(first, dict):
            found.append((name, inside))
        else:
            deeper = _lists_of_rows(inside, reading)
            found += [(f"{name}.{key}".rstrip("."), rows) for key, rows in deeper]
    # Beside the rows may stand what tells of them: features, licences.
    yield from [(name, rows) for name, rows in found if reading.may_be_row(rows[0])] or found


def _documents(file: BinaryIO, part: Part) -> Iterator[object]:
    """The texts between separators, as they stand; a blank one is none."""
    separator = _separator(part.reading.separator)
    rest, block = file.read(3).removeprefix(b"\xef\xbb\xbf"), b"..."
    while block:
        # As much again as waits, so that a document of any size takes linear time.
        block = file.read(max(HEAD_BYTES, len(rest)))
        *whole, rest = separator.split(rest + (block or END_OF_FILE))
        if len(rest) > LONGEST:
            mend = "part them by --document_separator"
            raise UserError(f"{part.path}: wanted documents of at most {LONGEST >> 20} MB; {mend}")
        for text in whole if block else (*whole, rest.removesuffix(END_OF_FILE)):
            if text.strip():
                yield PlainText(text.decode("utf-8", "surrogateescape"))


def _separator(text: str) -> re.Pattern[bytes]:
    """What parts documents: `text` as a line of its own or, with a newline in it, as it is."""
    text = text.replace("\\n", "\n")
    pattern = re.escape(text.encode()).replace(b"\\\n", rb"\r?\n")
    if "\n" not in text:
        # A line begins behind a newline, or where the document does.
        pattern = rb"(?:\r?\n|(?<=\n)|\A)[ \t]*" + pattern + rb"[ \t]*(?:\r?\n|(?=\xff))"
    return re.compile(pattern)


def _parquet_rows(file: BinaryIO, part: Part) -> Iterator[object]:
    """Of the columns that may be used, and no others: what stands in those can do no harm."""
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as copy:
        if not isinstance(file.raw, io.FileIO):  # a compressed one: it is read from its end
            shutil.copyfileobj(file, copy, HEAD_BYTES)
            file = copy
        try:
            table = pyarrow.parquet.ParquetFile(file)
            total, n_rows = table.metadata.num_rows, 0
            wanted = [name for name in table.schema_arrow.names if part.reading.takes(name)]
            part.unread.update(_unread(table, wanted))
            for batch in table.iter_batches(batch_size=1024, columns=wanted):
                n_rows += batch.num_rows
                part.position = part.size * n_rows // total
                yield from _batch_rows(batch)
        except pyarrow.ArrowException as error:
            raise UserError(f"{part.path}: not a readable parquet file: {error}") from error


def _unread(table: object, wanted: list[str]) -> Counter[str]:
    """How many rows have text in each column that is not read, as the file's statistics say; of a
    nested one, and where they say nothing: all.
    """
    found: Counter[str] = Counter()
    texts = {column.name for column in table.schema_arrow if _has_text(column.type)} - {*wanted}
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        columns = (group.column(place) for place in range(group.num_columns))
        known = {c.path_in_schema: c.statistics for c in columns if c.is_stats_set}
        for name in texts:
            has_count = name in known and known[name].has_null_count
            found[name] += group.num_rows - (known[name].null_count if has_count else 0)
    return +found


def _has_text(kind: object) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _has_text(kind.value_type)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_text or any(_has_text(kind.field(place).type) for place in range(kind.num_fields))


def _arrow_rows(file: BinaryIO, part: Part) -> Iterator[object]:
    """What `datasets` writes, a stream of batches, or an Arrow file, which may be mapped."""
    import pyarrow
    import pyarrow.ipc

    try:
        if file.peek(8).startswith(b"ARROW1"):
            table = pyarrow.ipc.open_file(pyarrow.BufferReader(file.read()))
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            table = batches = pyarrow.ipc.open_stream(file)
        wanted = [n for n, name in enumerate(table.schema.names) if part.reading.takes(name)]
        texts = [n for n, kind in enumerate(table.schema.types) if _has_text(kind)]
        for batch in batches:
            for place in {*texts} - {*wanted}:
                n_texts = batch.num_rows - batch.column(place).null_count
                part.unread[batch.schema.names[place]] += n_texts
            yield from _batch_rows(batch.select(wanted))
    except pyarrow.ArrowException as error:
        raise UserError(f"{part.path}: not a readable Arrow file: {error}") from error


def _batch_rows(batch: object) -> Iterator[object]:
    """The rows of an Arrow batch; one that Python cannot hold, as a date of the year 20000 or text
    that is not UTF-8, comes as a Reject.
    """
    names = batch.schema.names
    try:
        if len({*names}) < len(names):  # a dict would keep the last of them, unsaid
            raise ValueError("two columns of one name")
        yield from batch.to_pylist() if names else [{}] * batch.num_rows
    except Exception:  # pyarrow raises what the values' own types do
        for number in range(batch.num_rows):
            yield _row_or_reject(names, [column[number] for column in batch.columns])


def _row_or_reject(names: list[str], values: list[object]) -> object:
    row = {}
    for name, value in zip(names, values, strict=True):
        try:
            if name in row:
                return Reject("row cannot be read", f"two columns {name}")
            row[name] = value.as_py()
        except UnicodeDecodeError:
            return Reject("text is not UTF-8", "cp1252 or another encoding of single bytes")
        except Exception as error:
            return Reject("row cannot be read", f"{name}: {error}")
    return row
