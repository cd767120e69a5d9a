"""What `make clients` counts; the clients themselves are not here."""

import subprocess
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
    stops = "50256, 50258"
    assert same == ["us", "1", "2 of 2", "1 of 1", "2.000000", "2.000000", stops, "2 of 2"]
    other = {"version": "2", "greedy": [[1, 2], [4]], "answered": [[5, 6], [7]], "ours": 4.0}
    found = compare.row("them", other | {"masks": [[1, 1], [1]], "perplexity": 3.0}, OURS)
    assert found == ["them", "2", "1 of 2", "-", "3.000000", "4.000000", "-", "1 of 2"]
    failed = compare.row("who", {"failed": "no module"}, OURS)
    assert failed == ["who", "FAILED: no module", *["-"] * 6]
    said = " ".join(compare.summary([same, found, failed]).split())
    assert said.startswith("In all, 3 of 4 greedy answers, 1 of 1 prompts, and 3 of 4 ids and")
    assert said.endswith("are within 2.5e-01 of ours, relatively. who failed.")


def test_a_table_of_failures_alone_is_summed_up():
    failed = compare.row("who", {"failed": "no network"}, OURS)
    said = " ".join(compare.summary([failed]).split())
    assert said.startswith("In all, 0 of 0 greedy answers, 0 of 0 prompts, and 0 of 0 ids")
    assert said.endswith("who failed.")


def test_a_client_that_cannot_be_installed_is_said(tmp_path, monkeypatch):
    def run(command: list, **options) -> None:
        if "install" in command:
            raise subprocess.CalledProcessError(1, command, stderr=b"Looking\nNo such version\n")

    (tmp_path / "vllm").mkdir()
    monkeypatch.setattr(subprocess, "run", run)
    assert compare.ask("vLLM, CPU", tmp_path, tmp_path) == {"failed": "No such version"}
    assert not (tmp_path / "vllm/requirements.txt").exists()  # so it is tried again


def test_turns_are_read_back_out_of_a_prompt():
    turns = [("system", "Be\nbrief."), ("user", "\n\nHi"), ("assistant", ""), ("user", "a\n")]
    assert compare.read_turns(tokenizer.decode(tokenizer.prompt_ids(turns))) == turns
