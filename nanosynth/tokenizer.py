"""GPT-2 BPE with the two chat ids, and the ChatML template: conversations to token ids and back.

Preparation, training, sampling and evaluation all call these functions. Special ids are placed as
integers by the template; text is always encoded as ordinary text, so '<|im_end|>' typed inside a
turn stays text.
"""

import base64
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from nanosynth import UserError

END_OF_TEXT = 50256  # ends a document
IM_START = 50257  # opens a turn
NEWLINE = 198  # follows a turn's role, and its end
IM_END = 50258  # closes a turn
N_IDS = 50259  # ids from here up are padding and are never sampled
VOCAB_SIZE = 50304  # rows of the embedding: padded to a multiple of 64 for the tensor cores
SPECIAL_IDS = {"<|endoftext|>": END_OF_TEXT, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
STOP_IDS = (IM_END, END_OF_TEXT)
TEMPLATE = "chatml"

ROLES = ("system", "user", "assistant")
TEXT = "text"  # the role of a plain text's one turn, which no mark opens or closes
RANKS_PATH = Path(__file__).resolve().parent.parent / "data" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's pre-tokenizer (openai/gpt-2, encoder.py).
_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Joins texts that are encoded together: a noncharacter, which no text should hold.
_SEPARATOR, _SEPARATOR_ID = "\U0010ffff", N_IDS

Turn = tuple[str, str]  # (role, text)


@functools.cache
def encoding() -> tiktoken.Encoding:
    """GPT-2's BPE with the special ids, built from the committed rank table."""
    return tiktoken.Encoding(
        "gpt2-chatml",
        pat_str=_SPLIT_PATTERN,
        mergeable_ranks=_ranks(),
        special_tokens={**SPECIAL_IDS, _SEPARATOR: _SEPARATOR_ID},
    )


def _ranks() -> dict[bytes, int]:
    try:
        table = RANKS_PATH.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no rank table at {RANKS_PATH}; restore it from the repository") from None
    if hashlib.sha256(table).hexdigest() != RANKS_SHA256:
        raise UserError(f"{RANKS_PATH} is not GPT-2's rank table; restore it from the repository")
    lines = (line.split() for line in table.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@functools.cache
def _turn_opening(role: str) -> np.ndarray:
    return np.array([IM_START, *encoding().encode_ordinary(f"{role}\n")], dtype=np.uint16)


def encode_conversations(
    conversations: Sequence[Sequence[Turn]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) of each conversation, (T,) uint16 and (T,) uint8.

    The mask is 1 on assistant text and its <|im_end|>. A plain text, one turn of the role TEXT, is
    its own ids and <|endoftext|>, mask 1.

    >>> [(ids, mask)] = encode_conversations([[("user", "Hi"), ("assistant", "Yo")]])
    >>> ids.tolist(), mask.tolist()
    ([50257, 7220, 198, 17250, 50258, 198, 50257, 562, 10167, 198, 38101, 50258, 198, 50256],
     [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0])
    """
    encoded = iter(_encode_texts([text for turns in conversations for _, text in turns]))
    closing = np.array([IM_END, NEWLINE], dtype=np.uint16)
    end = np.array([END_OF_TEXT], dtype=np.uint16)
    documents = []
    for turns in conversations:
        parts, marks = [], []  # a mark is (length, mask) of each stretch of tokens
        for role, _ in turns:
            if role == TEXT:
                parts.append(next(encoded))
                marks.append((len(parts[-1]), 1))
                continue
            opening, body = _turn_opening(role), next(encoded)
            parts += (opening, body, closing)
            is_answer = int(role == "assistant")
            marks += ((len(opening), 0), (len(body) + 1, is_answer), (len(closing) - 1, 0))
        lengths, values = zip(*marks, (1, int(any(role == TEXT for role, _ in turns))), strict=True)
        ids = np.concatenate((*parts, end), dtype=np.uint16, casting="unsafe")  # all below 2**16
        documents.append((ids, np.repeat(np.array(values, dtype=np.uint8), lengths)))
    return documents


def _encode_texts(texts: list[str]) -> list[np.ndarray]:
    """The ids of each text, as ordinary text.

    One call encodes all, joined by a noncharacter: a call for each costs more than its encoding,
    and threads would wait for Python's lock after each.
    """
    joined = _SEPARATOR.join(texts)
    if joined.count(_SEPARATOR) != len(texts) - 1 or not is_unicode(joined):
        return [np.array(encoding().encode_ordinary(text), dtype=np.uint16) for text in texts]
    ids = encoding().encode_to_numpy(joined, allowed_special={_SEPARATOR}, disallowed_special=())
    ends = [*np.flatnonzero(ids == _SEPARATOR_ID).tolist(), len(ids)]
    starts = [0, *(end + 1 for end in ends)]
    return [ids[start:end] for start, end in zip(starts, ends, strict=False)]


def is_unicode(text: str) -> bool:
    """Whether it holds no lone surrogate, which JSON's escapes and a terminal may give."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompt_ids(turns: Sequence[Turn]) -> list[int]:
    """The ids of `turns` followed by an opened assistant turn: what the model is to continue."""
    ids, _ = encode_conversations([turns])[0]
    return [*ids[:-1].tolist(), *_turn_opening("assistant").tolist()]


def decode(ids: Iterable[int]) -> str:
    """Text of `ids`, special ids spelt out; a padding id shows as <|ID|>, torn UTF-8 as U+FFFD."""
    return b"".join(token_text(id) for id in ids).decode("utf-8", errors="replace")


def token_text(id: int) -> bytes:
    """The bytes of one id, for streaming."""
    return encoding().decode_single_token_bytes(id) if id < N_IDS else f"<|{id}|>".encode()


@functools.cache
def token_bytes() -> np.ndarray:
    """(VOCAB_SIZE,) int64: the bytes of text behind each id; 0 for special and padding ids."""
    lengths = [len(token_text(id)) for id in range(END_OF_TEXT)]
    return np.array(lengths + [0] * (VOCAB_SIZE - END_OF_TEXT))
