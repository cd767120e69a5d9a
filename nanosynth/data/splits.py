"""What keeps training and validation apart: each conversation once, and its side of the split."""

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from nanosynth.tokenizer import Turn


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
        added = np.frombuffer(b"".join(digests), dtype="S16")
        ordered, first = np.unique(added, return_index=True)
        is_known = np.zeros(len(ordered), dtype=bool)
        for array in self._arrays:
            is_known |= is_in(ordered, array)
        is_new = np.zeros(len(added), dtype=bool)
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
