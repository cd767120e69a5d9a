import json

import pytest

from data import make_sample
from nanosynth import UserError, settings, tokenizer
from nanosynth.data import conversations, sources
from tiny import REPO


def test_synthetic_conversations_are_accepted_and_deterministic():
    found = list(make_sample.conversations(50))
    assert len(found) == 50 and found == list(make_sample.conversations(50))
    assert all(conversations.conversation(row) for row in found)


def test_two_conversations_fill_a_row_of_the_demo():
    rows = list(make_sample.conversations(300))
    turns = [conversations.conversation(row) for row in rows]
    assert {len(ids) for ids, _ in tokenizer.encode_conversations(turns)} == {make_sample.LENGTH}
    block_size = settings.read_config(str(REPO / "config/demo.py"))["block_size"]
    assert block_size == 2 * make_sample.LENGTH
    assert {row["category"] for row in rows} == {kind.__name__ for kind in make_sample.KINDS}
    questions = [next(text for role, text in parts if role == "user") for parts in turns]
    assert len(set(questions)) == 300


def test_the_file_is_read_like_any_other(tmp_path, capsys):
    path = tmp_path / "new" / "my own.jsonl"
    make_sample.main(make_sample.SampleDataConfig(to=str(path), num_rows=50, seed=7))
    assert list(sources.open_sources([str(path)]).rows()) == list(make_sample.conversations(50, 7))
    assert json.loads(path.read_text().splitlines()[0])["source"] == make_sample.SOURCE
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"50 conversations in {path};")
    assert said[1] == f"python prepare.py '--source={path}' '--data_dir=data/my own'"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--to=.* cannot be written"):
        make_sample.main(make_sample.SampleDataConfig(to=str(tmp_path), num_rows=1))
