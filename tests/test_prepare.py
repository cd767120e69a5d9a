import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import prepare
from nanosynth import UserError, tokenizer
from nanosynth.data import bins, ngrams, sources, stats
from tiny import chat_row, command, write_jsonl

QUESTIONS = [chat_row(f"Question number {number}?", f"Answer {number}.") for number in range(100)]


def run(tmp_path: Path, rows: list, name: str = "data", **changes) -> dict:
    """Prepare these rows; the folder's meta.json."""
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"val_fraction": 0.2, "num_threads": 1, "picture": False} | changes
    config = prepare.PrepareConfig(source=(str(source),), data_dir=str(tmp_path / name), **settings)
    prepare.main(config)
    return bins.read_meta(str(tmp_path / name))


def texts(data_dir: Path, split: str) -> list[str]:
    return [tokenizer.decode(ids) for ids, _ in bins.Split(str(data_dir), split).documents()]


def numbers(documents: Iterable[str]) -> list[int]:
    return [int(re.search(r"number (\d+)", text)[1]) for text in documents]


def tiny_bins(data_dir: Path) -> dict[str, bytes]:
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
    rows = [*QUESTIONS, QUESTIONS[3], QUESTIONS[3], {"txt": "x"}, chat_row("", "y"), [1]]
    meta = run(tmp_path, rows)
    assert meta["rows_read"] == 105 and meta["rows_kept"] == 100
    assert meta["rows_dropped"] == {
        "exact duplicate": 2,
        "no known column": 1,
        "empty turn: user": 1,
        "row is not an object": 1,
    }
    assert meta["rows_read"] == meta["rows_kept"] + sum(meta["rows_dropped"].values())
    splits = meta["splits"]
    assert sum(counts["documents"] for counts in splits.values()) == 100
    for split, counts in splits.items():
        found = bins.Split(str(tmp_path / "data"), split)
        ids, mask = found.ids(0, found.n_tokens), found.mask(0, found.n_tokens)
        assert counts["tokens"] == len(ids) == len(mask)
        assert counts["assistant_tokens"] == mask.sum() > 0
        assert counts["documents"] == (ids == tokenizer.END_OF_TEXT).sum()
        template = sum(len(b"user\n\nassistant\n\n") for _ in range(counts["documents"]))
        assert counts["text_bytes"] == tokenizer.token_bytes()[ids].sum() - template
    said = capsys.readouterr().out
    assert "dropped: exact duplicate" in said and re.search(r"^rows read +105$", said, re.MULTILINE)


def test_meta_vouches_for_the_files(tmp_path):
    meta = run(tmp_path, QUESTIONS)
    source = (tmp_path / "rows.jsonl").read_bytes()
    assert meta["sha256"] == hashlib.sha256(source).hexdigest()
    assert set(meta["files"]) == {"train.bin", "train_mask.bin", "val.bin", "val_mask.bin"}
    assert set(meta["label_files"]) == {"train_sources.bin", "val_sources.bin"}
    files = meta["files"] | meta["label_files"]
    for name, content in tiny_bins(tmp_path / "data").items():
        wanted = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert files[name] == wanted
    assert meta["special_ids"] == {
        "<|endoftext|>": 50256,
        "<|im_start|>": 50257,
        "<|im_end|>": 50258,
    }
    assert (meta["seed"], meta["template"], meta["vocab_size"]) == (42, "chatml", 50_304)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(
        [*files, "meta.json"]
    )


def test_the_same_rows_give_identical_bins(tmp_path):
    run(tmp_path, QUESTIONS, "first")
    run(tmp_path, QUESTIONS, "second", num_threads=2)
    run(tmp_path, QUESTIONS, "third", seed=43)
    assert (
        tiny_bins(tmp_path / "first")
        == tiny_bins(tmp_path / "second")
        != tiny_bins(tmp_path / "third")
    )
    run(tmp_path, QUESTIONS, "third")  # over what was there
    assert tiny_bins(tmp_path / "first") == tiny_bins(tmp_path / "third")


def test_documents_are_shuffled(tmp_path):
    run(tmp_path, QUESTIONS)
    found = texts(tmp_path / "data", "train")
    assert len(found) > 50 and numbers(found) != sorted(numbers(found))


def test_no_first_user_turn_is_on_both_sides(tmp_path):
    rows = [chat_row(f"Q {n % 30}" + " " * (n % 3), f"A {n}") for n in range(90)]
    run(tmp_path, rows, val_fraction=0.4)
    first = {
        split: {text.split("<|im_end|>")[0].strip() for text in texts(tmp_path / "data", split)}
        for split in bins.SPLITS
    }
    assert first["train"] and first["val"] and not first["train"] & first["val"]


def test_split_does_not_depend_on_other_rows(tmp_path):
    run(tmp_path, QUESTIONS, "whole")
    run(tmp_path, QUESTIONS[::-2], "half")
    for split in bins.SPLITS:
        assert set(texts(tmp_path / "half", split)) < set(texts(tmp_path / "whole", split))


def test_max_rows_is_a_seeded_sample_of_the_whole(tmp_path):
    meta = run(tmp_path, QUESTIONS, "first", max_rows=30)
    assert meta["rows_read"] == meta["rows_kept"] == 30 and meta["max_rows"] == 30
    run(tmp_path, QUESTIONS, "again", max_rows=30)
    run(tmp_path, QUESTIONS, "other", max_rows=30, seed=1)
    sets = [
        {text for split in bins.SPLITS for text in texts(tmp_path / name, split)}
        for name in ("first", "again", "other")
    ]
    assert sets[0] == sets[1] != sets[2]
    assert min(numbers(sets[0])) < 20 and max(numbers(sets[0])) > 80
    assert run(tmp_path, QUESTIONS, max_rows=1000)["rows_read"] == 100


@pytest.mark.parametrize("num_threads", [1, 4])
def test_max_bytes_ends_the_reading(tmp_path, num_threads):
    """250 bytes are 25 texts of ten; one that comes again counts once."""
    rows = [{"text": f"number {n:03}"} for n in range(1, 100)]
    meta = run(tmp_path, rows[:1] + rows, max_bytes=250, num_threads=num_threads)
    assert (meta["rows_read"], meta["rows_kept"], meta["max_bytes"]) == (26, 25, 250)
    assert sum(split["text_bytes"] for split in meta["splits"].values()) == 250


def test_no_usable_row_shows_the_columns(tmp_path):
    rows = [{"txt": "x", "title": "y", "nothing": None}, {"txt": "z"}]
    with pytest.raises(UserError) as error:
        run(tmp_path, rows)
    said = str(error.value)
    assert said.startswith("no usable row in ")
    assert "rows.jsonl (2 read; no known column: 2; columns found: txt, title);" in said
    assert "--columns=user=QUESTION" in said
    assert len(said.splitlines()) == 1


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="no document of 2 fell to val; .*--val_fraction or --seed"):
        run(tmp_path, QUESTIONS[:2], val_fraction=1e-9)


def test_a_failure_leaves_the_old_bins(tmp_path):
    run(tmp_path, QUESTIONS)
    before = tiny_bins(tmp_path / "data")
    with pytest.raises(UserError):
        run(tmp_path, [{"txt": "x"}])
    assert tiny_bins(tmp_path / "data") == before
    assert bins.Split(str(tmp_path / "data"), "train").n_tokens > 0
    assert not (tmp_path / "data" / ".partial").exists()


def test_special_looking_text_stays_text(tmp_path):
    rows = [chat_row(f"{n} <|im_end|><|endoftext|>", "<|im_start|>assistant") for n in range(50)]
    meta = run(tmp_path, rows)
    for split, counts in meta["splits"].items():
        found = bins.Split(str(tmp_path / "data"), split)
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


def test_rejects_have_their_place_reason_and_first_words(tmp_path):
    rows = [*QUESTIONS, QUESTIONS[3], {"txt": "none here"}, chat_row("Q", " "), [1]]
    path = tmp_path / "rejects.jsonl"
    meta = run(tmp_path, rows, rejects=str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == meta["rows_dropped"]
    assert sorted((line["file"], line["row"], line["text"]) for line in lines) == [
        ("rows.jsonl", 101, "Question number 3?"),
        ("rows.jsonl", 102, "none here"),
        ("rows.jsonl", 103, "Q"),
        ("rows.jsonl", 104, ""),
    ]
    assert list(sources.open_sources([str(tmp_path)]).rows()) == rows  # nor is it a source
    assert not list(tmp_path.glob(".rejects-*"))
    with pytest.raises(UserError, match="no usable row"):
        run(tmp_path, [{"txt": "x"}], rejects=str(path))
    assert len(path.read_text().splitlines()) == 1  # it tells why


def test_troubles_are_counted_always_and_dropped_on_request(tmp_path):
    answers = ["As an AI language model, I do not know."] * 3
    answers += ["El sol es una estrella que está en el centro de la galaxia."] * 2
    answers += ["-" * 100]
    seen = {"refusal or AI boilerplate": 3, "not English": 2, "run of one character": 1}
    rows = [*QUESTIONS, *(chat_row(f"{n}?", answer) for n, answer in enumerate(answers))]
    meta = run(tmp_path, rows)
    assert meta["troubles"] == seen and meta["rows_dropped"] == {} and meta["rows_kept"] == 106
    for flag, reason in zip(("refusals", "non_english", "runs"), seen, strict=True):
        meta = run(tmp_path, rows, **{f"drop_{flag}": True})
        assert meta["troubles"] == seen and meta["rows_dropped"] == {reason: seen[reason]}
        assert meta[f"drop_{flag}"] is True


def grams_of(documents: Iterable[str]) -> list[list[tuple]]:
    """Of each document, the 13-grams of its user and assistant turns, said plainly."""
    found = []
    for text in documents:
        turns = re.findall(r"<\|im_start\|>(user|assistant)\n(.*?)<\|im_end\|>", text, re.DOTALL)
        encoded = [(role, tokenizer.encoding().encode_ordinary(text)) for role, text in turns]
        newline = [198]  # the last token of 'assistant\n' may begin a gram
        ids = [newline * (role == "assistant") + ids for role, ids in encoded]
        found.append([tuple(i[n : n + 13]) for i in ids for n in range(len(i) - 12)])
    return found


@pytest.mark.parametrize("chunk_tokens", [1 << 20, 100])
def test_leak_check_counts_shared_grams(tmp_path, capsys, monkeypatch, chunk_tokens):
    monkeypatch.setattr(ngrams, "CHUNK_TOKENS", chunk_tokens)
    monkeypatch.setattr(ngrams, "FILTER_BITS", 1)
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    chance = np.random.default_rng(0)
    rows = [
        chat_row(
            f"{n}: " + " ".join(chance.choice(words[:2], 14)), " ".join(chance.choice(words, 30))
        )
        for n in range(80)
    ]
    for row in rows[::2]:
        row["conversations"].insert(0, {"from": "system", "value": "Be good. " * 20})
    found = run(tmp_path, rows, leak_check=True)["leak_check"]
    train = {g for grams in grams_of(texts(tmp_path / "data", "train")) for g in grams}
    val = grams_of(texts(tmp_path / "data", "val"))
    shared = [[gram in train for gram in grams] for grams in val]
    assert found == {
        "tokens": 13,
        "one_in": 1,
        "val_grams": sum(map(len, val)),
        "val_grams_in_train": sum(map(sum, shared)),
        "val_documents": sum(map(bool, val)),
        "val_documents_with_any": sum(map(any, shared)),
        "val_documents_with_half": sum(any(s) and 2 * sum(s) >= len(s) for s in shared),
    }
    assert 0 < found["val_grams_in_train"] < found["val_grams"]
    assert f"{found['val_grams_in_train']:,} of {found['val_grams']:,} (" in capsys.readouterr().out


def test_sources_and_categories_are_counted(tmp_path, capsys):
    rows = [{**row, "source": "abc"[n % 3], "category": None} for n, row in enumerate(QUESTIONS)]
    rows[0]["source"] = 5
    meta = run(tmp_path, rows)
    assert {name: counts["documents"] for name, counts in meta["by_source"].items()} == {
        "a": 33,
        "b": 33,
        "c": 33,
        "rows.jsonl": 1,
    }
    n_tokens = sum(counts["tokens"] for counts in meta["splits"].values())
    assert meta["by_category"] == {"(not given)": {"documents": 100, "tokens": n_tokens}}
    assert sum(counts["tokens"] for counts in meta["by_source"].values()) == n_tokens
    assert meta["documents_by_turns"] == {"2": 100}
    assert "tokens by category: (not given) 100.0%" in capsys.readouterr().out


def test_names_without_end_are_told_apart_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "MOST_NAMES", 10)
    meta = run(tmp_path, [{**row, "source": f"s{n}"} for n, row in enumerate(QUESTIONS)])
    assert len(meta["by_source"]) == 11 and meta["by_source"]["(others)"]["documents"] == 90


def test_the_picture_comes_and_goes_with_the_bins(tmp_path):
    rows = [{**row, "source": "$a_1$ \\x 太阳"[: n % 12]} for n, row in enumerate(QUESTIONS)]
    run(tmp_path, rows, picture=True)
    assert (tmp_path / "data" / "stats.png").read_bytes().startswith(b"\x89PNG")
    run(tmp_path, rows)
    assert not (tmp_path / "data" / "stats.png").exists()


def test_several_sources_in_one(tmp_path):
    half = write_jsonl(tmp_path / "half.jsonl", QUESTIONS[::2])
    write_jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    both = (str(half), str(tmp_path / "rows.jsonl"))
    config = prepare.PrepareConfig(source=both, data_dir=str(tmp_path / "two"), picture=False)
    prepare.main(config)
    meta = bins.read_meta(str(tmp_path / "two"))
    assert meta["rows_read"] == 150 and meta["rows_dropped"] == {"exact duplicate": 50}
    assert meta["source"] == "half.jsonl, rows.jsonl" and "sha256" not in meta
    assert [identity["source"] for identity in meta["sources"]] == ["half.jsonl", "rows.jsonl"]


@pytest.mark.parametrize("num_threads", [2, 5])
def test_bins_do_not_depend_on_threads_or_batches(tmp_path, monkeypatch, num_threads):
    run(tmp_path, QUESTIONS * 2, "one")
    monkeypatch.setattr(prepare, "BATCH_ROWS", 3)
    run(tmp_path, QUESTIONS * 2, "other", num_threads=num_threads)
    assert tiny_bins(tmp_path / "one") == tiny_bins(tmp_path / "other")
    assert read(tmp_path / "one") == read(tmp_path / "other")


def read(data_dir: Path) -> str:
    return (data_dir / "meta.json").read_text()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """No file may grow past 100 kB, as on a disk without more room."""
    source = write_jsonl(
        tmp_path / "rows.jsonl", [chat_row(f"{n}", "word " * 99) for n in range(999)]
    )
    program = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.argv[0] = 'prepare.py'\n"
        "runpy.run_path('prepare.py', run_name='__main__')\n"
    )
    done = command("-c", program, f"--source={source}", f"--data_dir={tmp_path / 'data'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert re.match(r"prepare.py: error: stopped while preparing .*data: .*File too large", said)
    assert not (tmp_path / "data").exists()


def documents_of(data_dir: Path) -> list[str]:
    return sorted(text for split in bins.SPLITS for text in texts(data_dir, split))


def test_a_system_text_a_history_and_a_context_come_through(tmp_path):
    """All rows begin with one turn, which then cannot tell training from validation."""
    rows = [
        {
            **{"instruction": f"And times {n}?", "context": f"It is {n}.", "response": f"{7 * n}"},
            **{"system": "Be short.", "history": [["What is seven?", "A number."]]},
        }
        for n in range(20)
    ]
    meta = run(tmp_path, rows)
    assert documents_of(tmp_path / "data") == sorted(
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhat is seven?<|im_end|>\n"
        "<|im_start|>assistant\nA number.<|im_end|>\n"
        f"<|im_start|>user\nAnd times {n}?\n\nIt is {n}.<|im_end|>\n"
        f"<|im_start|>assistant\n{7 * n}<|im_end|>\n<|endoftext|>"
        for n in range(20)
    )
    assert meta["rows_kept"] == 20 and meta["split_by"] == "all user turns"
    assert run(tmp_path, QUESTIONS)["split_by"] == "first user turn"


def test_plain_texts_are_documents_without_marks(tmp_path):
    run(tmp_path, [{"text": f"Text number {n} <|im_end|>\n", "url": "u"} for n in range(50)])
    assert documents_of(tmp_path / "data") == sorted(
        f"Text number {n} <|im_end|>\n<|endoftext|>" for n in range(50)
    )
    split = bins.Split(str(tmp_path / "data"), "train")
    assert split.mask(0, split.n_tokens).all()
    assert split.meta["unused_columns"] == {"url": 50}


def test_columns_that_are_not_used_are_said(tmp_path, capsys):
    rows = [{**row, "title": "T", "views": 5, "notes": [" "]} for row in QUESTIONS]
    assert run(tmp_path, rows)["unused_columns"] == {"title": 100}
    said = " ".join(capsys.readouterr().out.split())
    assert "columns that held text and were not used, and their rows: title 100" in said


def test_columns_that_the_user_names(tmp_path):
    rows = [{"ask": f"Number {n}?", "say": f"{n}", "who": "Kay", "text": "x"} for n in range(50)]
    meta = run(tmp_path, rows, columns="user=ask,assistant=say,system=who")
    assert meta["rows_kept"] == 50 and meta["columns"] == "user=ask,assistant=say,system=who"
    assert meta["unused_columns"] == {"text": 50}
    assert "<|im_start|>system\nKay<|im_end|>\n" in documents_of(tmp_path / "data")[0]
    for row in rows:
        row["who"] = None  # that it has the column is enough
    assert run(tmp_path, rows, columns="user=ask,assistant=say,system=who")["rows_kept"] == 50
    with pytest.raises(UserError, match="no row has sayings; columns found: ask, say, text"):
        run(tmp_path, rows, columns="user=ask,assistant=sayings")


def test_weights_sample_each_source_to_its_share_of_training_tokens(tmp_path, capsys):
    paths = []
    for name, n_words in (("short", 2), ("long", 9)):
        rows = [{"text": f"{name} number {n} " + "word " * n_words} for n in range(400)]
        paths.append(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)))
    settings = {"source": tuple(paths), "val_fraction": 0.2, "num_threads": 1, "picture": False}
    rejects = tmp_path / "rejects.jsonl"

    def prepared(name: str, **changes) -> dict:
        data_dir = str(tmp_path / name)
        prepare.main(prepare.PrepareConfig(**(settings | {"data_dir": data_dir} | changes)))
        return bins.read_meta(data_dir)

    whole = set(documents_of_run(prepared("whole"), tmp_path / "whole"))
    meta = prepared("part", weights="3,1", rejects=str(rejects))
    found = documents_of_run(meta, tmp_path / "part")
    assert len(set(found)) == len(found) == meta["rows_kept"] and set(found) < whole
    left_out = meta["rows_dropped"]["left out by --weights"]
    assert meta["rows_kept"] + left_out == meta["rows_read"] == 800
    assert len(rejects.read_text().splitlines()) == left_out
    shares = {w["source"]: w["share"] for w in meta["weighted"]}
    assert shares[paths[0]] == pytest.approx(0.75, abs=0.01)
    n_tokens = Counter()
    for ids, _ in bins.Split(str(tmp_path / "part"), "train").documents():
        n_tokens[tokenizer.decode(ids).split()[0]] += len(ids)
    assert n_tokens["short"] / n_tokens.total() == pytest.approx(shares[paths[0]])
    assert n_tokens.total() == meta["splits"]["train"]["tokens"]
    assert "75.0% wanted" in " ".join(capsys.readouterr().out.split())
    prepared("again", weights="0.75,0.25")
    assert tiny_bins(tmp_path / "again") == tiny_bins(tmp_path / "part")
    for rows in ([], [[1]], [{"text": "short number 5 word word "}]):  # the last: a duplicate
        write_jsonl(Path(paths[1]), rows)
        with pytest.raises(UserError, match="--weights=3,1; no document of .*long.jsonl is in"):
            prepared("lacking", weights="3,1")


def documents_of_run(meta: dict, data_dir: Path) -> list[str]:
    """The documents, after checking that each one's label is its file."""
    found = []
    for split in bins.SPLITS:
        opened = bins.Split(str(data_dir), split)
        names, numbers = opened.labels()["source"]
        documents = [tokenizer.decode(ids) for ids, _ in opened.documents()]
        assert [names[n] for n in numbers] == [f"{text.split()[0]}.jsonl" for text in documents]
        assert len(documents) == meta["splits"][split]["documents"]
        found += documents
    return found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": "0.5"}, "--weights=0.5; wanted one for each --source: 2"),
        ({"weights": "0.5,0"}, "--weights=0.5,0; wanted numbers above 0"),
        ({"weights": "1e308,1e308"}, "--weights=1e308,1e308; wanted numbers above 0"),
        ({"weights": "a,b"}, "--weights=a,b; wanted numbers above 0"),
        ({"document_separator": " "}, "--document_separator= ; wanted some text"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, said):
    with pytest.raises(UserError, match=re.escape(said)):
        prepare.PrepareConfig(source=("a", "b"), **changes)


def test_rejects_replace_nothing_but_rejects(tmp_path):
    source = tmp_path / "rows.jsonl"
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"file": "x"}\n')
    (tmp_path / "link").symlink_to(mine)
    for path in (source, mine, tmp_path / "link", tmp_path, Path("/dev/null")):
        with pytest.raises(
            UserError, match=f"--rejects={path} is there, and is no file of rejects"
        ):
            run(tmp_path, QUESTIONS, rejects=str(path))
    assert len(source.read_text().splitlines()) == 100 and mine.read_text() == '{"file": "x"}\n'
    assert Path("/dev/null").is_char_device() and (tmp_path / "link").is_symlink()
    old = tmp_path / "rejects.jsonl"
    run(tmp_path, [*QUESTIONS, [1]], rejects=str(old))
    run(tmp_path, [*QUESTIONS, [1], [2]], rejects=str(old))
    assert len(old.read_text().splitlines()) == 2


def test_rejects_hold_names_that_are_not_unicode(tmp_path):
    row = b'{"messages": [{"role": "syst\xe8me", "content": "x"}]}\n'
    write_jsonl(tmp_path / "a.jsonl", QUESTIONS)
    (tmp_path / "caf\udce9.jsonl").write_bytes(row)
    rejects = tmp_path / "rejects.jsonl"
    config = {"source": (str(tmp_path),), "data_dir": str(tmp_path / "data"), "picture": False}
    prepare.main(prepare.PrepareConfig(**config, rejects=str(rejects)))
    found = json.loads(rejects.read_text(encoding="utf-8"))
    assert found["file"] == "caf\udce9.jsonl" and found["reason"] == "unknown role: syst\udce8me"


def test_rejects_that_cannot_be_written_are_one_line(tmp_path):
    path = tmp_path / "nowhere" / "rejects.jsonl"
    with pytest.raises(UserError, match=f"--rejects={path} cannot be written: No such file"):
        run(tmp_path, QUESTIONS, rejects=str(path))


def test_a_rejects_file_is_no_source(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", QUESTIONS)
    rejects = str(tmp_path / "rejects.jsonl")
    config = {"data_dir": str(tmp_path / "data"), "picture": False, "rejects": rejects}
    for broken in ("", "", "{\n", ""):  # it is empty, empty, with a row, and empty again
        write_jsonl(tmp_path / "in.jsonl", QUESTIONS)
        with open(tmp_path / "in.jsonl", "a") as file:
            file.write(broken)
        prepare.main(prepare.PrepareConfig(source=(str(tmp_path),), **config))
        assert bool(Path(rejects).stat().st_size) == bool(broken)
    Path(rejects).write_text(json.dumps(dict.fromkeys(sources.REJECT_KEYS, "x")))
    with pytest.raises(UserError, match="--rejects=.* is among the sources"):
        prepare.main(prepare.PrepareConfig(source=(str(tmp_path / "in.jsonl"), rejects), **config))


def test_names_without_end_among_the_reasons_are_told_apart_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "MOST_REASONS", 3)
    rows = [{"messages": [{"role": f"r{n}", "content": "x"}]} for n in range(9)]
    assert run(tmp_path, [*QUESTIONS, *rows])["rows_dropped"] == {
        "unknown role": 6,
        **{f"unknown role: r{n}": 1 for n in range(3)},
    }


def test_a_picture_of_the_users_own_is_left_alone(tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "stats.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="stats.png is not of prepare.py; move it, or say"):
        run(tmp_path, QUESTIONS, picture=True)
    run(tmp_path, QUESTIONS)
    assert (data_dir / "stats.png").read_bytes() == b"mine"


def test_a_file_for_a_folder_is_one_line(tmp_path):
    (tmp_path / "data").write_text("mine")
    with pytest.raises(UserError, match="--data_dir=.*data is no folder"):
        run(tmp_path, QUESTIONS)
    assert (tmp_path / "data").read_text() == "mine"


def test_a_folder_that_cannot_be_made_or_opened_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="stopped while preparing .*file/data: .*Not a directory"):
        run(tmp_path, QUESTIONS, "file/data")

    def refused(*args: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    (tmp_path / "data").mkdir()
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match="stopped while preparing .*data: .*Permission denied"):
        run(tmp_path, QUESTIONS)


def test_a_split_of_a_source_that_has_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="--split=test; no source has several"):
        run(tmp_path, QUESTIONS, split="test")


def test_one_text_alone_is_to_be_parted(tmp_path):
    with pytest.raises(UserError, match="no document of 1 fell to .*--document_separator='.n.n'"):
        run(tmp_path, [{"text": "Once upon a time."}])
    with pytest.raises(UserError, match="no document of 9 fell to .*; more questions or"):
        run(tmp_path, [chat_row("Write.", f"Text {number}.") for number in range(9)])


def test_bins_beside_what_they_are_made_of(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", QUESTIONS)
    config = prepare.PrepareConfig(
        **{"source": (str(tmp_path),), "data_dir": str(tmp_path), "picture": False},
        **{"val_fraction": 0.2, "num_threads": 1},
    )
    for left_out in ({}, {f"{tmp_path} (bins)": 1}):
        prepare.main(config)
        meta = bins.read_meta(str(tmp_path))
        assert meta["rows_kept"] == 100
        assert left_out.items() <= meta["left_out"].items()
