"""Which answers hold a run of tokens that stands in the training data, by one pass over it.

Windows of the answers are put into a table by their hash; the training tokens stream past in
chunks whose window hashes are computed at once, and each match of hashes is confirmed token by
token. Exact; memory does not grow with the training data.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

RUN_TOKENS = 50  # a shorter run may be common speech
CHUNK_TOKENS = 1 << 20  # some 60 MB of hashes and their intermediate results
TABLE_BITS = 24  # of the first, coarse table: 16 MB

# Hash of a window: sum of id[j] * BASE**j modulo 2**64. BASE is odd, hence has an inverse.
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 1 << 64)

Read = Callable[[int, int], np.ndarray]  # (start, count) -> uint16 ids


def powers(base: int, count: int) -> np.ndarray:
    """(count,) uint64: 1, base, base**2, ... modulo 2**64."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


def window_hashes(ids: np.ndarray, run: int, table: np.ndarray, inverses: np.ndarray) -> np.ndarray:
    """(len(ids) - run + 1,) uint64, one for each window of `run` ids.

    The tables are `powers` of BASE and of INVERSE, at least as long as `ids`.
    """
    sums = np.zeros(len(ids) + 1, dtype=np.uint64)
    # Ids start at 1, so that a window of zeros has a hash of its own.
    np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * table[: len(ids)], out=sums[1:])
    differences = sums[run:] - sums[:-run]
    differences *= inverses[: len(differences)]
    return differences


class Windows:
    """The windows of all answers, looked up by hash; each is dropped once it has been found."""

    def __init__(self, answers: Sequence[Sequence[int]], run: int, chunk_tokens: int):
        self.run = run
        self.table = powers(BASE, chunk_tokens + run)
        self.inverses = powers(INVERSE, chunk_tokens + run)
        self.owners: dict[bytes, set[int]] = defaultdict(set)  # a window's ids -> its answers
        by_hash: dict[int, set[bytes]] = defaultdict(set)
        for owner, answer in enumerate(answers):
            ids = np.array(answer, dtype="<u2")
            if len(ids) < run:
                continue
            hashes = []
            for start in range(0, len(ids) - run + 1, chunk_tokens):
                part = ids[start : start + chunk_tokens + run - 1]
                hashes += window_hashes(part, run, self.table, self.inverses).tolist()
            for start, value in enumerate(hashes):
                window = ids[start : start + run].tobytes()
                by_hash[value].add(window)
                self.owners[window].add(owner)
        self.hashes = np.array(sorted(by_hash), dtype=np.uint64)
        self.pending = [by_hash[value] for value in self.hashes.tolist()]
        self.alive = np.ones(len(self.hashes), dtype=bool)
        self.coarse = np.zeros(1 << TABLE_BITS, dtype=bool)
        self.coarse[self.hashes >> np.uint64(64 - TABLE_BITS)] = True

    def find(self, ids: np.ndarray) -> set[int]:
        """The answers of which a window stands in `ids`, of those windows not found before."""
        hashes = window_hashes(ids, self.run, self.table, self.inverses)
        maybe = np.flatnonzero(self.coarse[hashes >> np.uint64(64 - TABLE_BITS)])
        places = np.searchsorted(self.hashes, hashes[maybe])
        places = np.minimum(places, len(self.hashes) - 1)
        equal = (self.hashes[places] == hashes[maybe]) & self.alive[places]
        found: set[int] = set()
        for start, place in zip(maybe[equal].tolist(), places[equal].tolist(), strict=True):
            window = ids[start : start + self.run].tobytes()
            if window in self.pending[place]:
                self.pending[place].remove(window)
                self.alive[place] = bool(self.pending[place])
                found |= self.owners[window]
        return found


def copied(
    answers: Sequence[Sequence[int]],
    read: Read,
    n_tokens: int,
    *,
    run: int = RUN_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[bool]:
    """For each answer: does a run of `run` of its ids stand in the tokens that `read` gives?"""
    windows = Windows(answers, run, chunk_tokens)
    found: set[int] = set()
    if len(windows.hashes):
        for start in range(0, n_tokens - run + 1, chunk_tokens):
            count = min(chunk_tokens + run - 1, n_tokens - start)
            found |= windows.find(np.ascontiguousarray(read(start, count), dtype="<u2"))
    return [owner in found for owner in range(len(answers))]
