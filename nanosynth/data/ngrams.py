"""Runs of tokens that two texts share: what leaks from validation into training, what is copied.

Both are one search: the windows of the smaller text are put into a set by their hash, and the
windows of the training tokens stream past it, a chunk at a time, so that memory does not grow with
the training data.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nanosynth.tokenizer import END_OF_TEXT, IM_START, encoding

GRAM = 13  # tokens of the leak check; GPT-3's took 13 words (arXiv:2005.14165, appendix C)
RUN_TOKENS = 50  # of a copied answer, as in arXiv:2202.07646; a shorter run may be common speech
CHUNK_TOKENS = 1 << 17  # hashed at once: 1 MB of hashes stays in the cache
MOST_GRAMS = 1 << 25  # of validation: 256 MB of hashes, and a filter of 128 MB
FILTER_BITS = 32  # or more a hash, so that one foreign hash in 32 or fewer needs a search
BASE = 0x9E3779B97F4A7C15  # odd: no power of it loses a bit

Read = Callable[[int, int], np.ndarray]  # (start, count) -> uint16 ids


def window_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """(len(ids) - length + 1,) uint64, one for each window of `length` ids.

    The polynomial id[0] * BASE**(length - 1) + ... + id[length - 1] modulo 2**64, then mixed, so
    that each of its bits depends on all of the ids. By doubling: the windows of 2n ids are two of n
    ids side by side, so 13 ids take 5 steps.
    """
    singles = ids.astype(np.uint64)
    hashes, n = singles, 1
    for bit in f"{length:b}"[1:]:
        hashes = hashes[:-n] * np.uint64(pow(BASE, n, 1 << 64)) + hashes[n:]
        n *= 2
        if bit == "1":
            hashes = hashes[:-1] * np.uint64(BASE) + singles[n:]
            n += 1
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xD6E8FEB86659FD93)  # degski's 64-bit mixer
    hashes ^= hashes >> np.uint64(32)
    return hashes


class HashSet:
    """Hashes in order, behind a filter of bits: most that are looked up are not there."""

    def __init__(self, hashes: np.ndarray):
        """Sorts `hashes` in place, for there may be many."""
        hashes.sort()
        is_first = np.ones(len(hashes), dtype=bool)
        np.not_equal(hashes[1:], hashes[:-1], out=is_first[1:])
        self.ordered = hashes[is_first]
        n_bits = max(3, (FILTER_BITS * len(self.ordered) - 1).bit_length())  # of a slot's number
        self._shift = np.uint64(64 - n_bits)
        self._filter = np.zeros(1 << (n_bits - 3), dtype=np.uint8)
        for start in range(0, len(self.ordered), CHUNK_TOKENS):
            np.bitwise_or.at(self._filter, *self._bits(self.ordered[start : start + CHUNK_TOKENS]))

    def _bits(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(byte, bit in it) of each hash in the filter."""
        slots = (hashes >> self._shift).astype(np.int64)
        return slots >> 3, np.left_shift(1, slots & 7).astype(np.uint8)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `hashes` those are that the set has, and the place of each in `ordered`."""
        places, bits = self._bits(hashes)
        likely = np.flatnonzero(self._filter[places] & bits)
        places = np.searchsorted(self.ordered, hashes[likely])
        places = np.minimum(places, len(self.ordered) - 1)
        is_there = self.ordered[places] == hashes[likely]
        return likely[is_there], places[is_there]


def copied(
    answers: Sequence[Sequence[int]],
    read: Read,
    n_tokens: int,
    *,
    run: int = RUN_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[bool]:
    """For each answer: does a run of `run` of its ids stand in the tokens that `read` gives?

    Exact: equal hashes only tell where tokens are compared.
    """
    owners: dict[int, dict[bytes, set[int]]] = defaultdict(dict)  # hash -> window -> its answers
    for owner, answer in enumerate(answers):
        ids = np.array(answer, dtype="<u2")
        hashes = window_hashes(ids, run).tolist() if len(ids) >= run else []
        for start, value in enumerate(hashes):
            owners[value].setdefault(ids[start : start + run].tobytes(), set()).add(owner)
    wanted = HashSet(np.array(list(owners), dtype=np.uint64))
    is_copied = [False] * len(answers)
    for start in range(0, n_tokens - run + 1 if owners else 0, chunk_tokens):
        ids = read(start, min(chunk_tokens + run - 1, n_tokens - start)).astype("<u2")
        hashes = window_hashes(ids, run)
        places, _ = wanted.find(hashes)
        for place, value in zip(places.tolist(), hashes[places].tolist(), strict=True):
            if windows := owners[value]:  # a window that was found is taken out
                for owner in windows.pop(ids[place : place + run].tobytes(), ()):
                    is_copied[owner] = True
    return is_copied


def shared_grams(train: Path, val: Path) -> dict:
    """How many 13-grams of validation also stand in training, and in how many documents.

    A gram is 13 tokens of one user or assistant turn; system turns repeat by nature. Counted with
    repeats; equal 64-bit hashes count as equal grams. Of a large validation split only one gram in
    `one_in` is looked at.
    """
    one_in = -(-val.stat().st_size // (2 * MOST_GRAMS)) or 1
    wanted = HashSet(_all_hashes(val, one_in))
    is_shared = np.zeros(len(wanted.ordered), dtype=bool)
    for hashes, _ in _grams(train, one_in):
        _, places = wanted.find(hashes)
        is_shared[places] = True
    every_last = (documents[-1] for _, documents in _grams(val, one_in) if len(documents))
    by_document = np.zeros((2, max(every_last, default=-1) + 1), dtype=np.int64)
    n_grams, n_shared = by_document
    for hashes, documents in _grams(val, one_in):
        np.add.at(n_grams, documents, 1)
        np.add.at(n_shared, documents, is_shared[np.searchsorted(wanted.ordered, hashes)])
    return {
        "tokens": GRAM,
        "one_in": one_in,
        "val_grams": int(n_grams.sum()),
        "val_grams_in_train": int(n_shared.sum()),
        "val_documents": int((n_grams > 0).sum()),
        "val_documents_with_any": int((n_shared > 0).sum()),
        "val_documents_with_half": int(((n_shared > 0) & (2 * n_shared >= n_grams)).sum()),
    }


def _all_hashes(path: Path, one_in: int) -> np.ndarray:
    """The hashes of a bin's grams. In place: pages that are not written to take no memory."""
    hashes, count = np.empty(path.stat().st_size // 2, dtype=np.uint64), 0
    for part, _ in _grams(path, one_in):
        hashes[count : count + len(part)] = part
        count += len(part)
    return hashes[:count]


def _grams(path: Path, one_in: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hash, number of its document) of each gram of a bin, by the chunk in which it starts."""
    system_id = encoding().encode_ordinary("system")[0]  # follows <|im_start|> of a system turn
    # Before the chunk: the document's number, the id of the turn's role, the last two tokens.
    document, role, behind = 0, 0, np.full(2, END_OF_TEXT, dtype="<u2")
    for start in range(0, path.stat().st_size // 2, CHUNK_TOKENS):
        ids = np.fromfile(path, "<u2", count=CHUNK_TOKENS + GRAM - 1, offset=2 * start)
        chunk = ids[:CHUNK_TOKENS]
        documents = document + np.cumsum(chunk == END_OF_TEXT)
        opens = chunk == IM_START
        next_ids = np.append(ids[1:], 0)[: len(chunk)]
        roles = np.append(role, next_ids[opens])[np.cumsum(opens)]  # of each token's turn
        # No gram holds a special id, nor begins in the two tokens behind <|im_start|>: the role.
        n_special = np.cumsum(np.append(0, ids >= END_OF_TEXT))
        is_text = n_special[GRAM:] == n_special[:-GRAM]
        opened = np.append(behind, chunk) == IM_START
        count = len(is_text)  # shorter than the chunk at the bin's end
        keep = is_text & ~(opened[:-2] | opened[1:-1])[:count] & (roles != system_id)[:count]
        hashes = window_hashes(ids, GRAM)
        keep &= hashes % np.uint64(one_in) == 0
        yield hashes[keep], documents[:count][keep]
        document, role, behind = int(documents[-1]), int(roles[-1]), chunk[-2:]
