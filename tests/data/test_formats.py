import bz2
import datetime
import gzip
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nanosynth import UserError
from nanosynth.data import conversations, formats, sources
from nanosynth.data.formats import Reading
from tiny import chat_row, write_jsonl

ROWS = [chat_row(f"Question {number}?", "Ünïcode ✓") for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def rows_of(path: Path, **reading: str) -> list:
    return list(sources.open_sources([str(path)], reading=Reading(**reading)).rows())


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


WRAPPED = {"version": "1", "data": ROWS, "names": ["a"]}
PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps(WRAPPED),
        "\ufeff" + json.dumps(WRAPPED, indent=1) + "\n",
        json.dumps({"rows": ROWS}),
        json.dumps({"features": [{"name": "conversations"}], "rows": ROWS}),
        json.dumps({"conversations": ROWS}),  # which are no turns
        json.dumps({"data": {"n": 5, "rows": ROWS}}),
        json.dumps({number: row for number, row in enumerate(ROWS)}),
        PRETTY,
        "\n" + PRETTY.replace("\n", "\r\n"),
        gzip.compress(LINES),
        bz2.compress(json.dumps(WRAPPED).encode()),
        pyarrow.compress(LINES, "zstd", asbytes=True),
    ],
    ids=range(15),
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.JSON", "rows.json.gz"])
def test_json_is_known_by_its_bytes(tmp_path, name, content):
    assert rows_of(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize(
    "row",
    [
        ROWS[0],
        {"conversation": [{"input": "Hi", "output": "Yo"}]},
        {"scores": [{"by": "me"}], "prompt": "Hi", "response": "Yo"},
        {"meta": {"prompt": "x"}, "text": "Hi"},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_row_alone_is_a_row(tmp_path, row, indent):
    assert rows_of(write(tmp_path / "a.jsonl", json.dumps(row, indent=indent))) == [row]


def test_an_object_of_several_lists_is_refused_until_one_is_named(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    with pytest.raises(UserError, match=r"several lists of rows \(train, test\); .* --split"):
        rows_of(path)
    assert rows_of(path, split="test") == ROWS[:1]
    for nested, names in (
        ({"rows": ROWS}, "train.rows, test.rows"),
        ({"1": ROWS[0]}, "train, test"),
    ):
        path = write(tmp_path / "nested.json", json.dumps({"train": nested, "test": nested}))
        with pytest.raises(UserError, match=rf"several lists of rows \({names}\)"):
            rows_of(path)
        assert rows_of(path, split=names.split(", ")[1]) in (ROWS, ROWS[:1])


def test_a_first_line_that_is_broken_costs_no_other(tmp_path):
    for broken in (LINES[:40], LINES[:-30], b"{", b"[1]", b'{"a": '):
        found = rows_of(write(tmp_path / "rows.jsonl", broken + b"\n" + LINES))
        assert found[-4:] == ROWS[1:]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LINES.decode().encode("utf-16"), "is UTF-16, not UTF-8; turn it by: iconv -f UTF-16 "),
        (LINES.decode().encode("utf-32"), "is UTF-32, not UTF-8"),
        (LINES.decode().encode("utf-16-le"), "is UTF-16LE, not UTF-8"),
        (LINES.decode().encode("utf-16-be"), "is UTF-16BE, not UTF-8"),
        (LINES.decode().encode("utf-32-le"), "is UTF-32LE, not UTF-8"),
        ("Привет, мир. Как дела?\n".encode("utf-16-le"), "is UTF-16LE, not UTF-8"),
        ("一开始，一个人。\n最后一天？\n".encode("utf-16-le"), "is UTF-16LE, not UTF-8"),
        ("一开始，一个人。\n最后一天？\n".encode("utf-16-be"), "is UTF-16BE, not UTF-8"),
        (b"SQLite format 3\0" + bytes(100), "is no text: it has bytes of zero"),
        (b"PK\x03\x04...", "is a zip archive"),
        (b"<!doctype html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (PRETTY[:-5], "broken JSON after 4 rows, near byte"),
    ],
)
def test_another_encoding_or_kind_is_named(tmp_path, content, said):
    with pytest.raises(UserError, match=f"rows.jsonl.*{said}"):
        rows_of(write(tmp_path / "rows.jsonl", content))


def test_single_bytes_of_cp1252_are_named(tmp_path):
    row = json.dumps(chat_row("Café?"), ensure_ascii=False)
    [found] = rows_of(write(tmp_path / "rows.jsonl", row.encode("cp1252")))
    with pytest.raises(conversations.Reject, match="text is not UTF-8: cp1252"):
        conversations.conversation(found)


END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("content", "separator", "texts"),
    [
        ("One.\nStill one.\n", END, ["One.\nStill one.\n"]),
        (f"One.\n{END}\nTwo,\nstill.\n{END}\n", END, ["One.", "Two,\nstill."]),
        (f"{END}\n\nOne.\n\n {END} \r\n{END}\r\nTwo.", END, ["\nOne.\n", "Two."]),
        (f"One {END} still one.\n", END, [f"One {END} still one.\n"]),
        (f"One.\n{END}", END, ["One."]),
        ("One.\n\nTwo.\r\n\r\nThree.\n", "\\n\\n", ["One.", "Two.", "Three.\n"]),
        ("One.\nTwo.\n", "\\n", ["One.", "Two."]),
        ("One---\n---\nTwo\n", "---", ["One---", "Two\n"]),
        ("\ufeffOne.", END, ["One."]),
        (" \n", END, []),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_texts_are_parted_by_separators(tmp_path, monkeypatch, content, separator, texts, block):
    monkeypatch.setattr(formats, "HEAD_BYTES", max(block, 64))
    path = write(tmp_path / "book.txt", content)
    with open(path, "rb", buffering=64) as raw:
        monkeypatch.setattr(formats, "HEAD_BYTES", block)
        [part] = sources.open_sources([str(path)], reading=Reading(separator=separator)).parts
        found = list(formats.rows(raw, part))
    assert found == texts
    assert all(conversations.conversation(text) == [("text", text)] for text in found)


def test_a_document_past_all_bounds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 100)
    with pytest.raises(UserError, match="part them by --document_separator"):
        rows_of(write(tmp_path / "book.txt", "word " * 30))


def test_parquet_columns_that_are_not_used_are_not_read(tmp_path):
    days = pyarrow.array([10**17] * 5, pyarrow.timestamp("us"))  # in the year 5138
    columns = {"conversations": [row["conversations"] for row in ROWS], "when": days}
    columns |= {"url": ["u", None, "u", "u", "u"], "tags": [["a"]] * 5, "views": [1] * 5}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    source = sources.open_sources([str(tmp_path / "rows.parquet")])
    assert list(source.rows()) == ROWS
    assert source.unread == {"url": 4, "tags": 5}


def test_parquet_of_no_known_column_has_rows_all_the_same(tmp_path):
    words = pyarrow.array(["x", "y"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"word": words}), tmp_path / "rows.parquet")
    source = sources.open_sources([str(tmp_path / "rows.parquet")])
    assert list(source.rows()) == [{}, {}] and source.unread == {"word": 2}


def test_a_parquet_value_that_python_cannot_hold_is_a_reject(tmp_path):
    days = [datetime.datetime(2020, 1, 1), None, None]
    texts = pyarrow.array(days, pyarrow.timestamp("us")).fill_null(
        pyarrow.scalar(2**60, pyarrow.timestamp("us"))
    )
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = rows_of(tmp_path / "rows.parquet")
    assert [isinstance(row, conversations.Reject) for row in found] == [False, True, True]
    assert "row cannot be read: " in str(found[1])
    twice = pyarrow.struct([("from", pyarrow.string())] * 2)
    turns = pyarrow.StructArray.from_arrays([pyarrow.array(["a"])] * 2, fields=list(twice))
    table = pyarrow.table({"conversations": pyarrow.ListArray.from_arrays([0, 1], turns)})
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    [found] = rows_of(tmp_path / "twice.parquet")
    assert "row cannot be read: conversations: " in str(found)
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text"] * 2)
    pyarrow.parquet.write_table(table, tmp_path / "columns.parquet")
    [found] = rows_of(tmp_path / "columns.parquet")
    assert str(found) == "row cannot be read: two columns text"


def test_arrow_files_and_what_datasets_saves(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list([{**row, "url": "u"} for row in ROWS])
    saved.save_to_disk(str(tmp_path / "one"))
    source = sources.open_sources([str(tmp_path / "one")])
    assert list(source.rows()) == ROWS and source.unread == {"url": 5}
    write_jsonl(tmp_path / "one" / "more.jsonl", ROWS[:1])  # the user's, beside the data set
    assert rows_of(tmp_path / "one") == [*ROWS, ROWS[0]]
    shutil.copy(next(tmp_path.glob("one/data*.arrow")), tmp_path / "one" / "cache-1f0c.arrow")
    assert rows_of(tmp_path / "one") == [*ROWS, ROWS[0]]  # what `map` left there is no second copy
    several = datasets.DatasetDict({"train": saved, "test": saved.select([1])})
    several.save_to_disk(str(tmp_path / "two"))
    assert rows_of(tmp_path / "two") == ROWS
    assert rows_of(tmp_path / "two", split="test") == ROWS[1:2]
    with pytest.raises(UserError, match="has the splits train, test; name one by --split"):
        rows_of(tmp_path / "two", split="val")
    [stream] = (tmp_path / "one").glob("data*.arrow")
    assert rows_of(stream.rename(tmp_path / "stream.jsonl")) == ROWS
    for broken in ("{}", "", '{"splits": [1]}'):
        write(tmp_path / "two" / "dataset_dict.json", broken)
        with pytest.raises(UserError, match="dataset_dict.json does not name the splits"):
            rows_of(tmp_path / "two")
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert rows_of(tmp_path / "rows.arrow") == ROWS
    with pytest.raises(UserError, match="not a readable Arrow file"):
        rows_of(write(tmp_path / "broken.arrow", b"nonsense"))


def test_ten_kinds_in_one_folder(tmp_path):
    folder = tmp_path / "mixed"
    (folder / "inner").mkdir(parents=True)
    write_jsonl(folder / "a.JSONL", ROWS)
    write(folder / "b.json", json.dumps(WRAPPED))
    write(folder / "inner" / "c.txt", f"One.\n{END}\nTwo.\n")
    for name in ("notes.md", ".hidden.json", "table.csv"):
        (folder / name).write_text("x")
    (folder / "bins").mkdir()
    for name in ("meta.json", "train.bin", "val_sources.bin"):
        (folder / "bins" / name).write_text("{}")
    write_jsonl(folder / "bins" / "rows.jsonl", ROWS[:2])  # what they were made of
    (folder / "run").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (folder / "run" / name).write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_jsonl(elsewhere / "d.jsonl", ROWS[:1])
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a loop
    source = sources.open_sources([str(folder)])
    assert [part.name for part in source.parts] == [
        "a.JSONL",
        "b.json",
        "bins/rows.jsonl",
        "inner/c.txt",
        "linked/d.jsonl",
    ]
    assert list(source.rows()) == [*ROWS, *ROWS, *ROWS[:2], "One.", "Two.\n", ROWS[0]]
    assert source.left_out == {
        **{".md": 1, "hidden": 1, ".csv": 1},
        f"{folder / 'bins'} (bins)": 1,
        f"{folder / 'run'} (a run)": 1,
    }


def test_a_whole_machine_and_our_own_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="--source=/ is the whole machine"):
        sources.open_sources(["/"])
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "train.bin").write_text("")
    with pytest.raises(UserError, match=r"nothing to read in .* \(.* \(bins\): 1\)"):
        sources.open_sources([str(tmp_path)])


class Table(list):
    """As datasets' streams: rows, and what is known of them."""

    class info:
        splits = None


@pytest.fixture
def hub(monkeypatch):
    """A hub of one answer; what it was asked for."""
    import datasets
    import huggingface_hub

    asked = []

    class Api:
        def dataset_info(self, name: str, revision: str | None) -> object:
            return type("Info", (), {"sha": "c0ffee"})

    def load(name: str, config: str | None, **how: object) -> Table:
        asked.append((name, config, how["split"], how["revision"]))
        if how["split"] == "none":
            raise ValueError("Bad split: none. Available splits: ['train_sft']")
        lines = ["", " = One = \n", "", " = = Part = = \n", "a\n", " = B = \n", "b\n"]
        return Table({"text": line} for line in lines)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_hub_sets_have_a_config_and_a_split(hub):
    source = sources.open_sources(["a/b:small"], reading=Reading(split="train_sft"))
    assert len(list(source.rows())) == 7 and hub == [("a/b", "small", "train_sft", "c0ffee")]
    named = {"source": "a/b", "revision": "c0ffee", "config": "small", "split": "train_sft"}
    assert source.identity["sources"] == [named]
    with pytest.raises(UserError, match="a/b: Bad split.*'train_sft'.*; name one by --split"):
        sources.open_sources(["a/b"], reading=Reading(split="none"))


def test_wikitext_comes_as_articles_and_fineweb_as_its_sample(hub):
    found = list(sources.open_sources(["Salesforce/wikitext"]).rows())
    assert found == [" = One = \n = = Part = = \na\n", " = B = \nb\n"]
    sources.open_sources(["HuggingFaceFW/fineweb"])
    configs = [config for _, config, _, _ in hub]
    assert configs == ["wikitext-103-raw-v1", "sample-10BT"]
