import re

import pytest

from nanosynth.data import conversations
from tiny import REPO, chat_row

HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Yo"}
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
PAIR = [("user", "Hi"), ("assistant", "Yo")]


def row(*turns: object) -> dict:
    return {"conversations": list(turns)}


@pytest.mark.parametrize(
    ("found", "turns"),
    [
        (row(HUMAN, GPT), PAIR),
        (row({"from": "system", "value": "S"}, HUMAN, GPT), [("system", "S"), *PAIR]),
        (row({"from": "system", "value": " \n"}, HUMAN, GPT), PAIR),
        (row(HUMAN, GPT, HUMAN, GPT), PAIR * 2),
        (row({**HUMAN, "weight": None}, {**GPT, "weight": 1}), PAIR),
        ({"messages": MESSAGES}, PAIR),
        ({"conversations": [HUMAN, GPT], "id": None, "system_prompt": None, "source": "x"}, PAIR),
        ({"instruction": "Hi", "output": "Yo"}, PAIR),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, PAIR),
        ({"instruction": "Hi", "input": None, "output": None, "response": "Yo"}, PAIR),
        ({"instruction": "Hi", "input": "x", "output": "Yo"}, [("user", "Hi\n\nx"), PAIR[1]]),
        ({"instruction": "Hi", "output": "Yo", "system_prompt": "S"}, [("system", "S"), *PAIR]),
        # A table of several sources has all their columns, null where a row has none.
        ({"conversations": None, "messages": MESSAGES}, PAIR),
        ({"conversations": None, "messages": None, "instruction": "Hi", "output": "Yo"}, PAIR),
        (row({"from": None, "value": None, "role": "user", "content": "Hi"}, GPT), PAIR),
        (row({"from": "human", "value": "  Hi\n"}, GPT), [("user", "  Hi\n"), PAIR[1]]),
    ],
)  # fmt: skip
def test_each_form_of_row(found, turns):
    assert conversations.conversation(found) == turns


REJECTS = [
    ("row is not an object", ["Hi"]),
    ("row is not an object", None),
    ("no conversations, messages or instruction", {}),
    ("no conversations, messages or instruction", {"text": "Hi", "instruction": None}),
    ("turns are not a list", {"conversations": "Hi"}),
    ("turns are not a list", {"messages": {"role": "user"}}),
    ("turn is not an object", row(HUMAN, "Yo")),
    ("turn is not an object", row(None)),
    ("unknown role", row(HUMAN, {"from": "tool", "value": "Yo"})),
    ("unknown role", row(HUMAN, {"value": "Yo"})),
    ("unknown role", row(HUMAN, {"from": ["gpt"], "value": "Yo"})),
    ("turn without text", row(HUMAN, {"from": "gpt"})),
    ("turn without text", row(HUMAN, {"from": "gpt", "value": 5})),
    ("turn without text", {"instruction": "Hi"}),
    ("turn without text", {"instruction": "Hi", "output": ["Yo"]}),
    ("turn without text", {"instruction": 5, "output": "Yo"}),
    ("no turns", row()),
    ("no turns", row({"from": "system", "value": "S"})),
    ("does not begin with the user", row(GPT)),
    ("does not begin with the user", row(GPT, HUMAN, GPT)),
    ("turns do not alternate", row(HUMAN, HUMAN, GPT)),
    ("turns do not alternate", row(HUMAN, GPT, {"from": "system", "value": "S"}, HUMAN, GPT)),
    ("empty turn", row({"from": "human", "value": ""}, GPT)),
    ("empty turn", row(HUMAN, {"from": "gpt", "value": " \n"})),
    ("empty turn", {"instruction": "Hi", "output": ""}),
    ("does not end with an answer", row(HUMAN)),
    ("does not end with an answer", row(HUMAN, GPT, HUMAN)),
    ("text is not valid Unicode", row(HUMAN, {"from": "gpt", "value": "\ud800"})),
    ("text is not valid Unicode", row({"from": "system", "value": "\udfff"}, HUMAN, GPT)),
    ("line is not JSON", conversations.Reject("line is not JSON")),
    ("spaces without end", row(HUMAN, {"from": "gpt", "value": "x" + "\n " * 500_000 + "x"})),
]


@pytest.mark.parametrize(("reason", "found"), REJECTS, ids=lambda value: repr(value)[:80])
def test_each_reason_to_reject(reason, found):
    with pytest.raises(conversations.Reject) as reject:
        conversations.conversation(found)
    assert str(reject.value) == reason


def test_no_reason_is_left_untested():
    folder = REPO / "nanosynth/data"
    text = "".join((folder / f"{name}.py").read_text() for name in ("conversations", "sources"))
    assert set(re.findall(r'Reject\("(.+?)"[,)]', text)) == {reason for reason, _ in REJECTS}


def test_first_words():
    assert conversations.first_words(chat_row("  Hi\n there ")) == "Hi there"
    assert conversations.first_words({"source": "s", "instruction": "Do"}) == "Do"
    assert conversations.first_words({"a": [{"b": "deep"}]}) == "deep"
    assert (
        conversations.first_words(conversations.Reject("line is not JSON", "{broken \udcff"))
        == "{broken ?"
    )
    assert conversations.first_words([]) == conversations.first_words(5) == ""
    assert len(conversations.first_words(chat_row("word " * 1000))) <= 120


TROUBLED = [
    ("refusal or AI boilerplate", "Tell me.", "As an AI language model, I do not know."),
    ("refusal or AI boilerplate", "Do it.", "I\u2019m sorry, but I cannot do that."),
    ("refusal or AI boilerplate", "Do it!", "I can't help with it."),
    (
        "not English",
        "¿Qué es el sol?",
        "El sol es una estrella que está en el centro de la galaxia.",
    ),
    (
        "not English",
        "什么是太阳",
        "太阳是一颗恒星，位于太阳系的中心。它给地球带来光和热，是生命的源泉。",
    ),
    ("run of one character", "Draw a line.", "Here: " + "-" * 100),
    ("run of one character", "x" * 124 + "y", "No."),
]
UNTROUBLED = [
    ("Say no.", "I can't swim, but I can help you. I'm sorry to hear of it."),
    ("Who are you?", "I am an aide of the king, as an aim goes."),
    ("Code?", "for i in range(10):\n    print(i ** 2)\n" + "# " + "-" * 99),
    ("What is déjà vu? It is French for 'le déjà vu'.", "It is the feeling of having seen it."),
    ("2 + 2?", "4"),
    (
        "Translate 'sun' to Japanese.",
        "It is 太陽 (taiyou), which is read so in all of the country.",
    ),
]


@pytest.mark.parametrize(("trouble", "question", "answer"), TROUBLED)
def test_known_troubles_are_found(trouble, question, answer):
    turns = [("user", question), ("assistant", answer)]
    assert conversations.troubles_of(turns) == [trouble]


@pytest.mark.parametrize(("question", "answer"), UNTROUBLED)
def test_sound_conversations_have_no_trouble(question, answer):
    turns = [("user", question), ("assistant", answer)]
    assert not conversations.troubles_of(turns)
