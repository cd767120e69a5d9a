import gzip
import io
import json
from pathlib import Path

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from nanosynth import UserError
from nanosynth.data import conversations, sources
from tiny import chat_row, write_jsonl


def rows_of(*paths: object) -> list:
    return list(sources.open_sources([str(path) for path in paths]).rows())


ROWS = [chat_row(f"Question {number}?", "Ünïcode ✓") for number in range(5)]


def check_rows(source: sources.Source) -> None:
    """All rows, twice, with the position at the end."""
    for _ in range(2):
        assert [conversations.conversation(found) for found in source.rows()] == [
            conversations.conversation(wanted) for wanted in ROWS
        ]
        assert source.position == source.size


def test_jsonl_with_malformed_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0])
    path.write_bytes(
        b"\xef\xbb\xbf" + f"{good}\n\n  \n{good[:-3]}\nnot json\n{'[' * 100_000}\n".encode()
        + b"\xff\xfe\n" + good.encode()
    )  # fmt: skip
    found = rows_of(path)
    assert [isinstance(item, conversations.Reject) for item in found] == [False, *[True] * 4, False]
    assert {str(item) for item in found[1:5]} == {"line is not JSON"}


def test_broken_json_array_says_where(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS)[:-20])
    with pytest.raises(UserError, match=r"rows.json: broken JSON after 4 rows, near byte \d+ of"):
        rows_of(path)


@pytest.mark.parametrize("content", ["", "5", '"text"'])
def test_json_that_is_no_array_is_refused(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError, match="wanted an array of rows"):
        rows_of(path)


def test_broken_parquet_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a readable parquet file"):
        rows_of(path)


@pytest.mark.parametrize(
    "name", ["sampel", "missing.jsonl", "data/missing.json", "a/b/c", "data/foo.jsnl"]
)
def test_a_source_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match="no source .*; wanted a .json, .jsonl"):
        sources.open_sources([name])


@pytest.mark.parametrize("name", ["sample", "data/sample.jsonl"])
def test_the_demos_file_that_is_not_there_is_made_by_two_commands(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        sources.open_sources([name])
    commands = str(error.value).split("made first: ")[1].split(" && ")
    assert commands == [
        "python data/make_sample.py --to=data/sample.jsonl",
        "python prepare.py --source=data/sample.jsonl --data_dir=data/demo",
    ]


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n")
    with pytest.raises(UserError, match="cannot read .*rows.csv; wanted a .json, .jsonl"):
        sources.open_sources([str(path)])


def write_rows(path: Path, found: list) -> Path:
    """`found` as the file's name tells."""
    kind, compression = (*path.suffixes, "")[:2]
    if kind == ".parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), buffer)
        content = buffer.getvalue()
    elif kind == ".json":
        content = json.dumps(found, indent=2).encode()
    else:
        content = "".join(json.dumps(row) + "\n" for row in found).encode()
    if compression == ".gz":
        content = gzip.compress(content)
    elif compression == ".zst":
        content = pyarrow.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


COMPRESSED = [
    kind + compression
    for kind in (".json", ".jsonl", ".parquet")
    for compression in (".gz", ".zst")
]


@pytest.mark.parametrize("suffixes", [".json", ".jsonl", ".parquet", *COMPRESSED])
def test_each_kind_of_file(tmp_path, suffixes):
    source = sources.open_sources([str(write_rows(tmp_path / f"rows{suffixes}", ROWS))])
    check_rows(source)
    assert source.identity["source"] == f"rows{suffixes}" and len(source.identity["sha256"]) == 64


@pytest.mark.parametrize("suffixes", COMPRESSED)
def test_a_compressed_file_that_ends_too_early_is_refused(tmp_path, suffixes):
    path = write_rows(tmp_path / f"rows{suffixes}", ROWS * 50)
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(UserError, match=rf"rows{suffixes}: cannot be read near byte \d+ of"):
        rows_of(path)


def test_zstd_and_gzip_files_of_several_frames(tmp_path):
    for suffixes in (".jsonl.gz", ".jsonl.zst"):
        path = write_rows(tmp_path / f"rows{suffixes}", ROWS)
        path.write_bytes(path.read_bytes() * 2)
        assert rows_of(path) == ROWS * 2


def test_several_files_and_a_folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write_rows(folder / "b" / "second.parquet", ROWS[1:2])
    write_rows(folder / "a.json.gz", ROWS[:1])
    write_rows(folder / ".hidden" / "no.json", ROWS)
    (folder / "README.md").write_text("no rows")
    third = write_rows(tmp_path / "third.jsonl", ROWS[2:])
    source = sources.open_sources([str(folder), str(third)])
    places = []
    for found, wanted in zip(source.rows(), ROWS, strict=True):
        assert conversations.conversation(found) == conversations.conversation(wanted)
        places.append((source.part.name, source.row))
    assert places == [("a.json.gz", 1), ("b/second.parquet", 1)] + [
        ("third.jsonl", number) for number in (1, 2, 3)
    ]
    assert source.position == source.size == sum(part.size for part in source.parts)
    assert source.identity["source"] == "a.json.gz, b/second.parquet, third.jsonl"
    assert [len(identity["sha256"]) for identity in source.identity["sources"]] == [64] * 3


def test_parts_of_unlike_units_are_counted_in_rows(tmp_path):
    """A file is measured in bytes, a data set of the hub in rows: they have no sum."""

    reading = sources.Reading()
    in_rows = sources.Part("hub", {"source": "hub"}, len(ROWS), lambda part: iter(ROWS), reading)
    in_bytes = sources.open_sources([str(write_jsonl(tmp_path / "rows.jsonl", ROWS))]).parts
    mixed = sources.Source([*in_bytes, in_rows], reading)
    assert (mixed.size, mixed.unit) == (None, "rows")
    assert [mixed.position for _ in mixed.rows()] == list(range(1, 11))
    alone = sources.Source([in_rows], reading)
    assert (alone.size, alone.unit) == (len(ROWS), "rows")
    assert [alone.position for _ in alone.rows()] == [1, 2, 3, 4, 5]


def test_a_folder_of_nothing_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("no rows")
    with pytest.raises(UserError, match="nothing to read in .* \\(.md: 1\\); wanted a .json"):
        sources.open_sources([str(tmp_path)])


@pytest.mark.parametrize("change", ["shortened", "longer"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS * 2_000)
    size = path.stat().st_size
    found = sources.open_sources([str(path)]).rows()
    next(found)
    with open(path, "r+b") as file:
        file.truncate(len(json.dumps(ROWS[0]) + "\n") * 5_000 if change == "shortened" else size)
        file.seek(0, 2)
        file.write(b"\n" if change == "longer" else b"")
    with pytest.raises(UserError, match=rf"changed while it was read \(.*, {size} at first\)"):
        list(found)


def test_odd_but_valid_json_costs_no_other_row(tmp_path):
    odd = [
        b'{"conversations": "\xff\xfe"}',
        b'"\\ud800"',
        b'"\\ude00\\ud83d"',
        b"[" * 100 + b"]" * 100,
        b"9" * 6000,
        b"-1e999",
        b"NaN",
        b'{"a": 1, "a": 2}',
    ]
    good = json.dumps(ROWS[0]).encode()
    array, lines = tmp_path / "rows.json", tmp_path / "rows.jsonl"
    array.write_bytes(b"[" + b",\n".join([*odd, good]) + b"]")
    lines.write_bytes(b"\n".join([*odd, good]))
    for path in (array, lines):
        found = rows_of(path)
        assert len(found) == len(odd) + 1 and found[-1] == ROWS[0]
        for item in found[:-1]:
            with pytest.raises(conversations.Reject):
                conversations.conversation(item)


def test_parquet_text_that_is_not_utf8_is_a_reject(tmp_path):
    texts = pyarrow.array([b"Hi", b"\xff", b"Yo"], pyarrow.binary())
    table = pyarrow.table({"instruction": texts.view(pyarrow.utf8()), "output": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = rows_of(tmp_path / "rows.parquet")
    assert [isinstance(row, conversations.Reject) for row in found] == [False, True, False]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's client without a network, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "datasets--teknium--OpenHermes-2.5"


def test_openhermes_from_the_cache_of_the_hub_client(hub_cache):
    commit = "b82037" + "0" * 34
    snapshot = hub_cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (hub_cache / "refs").mkdir()
    (hub_cache / "refs" / sources.OPENHERMES_REVISION).write_text(commit)
    write_rows(snapshot / sources.OPENHERMES_FILE, ROWS)
    source = sources.open_sources([sources.OPENHERMES])
    check_rows(source)
    assert source.identity["source"] == sources.OPENHERMES and source.identity["commit"] == commit
    assert source.identity["revision"] == "b820378" and len(source.identity["sha256"]) == 64


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (sources.OPENHERMES, "resolve/b820378/openhermes2_5.json here .* --source=openhermes2_5"),
        ("owner/name", "bring its file here by other means, .* --source=FILE.json"),
    ],
)
def test_no_network_says_how_to_bring_the_file(hub_cache, name, place):
    with pytest.raises(UserError, match=f"(?s)cannot get {name} from the hub: .*{place}"):
        sources.open_sources([name])
