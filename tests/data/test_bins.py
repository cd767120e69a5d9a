import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from nanosynth import UserError, tokenizer
from nanosynth.data import bins
from tiny import CPU, write_bins

END = tokenizer.END_OF_TEXT
DOCUMENTS = {
    "train": [([n, n + 1, n + 2, END], [0, 1, 1, 0]) for n in range(0, 40, 4)],
    "val": [([7, 8, END], [0, 1, 0]), ([9, END], [0, 0])],
}


@pytest.fixture
def data_dir(tmp_path):
    return write_bins(tmp_path / "data", DOCUMENTS)


def edit_meta(data_dir: str, **changes) -> None:
    path = Path(data_dir) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_documents_come_back_whole_in_another_order(data_dir):
    found = [
        (ids.tolist(), mask.tolist()) for ids, mask in bins.Split(data_dir, "train").documents()
    ]
    assert sorted(found) == DOCUMENTS["train"]
    assert found != DOCUMENTS["train"]


def test_prompts_and_answers():
    ids = np.array([1, 2, 3, 4, 5, 6, 7, END])
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 0], dtype=np.uint8)
    assert bins.prompts_and_answers(ids, mask) == [([1], [2, 3]), ([1, 2, 3, 4, 5], [6])]
    assert bins.prompts_and_answers(ids, np.zeros(8, dtype=np.uint8)) == []


def test_prompts_and_answers_of_a_conversation():
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "Bye"), ("assistant", "So long")]
    ids, mask = tokenizer.encode_conversations([turns])[0]
    pairs = bins.prompts_and_answers(ids, mask)
    assert [tokenizer.decode(answer) for _, answer in pairs] == [
        "Yo<|im_end|>",
        "So long<|im_end|>",
    ]
    assert [prompt for prompt, _ in pairs] == [
        tokenizer.prompt_ids(turns[:1]),
        tokenizer.prompt_ids(turns[:3]),
    ]


def test_an_id_past_uint16_raises(tmp_path):
    with bins.BinWriter(str(tmp_path)) as writer, pytest.raises(OverflowError):
        writer.add([65_536], [0])
    assert not (tmp_path / ".partial").exists()


def test_what_is_not_published_is_removed(tmp_path):
    with bins.BinWriter(str(tmp_path)) as writer:
        writer.add([1, END], [0, 0])
    assert os.listdir(tmp_path) == []


def test_missing_meta_is_refused(data_dir):
    (Path(data_dir) / "meta.json").unlink()
    with pytest.raises(UserError, match="no meta.json.*prepare.py --source"):
        bins.Split(data_dir, "train")


def test_a_file_or_a_folder_in_its_place_is_refused(tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    (Path(data_dir) / "meta.json").unlink()
    (Path(data_dir) / "meta.json").mkdir()
    for folder in (str(tmp_path / "file"), data_dir):
        with pytest.raises(UserError, match="no prepared data in .*rectory"):
            bins.Split(folder, "train")


NO_METAS = [b"", b"[]", b"{}", b'{"format_version": 1}', b" " * 3000 + b"\xff"]


@pytest.mark.parametrize("content", NO_METAS)
def test_meta_that_describes_no_bins_is_refused(data_dir, content):
    (Path(data_dir) / "meta.json").write_bytes(content)
    with pytest.raises(UserError, match="not a bin description.*prepare.py --source") as error:
        bins.Split(data_dir, "train")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("changes", [{"format_version": 2}, {"vocab_size": 50_257}])
def test_another_format_or_vocabulary_is_refused(data_dir, changes):
    edit_meta(data_dir, **changes)
    with pytest.raises(UserError, match="wanted format 1, vocabulary 50304.*prepare.py --source"):
        bins.Split(data_dir, "train")


@pytest.mark.parametrize("name", bins.BINS)
def test_half_a_token_in_nanogpts_bins_is_refused(tmp_path, name):
    for each in bins.BINS:
        (tmp_path / each).write_bytes(b"\1\0" * 20)
    assert bins.Split(str(tmp_path), "train").n_tokens == 20
    (tmp_path / name).write_bytes(b"\1\0" * 20 + b"\1")
    with pytest.raises(UserError, match=f"{name} has 41 bytes; wanted 2 of each token"):
        bins.read_meta(str(tmp_path))


@pytest.mark.parametrize("name", ["train.bin", "train_mask.bin", "val.bin", "val_mask.bin"])
@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_bin_of_another_size_is_refused(data_dir, name, change):
    path = Path(data_dir) / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] if change == "shorter" else content + b"\0")
    if change == "gone":
        path.unlink()
    with pytest.raises(UserError, match=f"{name} has .* bytes, not {len(content)}"):
        bins.Split(data_dir, "train")


def damage(data_dir: str, name: str, place: int, value: bytes) -> None:
    """Put other bytes into a bin, and leave its time as it was."""
    path = Path(data_dir) / name
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(value)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_id_past_the_vocabulary_is_refused_with_its_place(data_dir):
    split = bins.Split(data_dir, "train")
    damage(data_dir, "train.bin", 2 * 13, np.array([50_304], dtype="<u2").tobytes())
    assert split.ids(0, 13).size == 13
    with pytest.raises(UserError, match="train.bin: 50304 at token 13"):
        split.ids(5, 20)


def test_a_mask_of_another_value_is_refused_with_its_place(data_dir):
    split = bins.Split(data_dir, "train")
    damage(data_dir, "train_mask.bin", 7, b"\2")
    assert split.mask(0, 7).size == 7
    with pytest.raises(UserError, match="train_mask.bin: 2 at token 7"):
        split.mask(5, 20)


@pytest.mark.parametrize("name", ["train.bin", "train_mask.bin"])
def test_a_bin_that_has_changed_is_refused(data_dir, name):
    bins.Split(data_dir, "train")
    damage(data_dir, name, 8, b"\0\0")
    with pytest.raises(UserError, match=f"{name} has changed since it was prepared"):
        bins.Split(data_dir, "train")
    assert bins.Split(data_dir, "val").n_tokens == 5


def test_what_was_found_whole_is_read_again_only_where_it_looks_changed(data_dir, monkeypatch):
    read = []
    digest = bins.hashlib.file_digest
    monkeypatch.setattr(
        bins.hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind)
    )

    def opened(**how) -> int:
        read.clear()
        bins.Split(data_dir, "val", **how)
        return len(read)

    assert [opened(), opened(), opened(verify=True), opened()] == [2, 0, 2, 0]
    os.utime(Path(data_dir) / "val.bin", ns=(0, 0))  # as a copy may have
    assert [opened(), opened()] == [1, 0]
    (Path(data_dir) / bins.CHECKED).write_text("[broken")
    assert [opened(), opened()] == [2, 0]


def test_documents_know_their_source_in_the_bins_order(tmp_path):
    labels = np.array([*([n, n % 3] for n in range(10)), [3, 1], [9, 2]])
    names = {"source": [f"s{n}" for n in range(10)], "category": ["a", "b", "c"]}
    with bins.BinWriter(str(tmp_path)) as writer:
        for ids, mask in (*DOCUMENTS["train"], *DOCUMENTS["val"]):
            writer.add(ids, mask)
        writer.shuffle(0, [0] * 10 + [1] * 2, np.arange(12) != 4, labels)
        writer.publish({"source": "test", "label_names": names})
    split = bins.Split(str(tmp_path), "train")
    found = split.labels()
    first_ids = [int(ids[0]) for ids, _ in split.documents()]
    assert sorted(first_ids) == [n for n in range(0, 40, 4) if n != 16]
    assert found["source"][0] == names["source"] and found["category"][0] == names["category"]
    assert found["source"][1].tolist() == [first // 4 for first in first_ids]
    assert found["category"][1].tolist() == [first // 4 % 3 for first in first_ids]
    for uses in (1, 3):  # of label_names edited by hand
        split.meta["label_names"] = {str(use): [f"s{n}" for n in range(10)] for use in range(uses)}
        with pytest.raises(UserError, match="train_sources.bin and label_names differ"):
            split.labels()
    damage(str(tmp_path), "train_sources.bin", 0, b"\7")
    with pytest.raises(UserError, match="train_sources.bin has changed"):
        split.labels()


def test_bins_of_an_earlier_version_have_no_labels(data_dir):
    assert bins.Split(data_dir, "train").labels() == {}


def test_two_writers_in_one_folder(tmp_path):
    with bins.BinWriter(str(tmp_path)), pytest.raises(UserError, match="another process works in"):
        bins.BinWriter(str(tmp_path))
    with bins.BinWriter(str(tmp_path)):  # the lock is gone
        pass
    assert os.listdir(tmp_path) == []


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "train.bin.spool").write_text("of a run that was killed")
    with bins.BinWriter(str(tmp_path)):
        pass
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "mine.spool").write_text("mine")
    with pytest.raises(UserError, match=".partial is not of prepare.py; move it away"):
        bins.BinWriter(str(tmp_path))
    assert (tmp_path / ".partial" / "mine.spool").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [".partial"]


@pytest.mark.parametrize(
    "names", [["train.bin", "val.bin"], ["val.bin", "meta.pkl"], ["meta.json"]]
)
@pytest.mark.parametrize("content", ['{"files": {"model.safetensors": 1}}', "[" * 100_000])
def test_bins_and_checkpoints_of_others_are_left_alone(tmp_path, names, content):
    for name in names:
        (tmp_path / name).write_text(content)
    with pytest.raises(
        UserError, match=f"{names[0]} is not of prepare.py; name another --data_dir"
    ):
        bins.BinWriter(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize("damage", ["meta.json", "train.bin", "train_mask.bin"])
def test_damaged_bins_of_ours_are_made_anew(data_dir, damage):
    (Path(data_dir) / damage).write_text("damaged")
    with bins.BinWriter(data_dir):
        pass


@pytest.mark.parametrize("n_moved", range(7))
def test_bins_whose_publishing_was_killed_are_made_anew(tmp_path, monkeypatch, n_moved):
    """At whatever file, and though a run that failed has removed .partial since."""
    moved, replace = [], os.replace

    def killed(source: Path, target: Path) -> None:
        if len(moved) == n_moved:
            raise KeyboardInterrupt
        moved.append(replace(source, target))

    with pytest.raises(KeyboardInterrupt), bins.BinWriter(str(tmp_path)) as writer:
        for _ in bins.SPLITS:
            writer.add([1, END], [0, 0])
        writer.shuffle(0, [0, 1], labels=np.zeros((2, 2)))
        monkeypatch.setattr(os, "replace", killed)
        writer.publish({"source": "test"})
    with bins.BinWriter(str(tmp_path)):
        pass


def test_a_file_shortened_after_opening_is_an_error(data_dir):
    split = bins.Split(data_dir, "train")
    os.truncate(split.path, 20)
    assert split.ids(0, 10).size == 10
    with pytest.raises(UserError, match="ends before byte 22"):
        split.ids(8, 3)


@pytest.mark.parametrize(("n_tokens", "rows"), [(0, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2)])
def test_rows_share_one_token(tmp_path, n_tokens, rows):
    document = (list(range(n_tokens)), [0] * n_tokens)
    split = bins.Split(write_bins(tmp_path, {"train": [document]}), "train")
    assert split.n_rows(4) == rows


def test_rows_of_a_batch(tmp_path):
    ids = list(range(100, 113))
    mask = [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1]
    split = bins.Split(write_bins(tmp_path, {"train": [(ids, mask)]}), "train")
    batch = bins.read_batch(split, [2, 0], 4, "all")
    assert batch.ids.tolist() == [[108, 109, 110, 111], [100, 101, 102, 103]]
    assert batch.targets.tolist() == [109, 110, 111, 112, 101, 102, 103, 104]
    assert batch.logit_index is None
    chosen = bins.read_batch(split, [2, 0], 4, "assistant")
    assert chosen.targets.tolist() == [110, 112, 103, 104]
    assert chosen.logit_index.tolist() == [1, 3, 6, 7]
    assert torch.equal(chosen.ids, batch.ids)
    assert bins.count_targets(split, [2, 0], 4, "all") == 8
    assert bins.count_targets(split, [2, 0], 4, "assistant") == 4
    assert all(torch.equal(a, b) for a, b in zip(chosen, chosen.to(CPU), strict=True))


def order_of(n_rows: int, seed: int = 0, **shape) -> bins.RowOrder:
    shape = {"micro_batch_size": 2, "micro_batches_per_step": 4} | shape
    return bins.RowOrder(n_rows=n_rows, seed=seed, **shape)


@pytest.mark.parametrize("n_rows", [3, 7, 8, 16, 37])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_row_exactly_once_an_epoch(n_rows, world_size):
    order = order_of(n_rows)
    n_steps = n_rows  # eight epochs of them
    samples = []
    for step in range(n_steps):
        numbers = [n for rank in range(world_size) for n in order.numbers(step, rank, world_size)]
        samples += [row for number in sorted(numbers) for row in order.micro_batch(number)]
    epochs = [samples[start : start + n_rows] for start in range(0, len(samples), n_rows)]
    assert len(epochs) == 8
    for epoch in epochs:
        assert sorted(epoch) == list(range(n_rows))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert order.epoch(n_steps) == 8.0


@pytest.mark.parametrize("step", [0, 1, 4, 5, 999_999])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(step):
    order = order_of(37)
    for world_size in (1, 2, 4):
        per_rank = [order.numbers(step, rank, world_size) for rank in range(world_size)]
        assert {len(numbers) for numbers in per_rank} == {4 // world_size}
        rows = [row for ns in per_rank for number in ns for row in order.micro_batch(number)]
        assert Counter(rows) == Counter(order.step(step))


def test_division_into_micro_batches_leaves_the_order():
    steps = [order_of(37).step(step) for step in range(10)]
    other = order_of(37, micro_batch_size=1, micro_batches_per_step=8)
    assert [other.step(step) for step in range(10)] == steps
    assert [order_of(37, seed=1).step(step) for step in range(10)] != steps
