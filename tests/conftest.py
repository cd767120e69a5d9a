"""One torch thread, and tiny prepared bins for the whole session."""

import signal

import pytest
import torch

import prepare
from tiny import chat_row, train_run, write_jsonl

torch.set_num_threads(1)
# nohup's SIG_IGN would be handed on to what the tests start, and a run heeds it; a handler is not.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="session")
def conversations_file(tmp_path_factory):
    rows = []
    for number in range(200):
        row = chat_row(f"What is {number} plus {number % 7}?", f"It is {number + number % 7}.")
        if number % 5 == 0:
            row["conversations"].insert(0, {"from": "system", "value": "Be exact."})
        if number % 3 == 0:
            row["conversations"] += chat_row("And doubled?", f"{2 * number}")["conversations"]
        rows.append(row)
    return write_jsonl(tmp_path_factory.mktemp("source") / "conversations.jsonl", rows)


@pytest.fixture(scope="session")
def tiny_bins(tmp_path_factory, conversations_file):
    data_dir = tmp_path_factory.mktemp("data") / "tiny"
    config = prepare.PrepareConfig(
        source=(str(conversations_file),), data_dir=str(data_dir), val_fraction=0.1, num_threads=1
    )
    prepare.main(config)
    return str(data_dir)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, tiny_bins):
    """A finished run of six steps; tests that change it take a copy."""
    out_dir = tmp_path_factory.mktemp("out") / "tiny"
    train_run(tiny_bins, out_dir, save_interval=3, eval_interval=3)
    return out_dir
