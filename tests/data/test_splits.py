from nanosynth.data.splits import digest_of, split_of


def test_variants_of_a_first_user_turn_stay_on_one_side():
    sides = []
    for number in range(300):
        text = f"What is {number} plus café?"
        variants = [
            text,
            text.upper(),
            f"  {text.replace(' ', '   ')}\n",
            text.replace("é", "e\u0301"),
        ]
        found = {split_of(variant, 0.3, 42) for variant in variants}
        assert len(found) == 1
        sides += found
    assert 60 < sides.count("val") < 120  # 90 in the mean
    other = [split_of(f"What is {number} plus café?", 0.3, 43) for number in range(300)]
    assert other != sides


def test_digests_differ_where_conversations_do():
    found = [
        [("user", "a"), ("assistant", "b")],
        [("user", "aassistant 1 b"), ("assistant", "b")],
        [("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", "b")],
        [("system", "a"), ("user", "a"), ("assistant", "b")],
        [("user", "a"), ("assistant", "b\0")],
    ]
    assert len({digest_of(turns) for turns in found}) == len(found)
