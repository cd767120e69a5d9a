"""What keeps training and validation apart: each conversation once, and its side of the split."""

import hashlib
import unicodedata
from collections.abc import Sequence

from nanosynth.tokenizer import Turn


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


def split_of(first_user_turn: str, val_fraction: float, seed: int) -> str:
    """'val' or 'train' by a hash of the turn, so it depends neither on row order nor on other rows.

    Variants of one prompt stay on one side.
    """
    digest = hashlib.sha256(f"{seed}\n{normal(first_user_turn)}".encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"
