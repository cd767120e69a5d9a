"""prepare.py killed at any time, and fed anything: bins are whole or refused, all is counted."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

import prepare
import tiny
from faults import disk, rig
from nanosynth import UserError, tokenizer
from nanosynth.data import bins, conversations

QUIET = {"val_fraction": 0.5, "num_threads": 2, "picture": False}


def run(source: Path, data_dir: Path, **changes) -> None:
    """prepare.main in this process, without a word."""
    config = prepare.PrepareConfig(
        source=(str(source),), data_dir=str(data_dir), **{**QUIET, **changes}
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare.main(config)


def content(data_dir: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder and those below."""
    files = sorted(path for path in data_dir.rglob("*") if path.is_file())
    return {
        str(path.relative_to(data_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def is_whole(data_dir: Path) -> bool:
    """Whether train.py would take the folder; its bins are then what meta.json says."""
    try:
        meta = bins.read_meta(str(data_dir))
    except UserError:
        return False
    found = content(data_dir)
    assert {name: entry["sha256"] for name, entry in meta["files"].items()}.items() <= found.items()
    return True


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    chance = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    found = (
        tiny.chat_row(f"Question {n}: {' '.join(chance.choices(words, k=60))}?", f"Answer {n}.")
        for n in range(4000)
    )
    return tiny.write_jsonl(tmp_path_factory.mktemp("source") / "rows.jsonl", list(found))


@pytest.fixture(scope="module")
def clean(tmp_path_factory, source) -> Path:
    data_dir = tmp_path_factory.mktemp("clean") / "data"
    run(source, data_dir)
    return data_dir


@pytest.fixture(scope="module")
def older(tmp_path_factory, source) -> Path:
    """A whole folder of an earlier run, of bins as large, in another order."""
    data_dir = tmp_path_factory.mktemp("older") / "data"
    run(source, data_dir, seed=1)
    return data_dir


def test_random_kill(work, source, clean, older, tally):
    row = tally("prepare.py: SIGKILL at a random time, run again")
    chance = random.Random(1)
    seconds = []
    for number in range(2):  # the first one also warms the server that forks
        started = time.monotonic()
        assert rig.end(rig.fork(run, source, work / f"warm_{number}")) == 0
        seconds.append(time.monotonic() - started)
    for number in range(4 * row.wanted):
        data_dir = work / str(number)
        if number % 2:
            shutil.copytree(older, data_dir)
        process = rig.fork(run, source, data_dir)
        process.join(chance.uniform(0, min(seconds)))
        process.kill()
        process.join()
        if process.exitcode != -9:
            continue
        left = content(data_dir) if data_dir.exists() else {}
        kept = all(left.get(name) == digest for name, digest in content(older).items())
        row.land("with bins half written" if any(".partial" in name for name in left) else "before")
        complaints = [] if not is_whole(data_dir) or (number % 2 and kept) else ["half is taken"]
        run(source, data_dir)
        complaints += [] if content(data_dir) == content(clean) else ["the second run differs"]
        row.trial(complaints)
        shutil.rmtree(data_dir)
        if row.trials == row.wanted:
            break
    assert row.trials == row.wanted, "too few kills landed before the end"
    row.check()


def end_at(source: Path, data_dir: Path, index: int) -> None:
    """In the child: prepare, and be gone right before operation `index`."""
    number = iter(range(10**9))

    def before(operation: disk.Operation, write: object) -> None:
        if next(number) == index:
            os._exit(9)

    with disk.watch(before):
        run(source, data_dir)


def test_end_at_every_operation_of_the_publication(work, source, clean, older, tally):
    row = tally("prepare.py: ended at an operation of its publication")
    data_dir = work / "all"
    shutil.copytree(older, data_dir)
    operations = disk.record(lambda: run(source, data_dir))
    meta = str(data_dir / "meta.json")
    removed = [operation.kind == "remove" and operation.path == meta for operation in operations]
    renamed = [operation.target == meta for operation in operations]
    first, last = removed.index(True), renamed.index(True)
    indices = list(range(first - 1, min(last + 2, len(operations))))
    if row.wanted < len(indices):
        indices = random.Random(0).sample(indices, row.wanted)
    for index in indices:
        data_dir = work / str(index)
        shutil.copytree(older, data_dir)
        assert rig.end(rig.fork(end_at, source, data_dir, index)) == 9
        row.land(operations[index].kind)
        wanted = older if index <= first else clean if index > last else None
        complaints = [] if is_whole(data_dir) == bool(wanted) else ["a mix is taken"]
        if wanted:
            found = content(data_dir)
            same = all(found[name] == digest for name, digest in content(wanted).items())
            complaints += [] if same else ["neither old nor new"]
        run(source, data_dir)
        complaints += [] if content(data_dir) == content(clean) else ["the second run differs"]
        row.trial([f"{operations[index]}: {complaint}" for complaint in complaints])
    row.check()


# Anything, from what JSON can say to bytes that mean nothing.
TEXT = strategies.one_of(
    strategies.text(max_size=20),
    strategies.sampled_from(
        [
            "",
            " \n\t",
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|endoftext|>",
            "\x00",
            "\ud800",
            "\U0010ffff",
            "a\U0010ffffb",
            "\u2028\u200b\ufeff",
            "x" * 5000,
            " " * 3000,
            "\U0001f469\u200d\U0001f680" * 50,
        ]
    ),
)
JSON = strategies.recursive(
    strategies.one_of(
        strategies.none(), strategies.booleans(), strategies.integers(), strategies.floats(), TEXT
    ),
    lambda inner: strategies.one_of(
        strategies.lists(inner, max_size=3),
        strategies.dictionaries(
            strategies.sampled_from(["from", "value", "role", "content", "a"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
ROLES = strategies.sampled_from(["human", "gpt", "system", "user", "assistant", "tool", None])
TURN = strategies.one_of(
    strategies.fixed_dictionaries({"from": ROLES, "value": TEXT}),
    strategies.fixed_dictionaries({"role": ROLES, "content": TEXT}, optional={"weight": JSON}),
    JSON,
)
PAIR = strategies.builds(
    lambda question, answer: tiny.chat_row(question, answer)["conversations"], TEXT, TEXT
)
ROW = strategies.one_of(
    strategies.fixed_dictionaries(
        {"conversations": PAIR | strategies.lists(TURN, max_size=4) | JSON},
        optional={"source": JSON, "category": TEXT},
    ),
    strategies.fixed_dictionaries(
        {"instruction": TEXT}, optional={"input": JSON, "output": TEXT, "system_prompt": JSON}
    ),
    JSON,
)
BAD_LINES = (
    b"\xff\xfe",
    b"{",
    b"[" * 3000,
    b'{"a": \x00}',
    b"\xed\xa0\x80",
    b'"\xc3"',
    b"9" * 5000,
)
LINE = strategies.one_of(
    ROW.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    strategies.sampled_from(BAD_LINES),
    strategies.binary(max_size=20),
)
GOOD = [tiny.chat_row(f"Good question {number}?", f"Answer {number}.") for number in range(12)]


def rows_of_lines(text: bytes) -> list[object]:
    """JSON lines said plainly; what cannot be read is None."""
    found = []
    for line in text.split(b"\n"):
        if line := line.removeprefix(b"\xef\xbb\xbf").strip():
            try:
                found.append(json.loads(line.decode("utf-8", "surrogateescape"), parse_int=float))
            except (ValueError, RecursionError):
                found.append(None)
    return found


def conversations_of(found: list[object]) -> list[list[tokenizer.Turn]]:
    """The usable ones, each once."""
    unique = {}
    for row in found:
        with contextlib.suppress(conversations.Reject):
            turns = conversations.conversation(row)
            unique[tuple(turns)] = turns
    return list(unique.values())


def check(source: Path, data_dir: Path, found: list[object]) -> None:
    """Every row is counted, and what was kept comes back from the bins, text for text."""
    run(source, data_dir)
    meta = bins.read_meta(str(data_dir))
    wanted = conversations_of(found)
    assert meta["rows_read"] == len(found)
    assert meta["rows_kept"] == len(wanted) == len(found) - sum(meta["rows_dropped"].values())
    documents = []
    for name in bins.SPLITS:
        ids = np.fromfile(data_dir / f"{name}.bin", dtype="<u2")
        parts = np.split(ids, np.flatnonzero(ids == tokenizer.END_OF_TEXT) + 1)
        assert not parts.pop().size
        documents += [part.tolist() for part in parts]
    assert sorted(documents) == sorted(tiny.encoded(turns)[0][0] for turns in wanted)


@hypothesis.strategies.composite
def cases(draw) -> tuple[str, list[bytes], bytes]:
    """(suffix, lines, damage)"""
    suffix = draw(strategies.sampled_from([".jsonl", ".json", ".jsonl.gz"]))
    lines = draw(strategies.lists(LINE, max_size=6))
    return suffix, lines, draw(strategies.sampled_from([b"", b"", b"]", b"\x00", b'{"a"', b","]))


def fuzz_one(folder: Path, suffix: str, lines: list[bytes], damage: bytes) -> str:
    """Prepare one made file; how it ended."""
    good = [json.dumps(row).encode() for row in GOOD]
    path, data_dir = folder / f"rows{suffix}", folder / "data"
    if suffix != ".json":
        text = b"\n".join([*good, *lines, damage])
        text = text.replace(b"\r", b" ")
        path.write_bytes(gzip.compress(text, 1) if suffix.endswith(".gz") else text)
        check(path, data_dir, rows_of_lines(text))
        return "lines"
    text = b"[" + b",\n".join([*good, *lines]) + b"]" + damage
    path.write_bytes(text)
    try:
        wanted = json.loads(text.decode("utf-8", "surrogateescape"), parse_int=float)
    except (ValueError, RecursionError):
        with pytest.raises(UserError, match=r"rows.json: broken JSON after \d+ rows, near byte"):
            run(path, data_dir)
        return "refused arrays"
    check(path, data_dir, wanted)
    return "arrays"


def test_fuzz(work, tally):
    row = tally("prepare.py: fuzzed files")

    @hypothesis.settings(
        max_examples=row.wanted,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases())
    def fuzz(case: tuple[str, list[bytes], bytes]) -> None:
        row.land(fuzz_one(work, *case))
        row.trial([])

    fuzz()
    row.check()


@pytest.mark.parametrize("length", [1_000_000])
@pytest.mark.parametrize("text", ["a", " ", "ab ", "é", "\n", "<|im_end|>"])
def test_a_turn_of_a_million_characters(tmp_path, text, length):
    long = text * (length // len(text))
    found = [*GOOD, tiny.chat_row(f"{text} long?", f"x{long}"), tiny.chat_row(f"{long}x", "Yes.")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(found))
    started = time.monotonic()
    check(path, tmp_path / "data", found)
    assert time.monotonic() - started < 60


def test_bins_that_are_wrong_are_refused_with_their_place(tmp_path, clean):
    data_dir = tmp_path / "data"

    def said(name: str, damage) -> str:
        shutil.rmtree(data_dir, ignore_errors=True)
        shutil.copytree(clean, data_dir)
        path = data_dir / name
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(UserError) as error:
            bins.Split(str(data_dir), "train").ids(0, 100)
        return str(error.value)

    size = (clean / "train.bin").stat().st_size
    assert f"train.bin has {size - 1} bytes, not {size}" in said("train.bin", lambda old: old[:-1])
    past = (50_304).to_bytes(2, "little")
    assert "train.bin has changed since it was prepared" in said(
        "train.bin", lambda old: old[:14] + past + old[16:]
    )
    text = json.loads((clean / "meta.json").read_text())
    for wrong in ({"files": {}}, {"files": None}, {"format_version": "1"}, {"vocab_size": 1}):
        assert "meta.json" in said("meta.json", lambda _, w=wrong: json.dumps(text | w).encode())
    odd = json.loads(json.dumps(text))
    odd["files"]["train.bin"]["bytes"] -= 1
    (data_dir / "train.bin").write_bytes((clean / "train.bin").read_bytes()[:-1])
    (data_dir / "meta.json").write_text(json.dumps(odd))
    with pytest.raises(UserError, match=f"train.bin has {size - 1} bytes, .* wanted 2 to 1"):
        bins.read_meta(str(data_dir))
    copy = shutil.copytree(clean, tmp_path / "shortened")
    split = bins.Split(str(copy), "val")
    os.truncate(copy / "val_mask.bin", 10)
    with pytest.raises(UserError, match="val_mask.bin: ends before byte 15"):
        split.mask(5, 10)
