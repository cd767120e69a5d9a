import numpy as np

from nanosynth.data.splits import assign, digest_of, keys_of
from nanosynth.data.stats import FIELDS


def split_of(texts: list[str], seed: int) -> list[int]:
    documents = np.zeros(len(texts), list(FIELDS.items()))
    for document, text in zip(documents, texts, strict=True):
        document["first_turn"], document["all_turns"] = keys_of([("user", text)], seed)
    assert assign(documents, val_fraction=0.3) == "first user turn"
    return documents["split"].tolist()


def test_variants_of_a_first_user_turn_stay_on_one_side():
    texts = [f"What is {number} plus café?" for number in range(300)]
    sides = split_of(texts, seed=42)
    assert split_of([text.upper() for text in texts], seed=42) == sides
    spaced = [f"  {text.replace(' ', '   ')}\n" for text in texts]
    assert split_of(spaced, seed=42) == sides
    assert split_of([text.replace("é", "e\u0301") for text in texts], seed=42) == sides
    assert 60 < sum(sides) < 120  # 90 in the mean
    assert split_of(texts, seed=43) != sides


def test_digests_differ_where_conversations_do():
    found = [
        [("user", "a"), ("assistant", "b")],
        [("user", "aassistant 1 b"), ("assistant", "b")],
        [("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", "b")],
        [("system", "a"), ("user", "a"), ("assistant", "b")],
        [("user", "a"), ("assistant", "b\0")],
    ]
    assert len({digest_of(turns) for turns in found}) == len(found)
