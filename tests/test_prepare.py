import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from tiny import chat_row, write_jsonl

import prepare
from nanosynth import UserError, chat, dataset, leaks, stats

QUESTIONS = [chat_row(f"Question number {number}?", f"Answer {number}.") for number in range(100)]


def run(tmp_path: Path, rows: list, name: str = "data", **changes) -> dict:
    """Prepare these rows; the folder's meta.json."""
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"val_fraction": 0.2, "num_threads": 1, "picture": False} | changes
    config = prepare.PrepareConfig(source=str(source), data_dir=str(tmp_path / name), **settings)
    prepare.main(config, {})
    return dataset.read_meta(str(tmp_path / name))


def texts(data_dir: Path, split: str) -> list[str]:
    return [chat.decode(ids) for ids, _ in dataset.Split(str(data_dir), split).documents()]


def numbers(documents: Iterable[str]) -> list[int]:
    return [int(re.search(r"number (\d+)", text)[1]) for text in documents]


def bins(data_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(data_dir.glob("*.bin"))}


def test_every_conversation_comes_through(tmp_path):
    run(tmp_path, QUESTIONS)
    found = texts(tmp_path / "data", "train") + texts(tmp_path / "data", "val")
    assert sorted(found) == sorted(
        f"<|im_start|>user\nQuestion number {number}?<|im_end|>\n"
        f"<|im_start|>assistant\nAnswer {number}.<|im_end|>\n<|endoftext|>"
        for number in range(100)
    )


def test_counts_add_up(tmp_path, capsys):
    rows = [*QUESTIONS, QUESTIONS[3], QUESTIONS[3], {"text": "x"}, chat_row("", "y"), [1]]
    meta = run(tmp_path, rows)
    assert meta["rows_read"] == 105 and meta["rows_kept"] == 100
    assert meta["rows_dropped"] == {
        "exact duplicate": 2,
        "no conversations, messages or instruction": 1,
        "empty turn": 1,
        "row is not an object": 1,
    }
    assert meta["rows_read"] == meta["rows_kept"] + sum(meta["rows_dropped"].values())
    splits = meta["splits"]
    assert sum(counts["documents"] for counts in splits.values()) == 100
    for split, counts in splits.items():
        found = dataset.Split(str(tmp_path / "data"), split)
        ids, mask = found.ids(0, found.n_tokens), found.mask(0, found.n_tokens)
        assert counts["tokens"] == len(ids) == len(mask)
        assert counts["assistant_tokens"] == mask.sum() > 0
        assert counts["documents"] == (ids == chat.END_OF_TEXT).sum()
        template = sum(len(b"user\n\nassistant\n\n") for _ in range(counts["documents"]))
        assert counts["text_bytes"] == chat.token_bytes()[ids].sum() - template
    said = capsys.readouterr().out
    assert "dropped: exact duplicate" in said and re.search(r"^rows read +105$", said, re.MULTILINE)


def test_meta_vouches_for_the_files(tmp_path):
    meta = run(tmp_path, QUESTIONS)
    source = (tmp_path / "rows.jsonl").read_bytes()
    assert meta["sha256"] == hashlib.sha256(source).hexdigest()
    assert set(meta["files"]) == {"train.bin", "train_mask.bin", "val.bin", "val_mask.bin"}
    for name, content in bins(tmp_path / "data").items():
        wanted = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert meta["files"][name] == wanted
    assert meta["special_ids"] == {
        "<|endoftext|>": 50256,
        "<|im_start|>": 50257,
        "<|im_end|>": 50258,
    }
    assert (meta["seed"], meta["template"], meta["vocab_size"]) == (42, "chatml", 50_304)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(
        [*meta["files"], "meta.json"]
    )


def test_the_same_rows_give_identical_bins(tmp_path):
    run(tmp_path, QUESTIONS, "first")
    run(tmp_path, QUESTIONS, "second", num_threads=2)
    run(tmp_path, QUESTIONS, "third", seed=43)
    assert bins(tmp_path / "first") == bins(tmp_path / "second") != bins(tmp_path / "third")
    run(tmp_path, QUESTIONS, "third")  # over what was there
    assert bins(tmp_path / "first") == bins(tmp_path / "third")


def test_documents_are_shuffled(tmp_path):
    run(tmp_path, QUESTIONS)
    found = texts(tmp_path / "data", "train")
    assert len(found) > 50 and numbers(found) != sorted(numbers(found))


def test_variants_of_a_first_user_turn_stay_on_one_side():
    sides = []
    for number in range(300):
        text = f"What is {number} plus café?"
        variants = [
            text,
            text.upper(),
            f"  {text.replace(' ', '   ')}\n",
            text.replace("é", "e\u0301"),
        ]
        found = {leaks.split_of(variant, 0.3, 42) for variant in variants}
        assert len(found) == 1
        sides += found
    assert 60 < sides.count("val") < 120  # 90 in the mean
    other = [leaks.split_of(f"What is {number} plus café?", 0.3, 43) for number in range(300)]
    assert other != sides


def test_no_first_user_turn_is_on_both_sides(tmp_path):
    rows = [chat_row(f"Q {n % 30}" + " " * (n % 3), f"A {n}") for n in range(90)]
    run(tmp_path, rows, val_fraction=0.4)
    first = {
        split: {text.split("<|im_end|>")[0].strip() for text in texts(tmp_path / "data", split)}
        for split in dataset.SPLITS
    }
    assert first["train"] and first["val"] and not first["train"] & first["val"]


def test_split_does_not_depend_on_other_rows(tmp_path):
    run(tmp_path, QUESTIONS, "whole")
    run(tmp_path, QUESTIONS[::-2], "half")
    for split in dataset.SPLITS:
        assert set(texts(tmp_path / "half", split)) < set(texts(tmp_path / "whole", split))


def test_max_rows_is_a_seeded_sample_of_the_whole(tmp_path):
    meta = run(tmp_path, QUESTIONS, "first", max_rows=30)
    assert meta["rows_read"] == meta["rows_kept"] == 30 and meta["max_rows"] == 30
    run(tmp_path, QUESTIONS, "again", max_rows=30)
    run(tmp_path, QUESTIONS, "other", max_rows=30, seed=1)
    sets = [
        {text for split in dataset.SPLITS for text in texts(tmp_path / name, split)}
        for name in ("first", "again", "other")
    ]
    assert sets[0] == sets[1] != sets[2]
    assert min(numbers(sets[0])) < 20 and max(numbers(sets[0])) > 80


def test_max_rows_of_more_than_there_are_takes_all(tmp_path):
    assert run(tmp_path, QUESTIONS, max_rows=1000)["rows_read"] == 100


def test_no_usable_row_shows_the_columns(tmp_path):
    rows = [{"text": "x", "title": "y", "nothing": None}, {"text": "z"}]
    with pytest.raises(UserError) as error:
        run(tmp_path, rows)
    said = str(error.value)
    assert said.startswith("no usable row in ")
    assert "rows.jsonl (2 read; no conversations, messages or instruction: 2)" in said
    assert "Columns found: text, title\n" in said and "Wanted: conversations (from/value)" in said


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="no document fell to val .*--val_fraction or --seed"):
        run(tmp_path, QUESTIONS[:2], val_fraction=1e-9)


def test_a_failure_leaves_the_old_bins(tmp_path):
    run(tmp_path, QUESTIONS)
    before = bins(tmp_path / "data")
    with pytest.raises(UserError):
        run(tmp_path, [{"text": "x"}])
    assert bins(tmp_path / "data") == before
    assert dataset.Split(str(tmp_path / "data"), "train").n_tokens > 0
    assert not (tmp_path / "data" / ".partial").exists()


def test_special_looking_text_stays_text(tmp_path):
    rows = [chat_row(f"{n} <|im_end|><|endoftext|>", "<|im_start|>assistant") for n in range(50)]
    meta = run(tmp_path, rows)
    for split, counts in meta["splits"].items():
        found = dataset.Split(str(tmp_path / "data"), split)
        ids = found.ids(0, found.n_tokens)
        assert [np.count_nonzero(ids == id) for id in (50256, 50257, 50258)] == [
            counts["documents"] * times for times in (1, 2, 2)
        ]


@pytest.mark.parametrize(
    "changes",
    [
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"max_rows": -1},
        {"num_threads": 0},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_senseless_setting_is_refused_by_its_flag(changes):
    with pytest.raises(UserError, match="--"):
        prepare.PrepareConfig(**changes)


def test_table_reads_meta(tmp_path):
    meta = json.loads(json.dumps(run(tmp_path, QUESTIONS)))
    assert re.search(r"^rows kept +100$", stats.table(meta), re.MULTILINE)
