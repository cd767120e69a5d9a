import json

from data import make_sample
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
    assert capsys.readouterr().out == f"50 conversations in {path}\n"
