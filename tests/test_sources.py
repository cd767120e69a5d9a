import itertools
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from tiny import REPO, chat_row, write_jsonl

from nanosynth import UserError, sources, synthetic

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
    assert sources.conversation(found) == turns


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
    ("line is not JSON", sources.Reject("line is not JSON")),
]


@pytest.mark.parametrize(("reason", "found"), REJECTS, ids=repr)
def test_each_reason_to_reject(reason, found):
    with pytest.raises(sources.Reject) as reject:
        sources.conversation(found)
    assert str(reject.value) == reason


def test_no_reason_is_left_untested():
    text = (REPO / "nanosynth/sources.py").read_text()
    assert set(re.findall(r'Reject\("(.+?)"\)', text)) == {reason for reason, _ in REJECTS}


ROWS = [chat_row(f"Question {number}?", "Ünïcode ✓") for number in range(5)]


def check_rows(source: sources.Source) -> None:
    """All rows, twice, with the position at the end."""
    for _ in range(2):
        assert [sources.conversation(found) for found in source.rows()] == [
            sources.conversation(wanted) for wanted in ROWS
        ]
        assert source.position == source.size


def test_jsonl(tmp_path):
    source = sources.open_source(str(write_jsonl(tmp_path / "rows.jsonl", ROWS)))
    check_rows(source)
    assert source.identity["source"] == "rows.jsonl" and len(source.identity["sha256"]) == 64


def test_jsonl_with_malformed_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0])
    path.write_bytes(
        b"\xef\xbb\xbf" + f"{good}\n\n  \n{good[:-3]}\nnot json\n{'[' * 100_000}\n".encode()
        + b"\xff\xfe\n" + good.encode()
    )  # fmt: skip
    found = list(sources.open_source(str(path)).rows())
    assert [isinstance(item, sources.Reject) for item in found] == [False, *[True] * 4, False]
    assert {str(item) for item in found[1:5]} == {"line is not JSON"}


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf", b"\n  "])
def test_json_array(tmp_path, prefix):
    path = tmp_path / "rows.json"
    path.write_bytes(prefix + json.dumps(ROWS, indent=1).encode())
    check_rows(sources.open_source(str(path)))


def test_json_file_of_json_lines(tmp_path):
    check_rows(sources.open_source(str(write_jsonl(tmp_path / "rows.json", ROWS))))


def test_broken_json_array_says_where(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS)[:-20])
    with pytest.raises(UserError, match=r"rows.json: broken JSON after 4 rows, near byte \d+ of"):
        list(sources.open_source(str(path)).rows())


@pytest.mark.parametrize("content", ["", "5", '"text"'])
def test_json_that_is_no_array_is_refused(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError, match="wanted a JSON array of rows"):
        list(sources.open_source(str(path)).rows())


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    check_rows(sources.open_source(str(path)))


def test_broken_parquet_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a readable parquet file"):
        list(sources.open_source(str(path)).rows())


@pytest.mark.parametrize("name", ["sampel", "missing.jsonl", "data/missing.json", "a/b/c", "."])
def test_a_source_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match="no source .*; wanted 'sample', a .json, .jsonl, .parquet"):
        sources.open_source(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n")
    with pytest.raises(UserError, match="cannot read .*rows.csv; wanted one of .json, .jsonl"):
        sources.open_source(str(path))


def test_synthetic_conversations_are_accepted_and_deterministic():
    rows = list(synthetic.conversations(50))
    assert len(rows) == 50 and rows == list(synthetic.conversations(50))
    assert all(sources.conversation(found) for found in rows)


def test_sample_source():
    source = sources.open_source("sample")
    found = list(itertools.islice(source.rows(), 50))
    assert found == list(itertools.islice(synthetic.conversations(source.size), 50))
    assert source.position == 50 and source.unit == "rows"
