"""Rows of a file, of the hub or of the bundled generator, and what conversation each row holds.

A row that holds none raises Reject with a short reason: prepare.py counts these. No tokens here.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ijson

from nanosynth import UserError, synthetic
from nanosynth.chat import Turn

OPENHERMES = "teknium/OpenHermes-2.5"
# The data has one file, unchanged since 2023-11-12; later revisions touch its card alone.
OPENHERMES_FILE, OPENHERMES_REVISION = "openhermes2_5.json", "b820378"
SAMPLE_ROWS = 60_000  # of the bundled conversations

ROLE_NAMES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class Reject(Exception):
    """A row that holds no usable conversation; the text is the reason it is counted under."""


@dataclass
class Source:
    """Rows and their provenance; `rows()` reads anew and moves `position` up to `size`."""

    identity: dict  # what names these very rows: source, and its revision or SHA-256
    size: int  # in `unit`
    unit: str  # 'B' or 'rows'
    read: Callable[["Source"], Iterator[object]]
    position: int = field(default=0, init=False)

    def rows(self) -> Iterator[object]:
        self.position = 0
        return self.read(self)


def open_source(name: str, revision: str = "") -> Source:
    """`name`: 'sample', a local .json, .jsonl or .parquet file, or a hub id 'owner/name'."""
    if name == "sample":
        return _sample_source()
    path = Path(name)
    if path.is_file():
        return _file_source(path, {"source": path.name})
    if path.exists() or path.suffix in _READERS or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        wanted = f"'sample', a {', '.join(_READERS)} file or a hub id such as {OPENHERMES}"
        raise UserError(f"no source {name!r}; wanted {wanted}")
    return _hub_source(name, revision)


def _sample_source() -> Source:
    def read(source: Source) -> Iterator[object]:
        for row in synthetic.conversations(SAMPLE_ROWS):
            source.position += 1
            yield row

    return Source({"source": "sample", "rows": SAMPLE_ROWS}, SAMPLE_ROWS, "rows", read)


def _file_source(path: Path, identity: dict) -> Source:
    if path.suffix not in _READERS:
        raise UserError(f"cannot read {path}; wanted one of {', '.join(_READERS)}")
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    reader = _READERS[path.suffix]
    identity = {**identity, "sha256": sha256}
    return Source(identity, path.stat().st_size, "B", lambda source: reader(path, source))


def _read_json(path: Path, source: Source) -> Iterator[object]:
    """The items of a JSON array, one at a time; a .json file of JSON lines is read as such."""
    n_rows = 0
    with open(path, "rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if start == b"{":
            yield from _read_jsonl(path, source)
            return
        if start != b"[":
            raise UserError(f"{path}: wanted a JSON array of rows; it starts with {start!r}")
        file.seek(3 if _has_bom(path) else 0)
        try:
            for row in ijson.items(file, "item", use_float=True, buf_size=1 << 20):
                source.position = file.tell()
                n_rows += 1
                yield row
        except ijson.JSONError as error:
            message = str(error).strip().splitlines()[0]
            where = f"after {n_rows} rows, near byte {file.tell()} of {source.size}"
            raise UserError(f"{path}: broken JSON {where}: {message}") from error


def _has_bom(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(3) == b"\xef\xbb\xbf"


def _read_jsonl(path: Path, source: Source) -> Iterator[object]:
    """One row a line; blank lines are no rows, and a line that is not JSON comes as a Reject."""
    with open(path, "rb") as file:
        for line in file:
            source.position += len(line)
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if line:
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield Reject("line is not JSON")


def _read_parquet(path: Path, source: Source) -> Iterator[object]:
    import pyarrow  # slow to import, and needed here alone
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        total = file.metadata.num_rows
        n_rows = 0
        for batch in file.iter_batches(batch_size=1024):
            n_rows += batch.num_rows
            source.position = source.size * n_rows // total
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from error


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _hub_source(name: str, revision: str) -> Source:
    """A hub data set. OpenHermes is its one file, downloaded and then read like any local one."""
    import datasets
    import huggingface_hub

    try:
        if name == OPENHERMES:
            revision = revision or OPENHERMES_REVISION
            path = huggingface_hub.hf_hub_download(
                name, OPENHERMES_FILE, repo_type="dataset", revision=revision
            )
            return _file_source(Path(path), {"source": name, "revision": revision})
        revision = huggingface_hub.HfApi().dataset_info(name, revision=revision or None).sha
        table = datasets.load_dataset(name, revision=revision, split="train")
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot get {name} from the hub: {reason}\n  Without a network, bring its file here "
            "by other means and run: python prepare.py --source=FILE.json --data_dir=data/NAME"
        ) from error

    def read(source: Source) -> Iterator[object]:
        for row in table:
            source.position += 1
            yield row

    return Source({"source": name, "revision": revision}, len(table), "rows", read)


def conversation(row: object) -> list[Turn]:
    """The turns of one row: an optional system turn, then user and assistant in alternation.

    Takes `conversations` (from/value), `messages` (role/content) and instruction rows. Keys may be
    missing or null: OpenHermes leaves out most columns. An empty system turn is no turn.
    """
    if isinstance(row, Reject):
        raise row
    if not isinstance(row, dict):
        raise Reject("row is not an object")
    listed = _first(row, "conversations", "messages")
    if listed is not None:
        turns = _listed_turns(listed)
    elif row.get("instruction") is not None:
        turns = _instruction_turns(row)
    else:
        raise Reject("no conversations, messages or instruction")
    if turns and turns[0][0] == "system" and not turns[0][1].strip():
        turns = turns[1:]
    _check_turns(turns)
    return turns


def _first(row: dict, *keys: str) -> object:
    """The first value that is not null; merged tables have every column, mostly empty."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _listed_turns(listed: object) -> list[Turn]:
    if not isinstance(listed, list):
        raise Reject("turns are not a list")
    turns = []
    for turn in listed:
        if not isinstance(turn, dict):
            raise Reject("turn is not an object")
        role, text = _first(turn, "from", "role"), _first(turn, "value", "content")
        if not isinstance(role, str) or role not in ROLE_NAMES:
            raise Reject("unknown role")
        if not isinstance(text, str):
            raise Reject("turn without text")
        turns.append((ROLE_NAMES[role], text))
    return turns


def _instruction_turns(row: dict) -> list[Turn]:
    """Alpaca's columns: instruction, an optional input below it, and output or response."""
    parts = [row["instruction"], row.get("input") or "", _first(row, "output", "response")]
    parts.append(row.get("system_prompt") or "")
    if not all(isinstance(part, str) for part in parts):
        raise Reject("turn without text")
    instruction, addition, answer, system = parts
    question = f"{instruction}\n\n{addition}" if addition.strip() else instruction
    return [("system", system), ("user", question), ("assistant", answer)]


def _check_turns(turns: list[Turn]) -> None:
    body = turns[1:] if turns and turns[0][0] == "system" else turns
    if not body:
        raise Reject("no turns")
    if body[0][0] != "user":
        raise Reject("does not begin with the user")
    for (role, text), wanted in zip(body, ["user", "assistant"] * len(body), strict=False):
        if role != wanted:
            raise Reject("turns do not alternate")
        if not text.strip():
            raise Reject("empty turn")
    if body[-1][0] != "assistant":
        raise Reject("does not end with an answer")
    for _, text in turns:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Reject("text is not valid Unicode") from None
