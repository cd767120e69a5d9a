"""What keeps training and validation apart: each conversation once, and its side of the split."""

import hashlib
import math
import unicodedata
from collections.abc import Sequence

import numpy as np

from nanosynth.tokenizer import TEXT, Turn


def digest_of(turns: Sequence[Turn]) -> bytes:
    """16 bytes that only equal conversations share."""
    text = "".join([f"{role} {len(text)} {text}" for role, text in turns])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def normal(text: str) -> str:
    """Text without its case, spaces and Unicode form."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _key(text: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}\n{normal(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def keys_of(turns: Sequence[Turn], seed: int) -> tuple[int, int]:
    """64-bit hashes of the first user turn and of all user turns; variants of a text have one."""
    asked = [text for role, text in turns if role in ("user", TEXT)]
    first = _key(asked[0], seed)
    return first, first if len(asked) == 1 else _key("\n".join(asked), seed)


def assign(documents: np.ndarray, val_fraction: float) -> str:
    """Set 'split', 0 or 1 for validation, by the key 'first_turn'; what it was set by.

    So it depends neither on row order nor on other rows, and variants of one prompt stay on one
    side. Where all documents begin alike, as with one history, it is set by 'all_turns'.
    """
    first = documents["first_turn"]
    begin_alike = len(first) > 1 and (first == first[0]).all()
    keys = documents["all_turns"] if begin_alike else first
    documents["split"] = keys < np.uint64(math.ceil(val_fraction * 2**64))
    return "all user turns" if begin_alike else "first user turn"
