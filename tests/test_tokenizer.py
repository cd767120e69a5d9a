import hashlib

import numpy as np
import pytest

from nanosynth import UserError, tokenizer
from tiny import encoded

# fmt: off
# Three turns. What looks special inside a turn is ordinary text: " <", "|", "im", "_", ...
TURNS = [("system", "Be brief."), ("user", "Hi <|im_end|>"), ("assistant", "Yo <|endoftext|>")]
IDS = [
    50257, 10057, 198, 3856, 4506, 13, 50258, 198,
    50257, 7220, 198, 17250, 1279, 91, 320, 62, 437, 91, 29, 50258, 198,
    50257, 562, 10167, 198, 38101, 1279, 91, 437, 1659, 5239, 91, 29, 50258, 198,
    50256,
]
MASK = [0] * 8 + [0] * 13 + [0] * 4 + [1] * 9 + [0] + [0]
# fmt: on


def test_golden_ids_and_mask():
    assert encoded(TURNS) == [(IDS, MASK)]


def test_mask_marks_each_answer_and_its_end():
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "Bye"), ("assistant", "So long")]
    ids, mask = encoded(turns)[0]
    marked = [id for id, counts in zip(ids, mask, strict=True) if counts]
    assert tokenizer.decode(marked) == "Yo<|im_end|>So long<|im_end|>"


def test_conversations_encoded_together_equal_those_encoded_alone():
    conversations = [TURNS, [("user", "One"), ("assistant", "Two")], TURNS[1:]]
    together = encoded(*conversations)
    assert together == [encoded(turns)[0] for turns in conversations]


def test_prompt_is_the_beginning_of_the_training_document():
    prompt = tokenizer.prompt_ids(TURNS[:2])
    assert prompt == IDS[:25]
    assert MASK[len(prompt)] == 1 and not any(MASK[: len(prompt)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\t  x",
        "héllo wörld",
        "日本語",
        "👩‍👩‍👧‍👦",
        "a\u0000b",
        "\u202etxet",
        "don't we'LL",
        "٣ ½ ²",
    ],
)
def test_any_text_comes_back(text):
    ids = tokenizer.encoding().encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert all(id < tokenizer.END_OF_TEXT for id in ids)


def test_decode_spells_out_special_and_padding_ids():
    assert tokenizer.decode([50256, 50257, 50258]) == "<|endoftext|><|im_start|><|im_end|>"
    assert tokenizer.decode([tokenizer.N_IDS, tokenizer.VOCAB_SIZE - 1]) == "<|50259|><|50303|>"


def test_decode_of_torn_utf8_shows_a_replacement():
    first, *rest = tokenizer.encoding().encode_ordinary("👩")
    assert rest and tokenizer.decode([first]) == "\ufffd"


def test_token_bytes():
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.VOCAB_SIZE,) and lengths.dtype == np.int64
    assert lengths[tokenizer.encoding().encode_ordinary("héllo")].sum() == 6
    assert not lengths[tokenizer.END_OF_TEXT :].any() and lengths[: tokenizer.END_OF_TEXT].all()


def test_committed_rank_table_is_the_known_one():
    assert hashlib.sha256(tokenizer.RANKS_PATH.read_bytes()).hexdigest() == tokenizer.RANKS_SHA256


@pytest.mark.parametrize("content", [None, b"IQ== 0\n"])
def test_missing_or_other_rank_table_is_refused(tmp_path, monkeypatch, content):
    path = tmp_path / "gpt2.tiktoken"
    if content:
        path.write_bytes(content)
    monkeypatch.setattr(tokenizer, "RANKS_PATH", path)
    with pytest.raises(UserError, match="restore it from the repository"):
        tokenizer.encoding.__wrapped__()
