import json

import pytest

from data import make_sample
from nanosynth import UserError
from nanosynth.data import conversations, sources


def test_synthetic_conversations_are_accepted_and_deterministic():
    found = list(make_sample.conversations(50))
    assert len(found) == 50 and found == list(make_sample.conversations(50))
    assert all(conversations.conversation(row) for row in found)


def test_the_file_is_read_like_any_other(tmp_path, capsys):
    path = tmp_path / "new" / "sample.jsonl"
    make_sample.main(make_sample.SampleDataConfig(to=str(path), num_rows=50, seed=7))
    assert list(sources.open_sources([str(path)]).rows()) == list(make_sample.conversations(50, 7))
    assert json.loads(path.read_text().splitlines()[0])["source"] == make_sample.SOURCE
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"50 conversations in {path};")
    assert said[1] == f"python prepare.py --source={path} --data_dir=data/demo"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--to=.* cannot be written"):
        make_sample.main(make_sample.SampleDataConfig(to=str(tmp_path), num_rows=1))
