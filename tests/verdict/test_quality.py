import json

import numpy as np
import pytest

from nanosynth import UserError, tokenizer
from tiny import write_jsonl
from verdict import instructions, quality


def encode(text: str) -> list[int]:
    return tokenizer.encoding().encode_ordinary(text)


PROSE = (
    "The harbour was quiet in the morning. Two boats came back with fish, a third one had nothing, "
    "and the men on the pier spoke about the weather, as they did every day of that long winter."
)


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "Yes.",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25",
        "ha ha ha",  # too short to be a loop
        "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\nprint(add(1))\n",
        "- red apple\n- green apple\n- yellow apple\n- ripe pear\n- green plum\n- dark cherry\n",
        "Row, row, row your boat, gently down the stream, merrily, merrily, merrily, merrily",
    ],
)
def test_ordinary_text_does_not_loop(text):
    assert not quality.loops(encode(text))


@pytest.mark.parametrize(
    "text",
    [
        "the " * 20,
        PROSE + " and so on and on" * 16,  # ordinary at first, then a tail of period 5
        (PROSE + "\n") * 4,  # a period of more than 16 tokens: the 4-grams show it
        "\n" * 40,
    ],
)
def test_repetition_loops(text):
    assert quality.loops(encode(text))


def test_loop_thresholds():
    assert quality.repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    half = list(range(11)) + list(range(11))  # 19 4-grams, 8 of them again
    assert quality.repeated_share(half) == pytest.approx(8 / 19) and not quality.loops(half)
    assert quality.loops(half + half)  # 41 4-grams, 11 different
    assert quality.tail_period([9] * 3 + [1, 2] * 32) == 2
    assert quality.tail_period(list(range(16)) * 4) == 16
    assert quality.tail_period(list(range(17)) * 4) is None
    assert quality.tail_period(list(range(16)) * 4 + [99]) is None
    assert quality.loops([7] * 16) and not quality.loops([7] * 15)


def parts_of(ids, ended=True, about_prompt=True):
    found = quality.parts(ids, ended=ended, about_prompt=about_prompt)
    return [part for part in quality.PARTS if not found[part]]


def test_each_part_can_fail_alone():
    assert parts_of(encode(PROSE)) == parts_of(encode("Yes.")) == []
    assert parts_of(encode(PROSE), ended=False) == ["ends"]
    assert parts_of([]) == parts_of(encode(" \n")) == parts_of(encode("...")) == ["not_empty"]
    assert parts_of(encode("a ") * 20) == ["no_loop"]
    assert parts_of(encode(PROSE), about_prompt=False) == ["about_prompt"]
    assert parts_of([*encode("Hi"), tokenizer.IM_START, *encode("user")]) == ["valid_text"]
    assert parts_of([*encode("Hi"), tokenizer.N_IDS + 3]) == ["valid_text"]
    assert parts_of(encode("a\x00b")) == parts_of(encode("a\ufffd")) == ["valid_text"]


def test_torn_text_is_valid_only_where_the_limit_cut_it():
    torn = encode("né👩")[:-1]
    assert not quality.valid_text(torn, ended=True) and quality.valid_text(torn, ended=False)
    assert not quality.valid_text([*torn, *encode("x")], ended=False)


def test_wilson_by_hand():
    # Wilson's interval of 8 of 10, as in his paper's formula.
    assert quality.wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert quality.wilson(0, 0) == [0.0, 1.0]
    low, high = quality.wilson(200, 200)
    assert high == 1.0 and 0.98 < low < 0.982
    assert quality.share([True, False])["share"] == 0.5


def test_distinct_counts_the_same_number_of_ngrams():
    answers = [[1, 2, 1], [1, 2, 3], [4]]
    assert quality.n_ngrams(answers, 2) == 4
    assert quality.distinct(answers, 1, 7) == 4 / 7
    assert quality.distinct(answers, 1, 3) == 2 / 3
    assert quality.distinct(answers, 2, 4) == 3 / 4  # (1,2) (2,1) (1,2) (2,3): none across answers
    assert quality.distinct([[]], 1, 0) == 0.0


def test_compression_is_higher_for_repetition():
    varied, repeated = PROSE.encode()[:150], ("good " * 40).encode()[:150]
    assert quality.compression_ratio(repeated) > 2 * quality.compression_ratio(varied)
    assert quality.compression_ratio(b"") == 0.0


def test_self_bleu_of_identical_and_of_disjoint_samples():
    same = "the cat sat on the mat today"
    assert quality.self_bleu([[same, same, same]]) == 1.0
    disjoint = ["one two three four five", "red green blue black white", "dog cat fish bird cow"]
    assert quality.self_bleu([disjoint]) < 0.06
    near = [same, "the cat sat on the mat yesterday"]
    assert 0.5 < quality.self_bleu([near]) < 1.0
    assert quality.self_bleu([[same, same], disjoint]) == pytest.approx(2 / 5, abs=0.04)
    assert quality.self_bleu([["", ""]]) == 1.0 and quality.self_bleu([["", "a"]]) == 0.0


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ({"kind": "one_word"}, ["Paris", "Paris.", "well-known"], ["Paris, France", "", "?"]),
        ({"kind": "n_words", "n": 3}, ["hot and bright."], ["hot"]),
        ({"kind": "max_words", "n": 3}, ["a b", "a b c"], ["a b c d", ""]),
        ({"kind": "min_words", "n": 3}, ["a b c"], ["a b"]),
        (
            {"kind": "n_items", "n": 3},
            [
                "a, b, c",
                "a, b and c.",
                "a, b, and c",
                "- a\n- b\n- c",
                "1. a\n2. b\n3. c",
                "a\nb\nc",
            ],
            ["a, b", "- a\n- b", "a", "Here: a, b"],
        ),
        ({"kind": "numbered", "n": 2}, ["1. a\n2. b", "1) a\n2) b"], ["1. a\n3. b", "- a\n- b"]),
        ({"kind": "bullets", "n": 2}, ["- a\n- b", "* a\n* b"], ["1. a\n2. b", "- a"]),
        ({"kind": "n_lines", "n": 2}, ["a\nb", "a\n\nb\n"], ["a", "a\nb\nc"]),
        (
            {"kind": "n_sentences", "n": 2},
            ["It is 3.5 m. So be it!", "One. Two"],
            ["One.", "One. Two. Three."],
        ),
        ({"kind": "n_paragraphs", "n": 2}, ["a\nb\n\nc"], ["a\nb"]),
        ({"kind": "upper_case"}, ["GOOD MORNING 5!"], ["Good", "123"]),
        ({"kind": "lower_case"}, ["hello there"], ["Hello there", "123"]),
        ({"kind": "starts_with", "text": "Yes"}, ["Yes, it is.", " Yes"], ["It is. Yes"]),
        ({"kind": "ends_with", "text": "The End"}, ["So. The End.", "The End"], ["The End of it"]),
        ({"kind": "ends_with", "text": "?"}, ["You like it?"], ["You like it."]),
        ({"kind": "equals", "text": "1 2 3"}, ["1 2 3", '"1 2 3."'], ["1 2 3 4", "1, 2, 3"]),
        ({"kind": "one_of", "options": ["yes"]}, ["Yes.", "yes"], ["Yes, it is", "no", "y"]),
        ({"kind": "contains", "words": ["tea"]}, ["Tea is hot"], ["steam"]),
        ({"kind": "contains_text", "texts": ["print("]}, ["print('a')"], ["print it"]),
        ({"kind": "excludes", "words": ["sun"]}, ["a Sunday"], ["The sun is up", ""]),
        ({"kind": "excludes_text", "texts": [","]}, ["a b"], ["a, b"]),
        ({"kind": "in_order", "words": ["2", "9"]}, ["2, 9", "2 then 9"], ["9, 2", "2", "2 9 2"]),
        ({"kind": "quoted"}, ['"a joke"', "“a”"], ['a "joke"', '""', '"']),
        (
            {"kind": "json", "keys": ["a"]},
            ['{"a": 1}', '```json\n{"a": 1, "b": 2}\n```'],
            ['{"b": 1}', "a: 1", '["a"]'],
        ),
    ],
    ids=str,
)
def test_instruction_checks(check, right, wrong):
    for text in right:
        assert instructions.obeys(text, check), text
    for text in wrong:
        assert not instructions.obeys(text, check), text


def test_all_checks_are_tested_and_all_used():
    path = test_instruction_checks.pytestmark[0].args[1]
    kinds = {case[0]["kind"] for case in path}
    assert kinds == set(instructions.CHECKS)


def test_a_prompt_file_is_read_as_sample_py_reads_it(tmp_path):
    path = tmp_path / "prompts.jsonl"
    row = {"prompt": "a\u2028b", "check": {"kind": "quoted"}}
    path.write_bytes(f"\ufeff{json.dumps(row, ensure_ascii=False)}\r\n\n".encode())
    assert instructions.read_prompts(path) == [row]
    path.write_bytes(json.dumps(row).encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16, not UTF-8"):
        instructions.read_prompts(path)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi"},
        {"prompt": 5, "check": {"kind": "one_word"}},
        {"prompt": "Hi", "check": {"kind": "rhymes"}},
        {"prompt": "Hi", "check": {"kind": "n_words"}},
        {"prompt": "Hi", "check": {"kind": "one_word", "n": 3}},
        {"prompt": "Hi", "check": {"kind": "n_words", "n": "3"}},
        {"prompt": "Hi", "check": {"kind": "contains", "words": "ab"}},
        [],
    ],
    ids=str,
)
def test_a_prompt_without_a_usable_check_is_refused(tmp_path, row):
    path = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": "a", "check": {"kind": "quoted"}}, row]
    )
    with pytest.raises(UserError, match="prompts.jsonl, line 2: .*wanted a prompt"):
        instructions.read_prompts(path)
    path.write_text("")
    with pytest.raises(UserError, match="has no prompt"):
        instructions.read_prompts(path)
    with pytest.raises(UserError, match="no prompt file"):
        instructions.read_prompts(tmp_path / "missing.jsonl")


def test_the_fixed_judge_prefers_the_prompt_that_shares_rare_words():
    ids = np.array(encode(f"{PROSE} A cat and a dog. The cat and the dog.") * 20)
    judge = quality.FixedJudge(lambda start, count: ids[start : start + count], len(ids))
    harbour, boats = (
        encode("Tell of the harbour in winter"),
        encode("Who came back with fish, and when"),
    )
    assert judge.prefers(encode("Harbour and winter belong together."), harbour, boats) is True
    assert judge.prefers(encode("Harbour and winter belong together."), boats, harbour) is False
    # Either shares a word: the rarer one, 'fish', tells more than 'the'.
    assert judge.prefers(encode("the fish"), encode("the b c d"), encode("fish b c d")) is False
    for nothing in ("", "\n\n", "A cat."):
        assert judge.prefers(encode(nothing), harbour, boats) is None


def test_coherence_relative_to_the_references():
    own, references = [True] * 81 + [False] * 19, [True] * 90 + [False] * 10
    found = quality.relative(own, references)
    assert found["share"] == 0.9 and found["interval"][0] < 0.9 < found["interval"][1] < 1
    assert quality.relative(references, references)["interval"] == [1.0, 1.0]
