"""What `make clients` counts; the clients themselves are not here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import compare

from nanosynth import tokenizer

OURS = {
    "greedy": [[1, 2], [3]],
    "prompts": [[4]],
    "answered": [[5, 6], [7]],
    "masks": [[0, 1], [1]],
    "perplexity": 2.0,
    "stops": [50256, 50258],
}


def test_a_row_counts_what_is_equal():
    same = compare.row("us", OURS | {"version": "1"}, OURS)
    assert same == ["us", "1", "2 of 2", "1 of 1", "2.000000", "50256, 50258", "2 of 2"]
    other = {"version": "2", "greedy": [[1, 2], [4]], "answered": [[5, 6], [7]]}
    found = compare.row("them", other | {"masks": [[1, 1], [1]]}, OURS)
    assert found == ["them", "2", "1 of 2", "-", "-", "-", "1 of 2"]
    failed = compare.row("them", {"failed": "no module"}, OURS)
    assert failed == ["them", "FAILED: no module", *["-"] * 5]


def test_a_client_that_is_not_installed_is_said(tmp_path):
    found = compare.ask("vLLM, CPU", tmp_path, tmp_path, tmp_path)
    assert "No such file or directory" in found["failed"]


def test_turns_are_read_back_out_of_a_prompt():
    turns = [("system", "Be\nbrief."), ("user", "\n\nHi"), ("assistant", ""), ("user", "a\n")]
    assert compare.read_turns(tokenizer.decode(tokenizer.prompt_ids(turns))) == turns
