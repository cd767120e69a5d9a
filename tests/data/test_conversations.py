import re

import pytest

from nanosynth import UserError
from nanosynth.data import conversations
from tiny import REPO, chat_row

HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Yo"}
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
PAIR = [("user", "Hi"), ("assistant", "Yo")]
SYSTEM = ("system", "S")
PARTS = [{"type": "text", "text": "H"}, None, {"text": "i"}]


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
        (row({**HUMAN, "tool_calls": None}, {**GPT, "tool_calls": [], "function_call": ""}), PAIR),
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
        ({**row(HUMAN, GPT), "system": "S"}, [SYSTEM, *PAIR]),
        ({**row(HUMAN, GPT), "system": "", "system_prompt": "S"}, [SYSTEM, *PAIR]),
        ({**row({"from": "system", "value": "S"}, HUMAN, GPT), "system": "T"}, [SYSTEM, *PAIR]),
        ({**row({"from": "system", "value": ""}, HUMAN, GPT), "system": "S"}, [SYSTEM, *PAIR]),
        ({"instruction": "Hi", "output": "Yo", "system": "S", "history": [["a", "b"], ["c", "d"]]},
         [SYSTEM, ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), *PAIR]),
        ({**row({"from": "system", "value": "S"}, HUMAN, GPT), "history": MESSAGES},
         [SYSTEM, *PAIR, *PAIR]),
        ({"instruction": "Hi", "output": "Yo", "system": "S",
          "history": [{"role": "system", "content": "T"}, *MESSAGES]},
         [("system", "T"), *PAIR, *PAIR]),
        ({"instruction": "Hi", "output": "Yo", "system": "S",
          "history": [{"role": "system", "content": ""}, *MESSAGES]}, [SYSTEM, *PAIR, *PAIR]),
        ({"instruction": "Hi", "context": "x", "response": "Yo"}, [("user", "Hi\n\nx"), PAIR[1]]),
        ({"instruction": None, "input": "Hi", "output": "Yo"}, PAIR),
        ({"instruction": "", "input": "Hi", "output": "Yo"}, PAIR),
        ({"instruction": "Hi", "input": [], "output": "", "response": "Yo"}, PAIR),
        ({"conversations": [], "messages": MESSAGES}, PAIR),
        ({"conversations": [{"from": None, "value": ""}], "messages": MESSAGES}, PAIR),
        (row(HUMAN, GPT, {"from": None, "value": None}, None), PAIR),  # as long as the longest
        ({"instruction": "Hi", "output": "Yo", "history": [["", None], []]}, PAIR),
        ({"instruction": "Hi", "input": {"text": None}, "output": "Yo"}, PAIR),
        ({"conversations": "", "messages": {}, "prompt": "Hi", "completion": "Yo"}, PAIR),
        (row({"from": "", "value": "", "role": "user", "content": "Hi"}, GPT), PAIR),
        (row({"from": " USER", "value": "Hi"}, {"from": "ChatGPT", "value": "Yo"}), PAIR),
        (row({"from": "developer", "value": "S"}, {"role": "Human", "content": "Hi"},
             {"from": "bing", "value": "Yo"}), [SYSTEM, *PAIR]),
        (row({"role": "Prompter", "text": "Hi"}, {"role": "chatbot", "text": "Yo"}), PAIR),
        ({"messages": [["Human", "Hi"], ["gpt", "Yo"]]}, PAIR),
        ({"messages": [["system", "S"], ["user", [{"type": "text", "text": "Hi"}]],
                       ["assistant", "Yo"]]}, [SYSTEM, *PAIR]),
        # Words that are roles, too, but in no order of turns.
        ({"conversations": [["user", "Yo"]]}, [("user", "user"), PAIR[1]]),
        ({"conversations": [["Model", "Yo"], ["AI", "Yo"]]},
         [("user", "Model"), PAIR[1], ("user", "AI"), PAIR[1]]),
        ({"messages": [{"role": "user", "content": PARTS}, MESSAGES[1]]}, PAIR),
        ({"prompt": "Hi", "response": "Yo"}, PAIR),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, PAIR),
        ({"prompt": "Hi", "chosen": MESSAGES, "rejected": []}, PAIR),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, PAIR),
        ({"system_prompt": "S", "question": "Hi", "response": "Yo"}, [SYSTEM, *PAIR]),
        ({"query": "Hi", "answer": "Yo"}, PAIR),
        ({"conversation": [{"input": "Hi", "output": "Yo"}] * 2}, PAIR * 2),
        ({"text": "Hi\n", "url": "x"}, [("text", "Hi\n")]),
        ({"text": "Hi", "conversations": None, "output": ""}, [("text", "Hi")]),
        (conversations.PlainText("Hi"), [("text", "Hi")]),
        (MESSAGES, PAIR),
    ],
)  # fmt: skip
def test_each_form_of_row(found, turns):
    assert conversations.conversation(found) == turns


NOT_UTF8 = "text is not UTF-8: cp1252 or another encoding of single bytes"
CALLS = {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
REJECTS = [
    ("row is not an object", ["Hi"]),
    ("row is not an object", None),
    ("no known column", {}),
    ("no known column", {"txt": "Hi"}),
    ("no text: in instruction, text", {"text": " ", "instruction": None}),
    ("unknown role: tool", [HUMAN, {"from": "tool", "value": "Yo"}]),
    ("not a list of turns: conversations is text", {"conversations": "Hi"}),
    ("not a list of turns: messages is an object", {"messages": {"role": "user"}}),
    ("turn is not an object: text in conversations", row(HUMAN, "Yo")),
    ("turn is not an object: a boolean in conversations", row(False)),
    ("no text: in conversations", row(None, {"from": "", "value": None}, [])),
    ("not text: output is a list", {"instruction": "Hi", "output": [0]}),
    ("unknown role: tool", row(HUMAN, {"from": "tool", "value": "Yo"})),
    ("unknown role: tool", {"messages": [["user", "Hi"], ["assistant", "Yo"], ["tool", "x"]]}),
    ("unknown role: a list", row(HUMAN, {"from": ["gpt"], "value": "Yo"})),
    ("unknown role: Function_Call", row(HUMAN, {"from": "Function_Call", "value": "{}"}, GPT)),
    ("turn without a role", row(HUMAN, {"value": "Yo"})),
    ("turn without a role", row(HUMAN, {"from": "", "value": "Yo"})),
    ("not text: conversations.value is a number", row(HUMAN, {"from": "gpt", "value": 5})),
    ("not text: output is a list", {"instruction": "Hi", "output": ["Yo"]}),
    ("not text: instruction is a number", {"instruction": 5, "output": "Yo"}),
    ("not text: answer is an object", {"question": "Hi", "answer": {"text": "Yo"}}),
    ("content is not text: type image_url",
     {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, MESSAGES[1]]}),
    ("not text: output is bytes without an encoding", {"instruction": "Hi", "output": b"Yo"}),
    ("not text: text is a tuple", {"text": ("Hi",)}),
    ("turn calls a tool: tool_calls", {"messages": [MESSAGES[0], {**MESSAGES[1], **CALLS}]}),
    ("turn calls a tool: tool_calls", {"messages": [MESSAGES[0], {"role": "assistant", **CALLS}]}),
    ("turn calls a tool: function_call", row(HUMAN, {"from": "gpt", "function_call": {"a": "b"}})),
    ("unknown role: tool", {"messages": [{**MESSAGES[1], **CALLS}, {"role": "tool"}]}),
    ("no answer: to instruction", {"instruction": "Hi"}),
    ("no answer: to instruction", {"instruction": "Hi", "output": "", "text": "Below is Hi"}),
    ("no question: of output", {"instruction": "", "input": None, "output": "Yo"}),
    ("no turns", row({"from": "system", "value": "S"})),
    ("does not begin with the user", row(GPT)),
    ("does not begin with the user", row(GPT, HUMAN, GPT)),
    ("turns do not alternate", row(HUMAN, HUMAN, GPT)),
    ("turns do not alternate", row(HUMAN, GPT, {"from": "system", "value": "S"}, HUMAN, GPT)),
    ("empty turn: user", row({"from": "human", "value": ""}, GPT)),
    ("empty turn: assistant", row(HUMAN, {"from": "gpt"})),
    ("empty turn: assistant", row(HUMAN, {"from": "gpt", "value": " \n"})),
    ("empty turn: text", conversations.PlainText(" ")),
    ("does not end with an answer", row(HUMAN)),
    ("does not end with an answer", row(HUMAN, GPT, HUMAN)),
    ("text is not valid Unicode: a lone surrogate", row(HUMAN, {"from": "gpt", "value": "\ud800"})),
    (NOT_UTF8, row({"from": "system", "value": "caf\udce9"}, HUMAN, GPT)),
    (NOT_UTF8, {"text": "\udc80"}),
    ("line is not JSON", conversations.Reject("line is not JSON")),
    ("row cannot be read: date", conversations.Reject("row cannot be read", "date")),
    ("spaces without end", row(HUMAN, {"from": "gpt", "value": "x" + "\n " * 500_000 + "x"})),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "found"), REJECTS, ids=lambda value: repr(value)[:80])
def test_each_reason_to_reject(reason, found):
    with pytest.raises(conversations.Reject) as reject:
        conversations.conversation(found)
    assert str(reject.value) == reason


def test_no_reason_is_left_untested():
    folder = REPO / "nanosynth/data"
    text = "".join((folder / f"{name}.py").read_text() for name in ("conversations", "formats"))
    reasons = set(re.findall(r'Reject\("(.+?)"[,)]', text))
    assert reasons == {reason.partition(":")[0] for reason, _ in REJECTS}


@pytest.mark.parametrize(
    ("found", "unused"),
    [
        ({**row(HUMAN, GPT), "id": "x", "source": "s", "n": 5, "hash": [1, 2], "none": ""}, {"id"}),
        ({**row({"from": "system", "value": "S"}, HUMAN, GPT), "system": "T"}, {"system"}),
        ({**row({"from": "system", "value": "S"}, HUMAN, GPT), "system": "S"}, set()),
        (row(HUMAN, {**GPT, "thinking": "Hm", "weight": 1.0}), {"conversations.thinking"}),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, {"rejected"}),
        ({"prompt": "Hi", "chosen": MESSAGES}, set()),
        ({"prompt": "Hello", "chosen": MESSAGES}, {"prompt"}),
        ({"instruction": "Hi", "output": "Yo", "response": "Ya", "text": "Hi Yo"},
         {"response", "text"}),
        ({"text": "Hi", "meta": {"url": ["u"]}, "system": "S"}, {"meta", "system"}),
    ],
)  # fmt: skip
def test_columns_that_hold_text_in_vain_are_named(found, unused):
    said = set()
    conversations.conversation(found, unused=said)
    assert said == unused


def test_columns_as_the_user_names_them():
    columns = conversations.named_columns("user=question, assistant=reply,system=persona")
    found = {"question": "Hi", "reply": "Yo", "persona": "S", "system": "T", "messages": [1]}
    unused = set()
    assert conversations.conversation(found, columns, unused) == [SYSTEM, *PAIR]
    assert unused == {"system"}
    assert conversations.named(columns) == {"reply", "persona"}
    columns = conversations.named_columns("turns=dialog,role=speaker,content=said,system=")
    turns = [{"speaker": "human", "said": "Hi"}, {"speaker": "ai", "said": "Yo"}]
    found = {"dialog": turns, "system": "S"}
    assert conversations.conversation(found, columns) == PAIR
    found = {"output": "b", "response": "Yo", "prompt": "Hi"}
    columns = conversations.named_columns("assistant=response")
    assert conversations.conversation(found, columns) == PAIR
    columns = conversations.named_columns("turns=talk,user=ask,assistant=say")
    assert conversations.conversation({"talk": [{"ask": "Hi", "say": "Yo"}]}, columns) == PAIR
    assert conversations.named(columns) == {"talk"}
    columns = conversations.named_columns("user=ask,user=query,assistant=say")
    for ask in ({"ask": "Hi", "query": "x"}, {"query": "Hi"}):
        assert conversations.conversation({**ask, "say": "Yo"}, columns) == PAIR
    assert conversations.conversation({"body": "Hi"}, conversations.named_columns("text=body"))
    for wrong in ("question", "asker=question", "user:question"):
        with pytest.raises(UserError, match="--columns=.*wanted USE=COLUMN.*user, input, assist"):
            conversations.named_columns(wrong)


def test_names_of_a_row():
    assert conversations.names_of({"source": "s", "category": "c"}, "f") == ("s", "c")
    assert conversations.names_of({"source": " ", "category": 5}, "f") == ("f", "(not given)")
    assert conversations.names_of(conversations.PlainText("x"), "f") == ("f", "(not given)")


def test_first_words():
    assert conversations.first_words(chat_row("  Hi\n there ")) == "Hi there"
    assert conversations.first_words({"source": "s", "instruction": "Do"}) == "Do"
    assert conversations.first_words({"a": [{"b": "deep"}]}) == "deep"
    assert (
        conversations.first_words(conversations.Reject("line is not JSON", words="{broken \udcff"))
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
