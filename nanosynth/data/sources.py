"""Where rows come from: files, folders and the hub, and what names these very rows.

How one file is read is told by formats.py; what a row holds by conversations.py.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanosynth import UserError
from nanosynth.data import FILES, LABELS, PICTURE, formats
from nanosynth.data.conversations import PlainText
from nanosynth.data.formats import Part, Reading

OPENHERMES = "teknium/OpenHermes-2.5"
# The data has one file, unchanged since 2023-11-12; later revisions touch its card alone.
OPENHERMES_FILE, OPENHERMES_REVISION = "openhermes2_5.json", "b820378"
MAKE_SAMPLE = (
    "python data/make_sample.py --to=data/sample.jsonl && "
    "python prepare.py --source=data/sample.jsonl --data_dir=data/demo"
)
HUB = "https://huggingface.co"
# Of hub sets whose default is none, or more than anyone wants: FineWeb's is 45 TB.
HUB_CONFIGS = {
    "Salesforce/wikitext": "wikitext-103-raw-v1",
    "HuggingFaceFW/fineweb": "sample-10BT",
    "HuggingFaceFW/fineweb-edu": "sample-10BT",
}

OURS = {  # the files that tell what nanosynth wrote into a folder
    "bins": ("meta.json", "train.bin"),
    "a run": ("config.json", "metrics.jsonl"),
    "a checkpoint": ("meta.json", "model.safetensors"),
}
REJECT_KEYS = ("file", "row", "reason", "text")
SPLITS_FILE = "dataset_dict.json"  # of datasets' save_to_disk, where it saved several
SAVED_FILES = ("dataset_info.json", "state.json")  # of one, beside its Arrow files


@dataclass
class Source:
    """All rows, part after part; `rows()` reads anew."""

    parts: list[Part]
    reading: Reading
    left_out: Counter[str] = field(default_factory=Counter)  # files and folders within folders
    part: Part = field(init=False)  # that the last row came from
    row: int = field(default=0, init=False)  # its number there, from 1
    n_rows: int = field(default=0, init=False)  # of all parts

    def __post_init__(self):
        files = [part.path is not None for part in self.parts]
        self.unit = "B" if all(files) else "rows"
        sizes = [part.size for part in self.parts]
        # None where a part does not know its own, or bytes and rows have no sum.
        self.size = sum(sizes) if len({*files}) == 1 and None not in sizes else None

    def rows(self) -> Iterator[object]:
        self.n_rows = 0
        for part in self.parts:
            part.position, part.unread = 0, Counter()
        for part in self.parts:
            self.part, self.row = part, 0
            for row in part.read(part):
                self.row += 1
                self.n_rows += 1
                yield row

    @property
    def position(self) -> int:
        """How far it was read, in `unit`."""
        return sum(part.position for part in self.parts) if self.unit == "B" else self.n_rows

    @property
    def unread(self) -> Counter[str]:
        """Rows by the name of a column that holds text and was not read."""
        return sum((part.unread for part in self.parts), Counter())

    @property
    def identity(self) -> dict:
        """For meta.json. One part's keys stand alone, too, as `source` and what names it."""
        identities = [part.identity for part in self.parts]
        alone = identities[0] if len(identities) == 1 else {}
        names = ", ".join(identity["source"] for identity in identities)
        return {"source": names, **alone, "sources": identities}


def open_sources(
    names: Sequence[str], revision: str = "", reading: Reading | None = None
) -> Source:
    """`names`: each a file, a folder of files, or a hub id, 'owner/name' or 'owner/name:config'."""
    reading, left_out, parts = reading or Reading(), Counter(), []
    for number, name in enumerate(names):
        try:
            found = _parts(name, revision, reading, left_out)
        except OSError as error:
            raise UserError(f"--source={name}: cannot be read: {error}") from None
        for part in found:
            part.source, part.number = number, len(parts)
            parts.append(part)
    return Source(parts, reading, left_out)


def _parts(name: str, revision: str, reading: Reading, left_out: Counter[str]) -> list[Part]:
    path = Path(name)
    if path.is_file():
        return [_file(path, path.name, reading)]
    if path.is_dir():
        return _folder(path, reading, left_out)
    # A file beside others that is mistyped, or a device.
    is_local = formats.kind_of(path) or path.exists() or path.parent.is_dir()
    if is_local or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        wanted = f"wanted {_file_kinds()}, a folder or a hub id such as {OPENHERMES}"
        if path.stem == "sample":
            wanted = f"the demo's is made first: {MAKE_SAMPLE}"
        raise UserError(f"no source {name!r}; {wanted}")
    return [_hub(name, revision, reading)]


def _file_kinds() -> str:
    return f"a {', '.join(formats.KINDS)} file ({', '.join(formats.COMPRESSED)} too)"


def _folder(folder: Path, reading: Reading, left_out: Counter[str]) -> list[Part]:
    """Its files and those of its folders, by name; what is left out is counted by its kind."""
    if folder.resolve().parent == folder.resolve():
        raise UserError(f"--source={folder} is the whole machine; wanted a folder of the data")
    files = list(_files(folder, reading, left_out, set()))
    parts = [_file(path, str(path.relative_to(folder)), reading) for path in files]
    for part in parts:
        part.has_splits = any((above / SPLITS_FILE).is_file() for above in part.path.parents[:2])
    if not parts:
        seen = ", ".join(f"{name}: {n}" for name, n in left_out.items()) or "it is empty"
        raise UserError(f"nothing to read in {folder} ({seen}); wanted {_file_kinds()}")
    return parts


def _files(
    folder: Path, reading: Reading, left_out: Counter[str], seen: set[tuple[int, int]]
) -> Iterator[Path]:
    """The files to read below a folder, links followed; `seen` are the folders that were."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:  # a link back, or a second one
        return
    seen.add((status.st_dev, status.st_ino))
    inside = sorted(folder.iterdir())
    names = {path.name for path in inside}
    if found := [what for what, files in OURS.items() if names.issuperset(files)]:
        left_out[f"{folder} ({found[0]})"] += 1
        # Beside bins may lie what they were made of.
        ours = ("meta.json", PICTURE, *FILES, *LABELS)
        inside = [path for path in inside if path.name not in ours] if found[0] == "bins" else []
    elif (folder / SPLITS_FILE).is_file():
        inside = [_saved_split(folder, reading.split)]
    elif names.issuperset(SAVED_FILES):
        inside = [path for path in inside if path.name not in SAVED_FILES]
    for path in inside:
        if path.name.startswith("."):
            left_out["hidden"] += 1
        elif path.match("cache-*.arrow"):  # what a map or filter of `datasets` made of the others
            left_out["cache-*.arrow"] += 1
        elif path.is_dir():
            yield from _files(path, reading, left_out, seen)
        elif not (path.is_file() and formats.kind_of(path)):
            left_out[path.suffix or path.name] += 1
        elif path.stat().st_size and is_rejects(path):
            left_out["rejects"] += 1
        else:
            yield path


def is_rejects(path: Path) -> bool:
    """Whether a file is one that prepare.py's --rejects wrote: empty, or of its keys."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        line = file.readline(1 << 16)
    try:
        return not line or tuple(json.loads(line)) == REJECT_KEYS
    except (ValueError, TypeError, RecursionError):
        return False


def _saved_split(folder: Path, split: str) -> Path:
    try:
        names = json.loads((folder / SPLITS_FILE).read_bytes())["splits"]
        said = ", ".join(names)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / SPLITS_FILE} does not name the splits ({error!r})") from None
    if (split or "train") not in names:
        raise UserError(f"{folder} has the splits {said}; name one by --split")
    return folder / (split or "train")


def _file(path: Path, name: str, reading: Reading) -> Part:
    if not formats.kind_of(path):
        raise UserError(f"cannot read {path}; wanted {_file_kinds()}")
    before = path.stat()
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def read(part: Part) -> Iterator[object]:
        with open(path, "rb", buffering=formats.HEAD_BYTES) as raw:
            try:
                yield from formats.rows(raw, part)
            except OSError as error:
                where = f"near byte {raw.tell()} of {part.size}"
                raise UserError(f"{path}: cannot be read {where}: {error}") from error
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (part.size, before.st_mtime_ns):
            sizes = f"{after.st_size} bytes at its end, {part.size} at first"
            raise UserError(f"{path} changed while it was read ({sizes}); prepare it again")
        part.position = part.size

    identity = {"source": name, "sha256": sha256}
    return Part(name, identity, before.st_size, read, reading, path)


def _hub(name: str, revision: str, reading: Reading) -> Part:
    """A hub data set. OpenHermes is its one file, downloaded and then read like any local one."""
    import huggingface_hub

    name, _, config = name.partition(":")
    config, split = config or HUB_CONFIGS.get(name, ""), reading.split or "train"
    with _hub_errors(name, revision):
        if name == OPENHERMES:
            return _openhermes(revision or OPENHERMES_REVISION, reading)
        import datasets

        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision or None).sha
        table = datasets.load_dataset(
            name, config or None, revision=commit, split=split, streaming=True
        )
    splits, is_wikitext = table.info.splits or {}, name.endswith("/wikitext")
    is_counted = split in splits and not is_wikitext
    size = splits[split].num_examples or None if is_counted else None

    def read(part: Part) -> Iterator[object]:
        with _hub_errors(name, revision):
            yield from _articles(table) if is_wikitext else table

    identity = {"source": name, "revision": commit}
    named = {"config": config, "split": reading.split}
    identity |= {key: value for key, value in named.items() if value}
    return Part(name, identity, size, read, reading, has_splits=True)


def _articles(lines: Iterator[dict]) -> Iterator[PlainText]:
    """wikitext's rows are lines: an article goes from one title, ' = Title = ', to the next."""
    article = ""
    for row in lines:
        if re.fullmatch(r" = [^=](.*[^=])? = \n?", row["text"]) and article.strip():
            yield PlainText(article)
            article = ""
        article += row["text"]
    yield PlainText(article)


def _openhermes(revision: str, reading: Reading) -> Part:
    """The client resumes a broken download, keeps the file in its cache and checks it."""
    import huggingface_hub

    path = Path(
        huggingface_hub.hf_hub_download(
            OPENHERMES, OPENHERMES_FILE, repo_type="dataset", revision=revision
        )
    )
    part = _file(path, OPENHERMES_FILE, reading)
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
        reason = " ".join(str(error).split())[:400] or repr(error)
        if re.search(r"(Bad|Unknown) split", reason):
            raise UserError(f"{name}: {reason}; name one by --split") from error
        if "Config name is missing" in reason:
            raise UserError(f"{name}: {reason}; name one as --source={name}:CONFIG") from error
        file, place = "FILE.json", "its file"
        if name == OPENHERMES:
            file = OPENHERMES_FILE
            place = f"{HUB}/datasets/{name}/resolve/{revision or OPENHERMES_REVISION}/{file}"
        raise UserError(
            f"cannot get {name} from the hub: {reason}\n  Without a network: bring {place} here "
            f"by other means, and run: python prepare.py --source={file} --data_dir=data/NAME"
        ) from error
