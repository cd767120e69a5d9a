"""What keeps training and validation apart: duplicates, the side of the split, shared 13-grams."""

import functools
import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nanosynth.tokenizer import END_OF_TEXT, IM_START, Turn, encoding

GRAM = 13  # tokens
_BLOCK_TOKENS = 1 << 20  # hashed at once
_MOST_GRAMS = 1 << 25  # of validation, in 256 MB
_FILTER_BITS = 1 << 30  # 128 MB: one bit a hash, so that few training grams need a search


def digest_of(turns: Sequence[Turn]) -> bytes:
    """16 bytes that only equal conversations share."""
    text = "".join([f"{role} {len(text)} {text}" for role, text in turns])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class DigestSet:
    """A set of 16-byte digests at 16 bytes each, where Python's own takes 110.

    Sorted arrays of growing size: two of like size are merged, so there are few to search.
    """

    def __init__(self):
        self._arrays: list[np.ndarray] = []

    def add(self, digests: list[bytes]) -> list[bool]:
        """Which of them are new; of equal ones among them, the first."""
        found = np.frombuffer(b"".join(digests), dtype="S16")
        ordered, first = np.unique(found, return_index=True)
        is_known = np.zeros(len(ordered), dtype=bool)
        for array in self._arrays:
            is_known |= is_in(ordered, array)
        is_new = np.zeros(len(found), dtype=bool)
        is_new[first[~is_known]] = True
        self._arrays.append(ordered[~is_known])
        while len(self._arrays) > 1 and len(self._arrays[-2]) <= 2 * len(self._arrays[-1]):
            merged = np.concatenate([self._arrays.pop(), self._arrays.pop()])
            merged.sort()
            self._arrays.append(merged)
        return is_new.tolist()


def is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Whether each value is in a sorted array."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


def normal(text: str) -> str:
    """Text without its case, spaces and Unicode form."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def split_of(first_user_turn: str, val_fraction: float, seed: int) -> str:
    """'val' or 'train' by a hash of the turn, so it depends neither on row order nor on other rows.

    Variants of one prompt stay on one side.
    """
    digest = hashlib.sha256(f"{seed}\n{normal(first_user_turn)}".encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def shared_grams(train: Path, val: Path) -> dict:
    """How many 13-grams of validation also stand in training, and in how many documents.

    A gram is 13 tokens of one user or assistant turn; system turns repeat by nature. Counted with
    repeats; equal 64-bit hashes count as equal grams. Of a large validation split only one gram in
    `one_in` is looked at.
    """
    one_in = -(-val.stat().st_size // (2 * _MOST_GRAMS)) or 1
    hashes = _all_hashes(val, one_in)
    wanted = np.zeros(_FILTER_BITS // 8, dtype=np.uint8)
    np.bitwise_or.at(wanted, *_bits(hashes))
    is_shared = np.zeros(len(hashes), dtype=bool)
    for found, _ in _grams(train, one_in):
        places, bits = _bits(found)
        likely = found[wanted[places] & bits != 0]
        likely = likely[is_in(likely, hashes)]
        is_shared[np.searchsorted(hashes, likely)] = True
    return {"tokens": GRAM, "one_in": one_in, **_shares(val, one_in, hashes[is_shared])}


def _all_hashes(path: Path, one_in: int) -> np.ndarray:
    """The hashes of a bin's grams, sorted, each once. In place, for there may be many."""
    hashes = np.empty(path.stat().st_size // 2, dtype=np.uint64)
    count = 0
    for found, _ in _grams(path, one_in):
        hashes[count : count + len(found)] = found
        count += len(found)
    hashes = hashes[:count]
    hashes.sort()
    return hashes[np.concatenate([hashes[:1] == hashes[:1], hashes[1:] != hashes[:-1]])]


def _shares(val: Path, one_in: int, shared: np.ndarray) -> dict:
    """The counts over the validation split, given the hashes of the shared grams."""
    n_grams, n_shared = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)  # by document
    for found, documents in _grams(val, one_in):
        length = int(documents[-1]) + 1 if len(documents) else 0
        hits = np.bincount(documents[is_in(found, shared)], minlength=length)
        n_grams = _add(n_grams, np.bincount(documents, minlength=length))
        n_shared = _add(n_shared, hits)
    return {
        "val_grams": int(n_grams.sum()),
        "val_grams_in_train": int(n_shared.sum()),
        "val_documents": int((n_grams > 0).sum()),
        "val_documents_with_any": int((n_shared > 0).sum()),
        "val_documents_with_half": int(((n_shared > 0) & (2 * n_shared >= n_grams)).sum()),
    }


def _add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum of two arrays, the shorter one taken to end in zeros."""
    total = np.zeros(max(len(left), len(right)), dtype=np.int64)
    total[: len(left)] += left
    total[: len(right)] += right
    return total


def _grams(path: Path, one_in: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hash, number of its document) of each gram, a block of the bin after the other."""
    document, role = 0, 0  # of the first token: its number, and the first id of the turn's role
    for start in range(0, path.stat().st_size // 2, _BLOCK_TOKENS):
        # A gram starts in this block, ends in it or a little behind, and looks 2 tokens back.
        before = min(2, start)
        ids = np.fromfile(
            path, "<u2", count=before + _BLOCK_TOKENS + GRAM - 1, offset=2 * (start - before)
        )
        block = ids[before : before + _BLOCK_TOKENS]
        documents = document + np.cumsum(block == END_OF_TEXT)
        is_start = block == IM_START
        next_ids = np.append(ids[before + 1 :], 0)[: len(block)]
        roles = np.concatenate([[role], next_ids[is_start]])
        is_counted = roles[np.cumsum(is_start)] != _system_id()
        document, role = int(documents[-1]), int(roles[-1])
        count = min(len(block), len(ids) - before - GRAM + 1)
        if count > 0:
            hashes = _hashes(ids[before:], count)
            keep = _is_text(ids, before, count) & is_counted[:count]
            keep &= hashes % np.uint64(one_in) == 0
            yield hashes[keep], documents[:count][keep]


@functools.cache
def _system_id() -> int:
    """The token that follows <|im_start|> of a system turn."""
    return encoding().encode_ordinary("system")[0]


def _hashes(ids: np.ndarray, count: int) -> np.ndarray:
    """A 64-bit hash of each of the first `count` grams: a polynomial, then mixed."""
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(GRAM):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += ids[place : place + count]
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    return hashes


def _is_text(ids: np.ndarray, before: int, count: int) -> np.ndarray:
    """Whether a gram holds no special id and does not start with a turn's role."""
    specials = np.concatenate([[0], np.cumsum(ids >= END_OF_TEXT)])
    is_free = specials[before + GRAM :][:count] == specials[before:][:count]
    is_start = np.concatenate([np.zeros(2 - before, dtype=bool), ids == IM_START])
    return is_free & ~is_start[1 : 1 + count] & ~is_start[:count]


def _bits(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(byte, bit in it) of each hash in the filter."""
    slots = (hashes & np.uint64(_FILTER_BITS - 1)).astype(np.int64)
    return slots >> 3, np.left_shift(1, slots & 7).astype(np.uint8)
