import numpy as np
import pytest

from nanosynth.data import ngrams
from nanosynth.tokenizer import END_OF_TEXT


@pytest.mark.parametrize("length", [1, 2, 3, 13, 50])
def test_window_hashes_are_the_polynomial_mixed(length):
    ids = random_ids(60, seed=0)
    found = ngrams.window_hashes(ids, length).tolist()
    assert len(found) == 60 - length + 1
    for start, value in enumerate(found):
        wanted = 0
        for id in ids[start : start + length].tolist():
            wanted = (wanted * ngrams.BASE + id) % 2**64
        wanted = ((wanted ^ wanted >> 32) * 0xD6E8FEB86659FD93) % 2**64
        assert value == wanted ^ wanted >> 32
    assert ngrams.window_hashes(ids[: length - 1], length).size == 0


@pytest.mark.parametrize("filter_bits", [1, 32])
def test_hash_set_finds_what_it_holds(monkeypatch, filter_bits):
    monkeypatch.setattr(ngrams, "FILTER_BITS", filter_bits)
    hashes = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    known = ngrams.HashSet(np.concatenate([hashes[::2], hashes[::4]]))
    assert known.ordered.tolist() == sorted(hashes[::2].tolist())
    places, there = known.find(hashes)
    assert places.tolist() == list(range(0, 1000, 2))
    assert known.ordered[there].tolist() == hashes[::2].tolist()
    assert ngrams.HashSet(hashes[:0].copy()).find(hashes)[0].size == 0


def test_of_many_grams_one_in_so_many_is_looked_at(tmp_path, monkeypatch):
    documents = random_ids(20_000, seed=0, top=50_256)
    documents[499::500] = END_OF_TEXT
    train, val = tmp_path / "train.bin", tmp_path / "val.bin"
    documents[:15_000].tofile(train)
    documents[10_000:].tofile(val)
    whole = ngrams.shared_grams(train, val)
    n_grams = 500 - 1 - 12  # of a document
    assert whole["one_in"] == 1 and whole["val_grams"] == 20 * n_grams
    assert whole["val_grams_in_train"] == 10 * n_grams
    assert whole["val_documents"] == 20 and whole["val_documents_with_half"] == 10
    monkeypatch.setattr(ngrams, "MOST_GRAMS", 1000)
    part = ngrams.shared_grams(train, val)
    assert part["one_in"] == 10 and 0.08 < part["val_grams"] / whole["val_grams"] < 0.12
    assert part["val_documents"] == 20 and part["val_documents_with_half"] == 10


def reader(train: np.ndarray):
    return lambda start, count: train[start : start + count]


def copied(answers, train, **changes):
    return ngrams.copied(answers, reader(train), len(train), **changes)


def random_ids(n: int, seed: int, top: int = 50257) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, n).astype("<u2")


def planted(run: int, place: int, train: np.ndarray, seed: int) -> list[int]:
    """An answer with `run` tokens of `train` in its middle, and not one more."""
    around = random_ids(40, seed).tolist()
    middle = train[place : place + run].tolist()
    before, after = int(train[place - 1]) ^ 1, int(train[(place + run) % len(train)]) ^ 1
    return [*around[:20], before, *middle, after, *around[20:]]


@pytest.mark.parametrize("chunk_tokens", [1000, 1 << 20])
@pytest.mark.parametrize("place", [1, 960, 999, 1000, 1001, 2500, 4949])
def test_a_copy_of_50_tokens_is_found_and_one_of_49_is_not(place, chunk_tokens):
    train = random_ids(5000, seed=0)
    answers = [
        planted(50, place, train, seed=1),
        planted(49, place, train, seed=2),
        random_ids(300, seed=3).tolist(),
        planted(50, place, train, seed=4),
        train[place : place + 49].tolist(),
        [],
    ]
    found = copied(answers, train, chunk_tokens=chunk_tokens)
    assert found == [True, False, False, True, False, False]


def test_a_copy_with_one_token_changed_is_not_found():
    train = random_ids(500, seed=0)
    answer = train[100:199].tolist()
    assert copied([answer], train) == [True]
    answer[49] ^= 1
    assert copied([answer], train) == [False]


def test_equals_a_naive_search_where_tokens_repeat():
    """Few different ids: many windows occur often, and runs of zeros are everywhere."""
    train = random_ids(3000, seed=5, top=2)
    answers = [random_ids(60, seed=seed, top=2).tolist() for seed in range(200)]
    answers += [[0] * 60, [1] * 60, train[-14:].tolist(), train[:12].tolist()]
    for run in (9, 12, 14):
        windows = {train[k : k + run].tobytes() for k in range(len(train) - run + 1)}
        wanted = [
            any(
                np.array(answer[k : k + run], dtype="<u2").tobytes() in windows
                for k in range(len(answer) - run + 1)
            )
            for answer in answers
        ]
        assert 0 < sum(wanted) < len(wanted) or run == 9
        assert copied(answers, train, run=run, chunk_tokens=256) == wanted


def test_colliding_hashes_are_told_apart(monkeypatch):
    """With a base of 1 every order of the same ids has the same hash: only tokens decide."""
    monkeypatch.setattr(ngrams, "BASE", 1)
    train = np.arange(100, dtype="<u2")
    forward, backward = list(range(20, 40)), list(range(39, 19, -1))
    assert copied([backward, forward, backward], train, run=20) == [False, True, False]


def test_training_data_shorter_than_a_run():
    assert copied([[1] * 60], np.array([1] * 49, dtype="<u2")) == [False]
    assert copied([[1] * 60], np.array([1] * 50, dtype="<u2")) == [True]
    assert copied([], random_ids(100, seed=0)) == []
