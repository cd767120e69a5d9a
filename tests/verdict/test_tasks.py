"""lm_eval on a run, against our own likelihoods; the local tasks' data."""

import importlib.util
import json
import socket
from collections import Counter

import numpy as np
import pytest
import torch

from nanosynth import checkpoint, tokenizer
from nanosynth.inference import likelihood
from tiny import CPU, tiny_model
from verdict import LOCAL_TASKS, TASKS_DIR, tasks


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS_DIR / f"{name}.jsonl").read_text().splitlines()]


def length_guess(items: list[dict], pick) -> float:
    """The score of always taking the shortest or longest choice, ties shared out."""
    total = 0.0
    for item in items:
        lengths = [len(choice) for choice in item["choices"]]
        best = [k for k, length in enumerate(lengths) if length == pick(lengths)]
        total += (item["answer"] in best) / len(best)
    return total / len(items)


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_local_tasks_give_nothing_away(name):
    items = read(name)
    assert len(items) >= 100
    asked = [item.get("question") or item["context"] for item in items]
    assert len(set(asked)) == len(asked)
    for item in items:
        assert len(item["choices"]) == 4 == len({choice.lower() for choice in item["choices"]})
        assert all(choice == choice.strip() != "" for choice in item["choices"])
    places = Counter(item["answer"] for item in items)
    assert set(places) == {0, 1, 2, 3} and max(places.values()) - min(places.values()) <= 1
    assert 0.2 < length_guess(items, min) < 0.3 and 0.2 < length_guess(items, max) < 0.3


def test_reasoning_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("script", TASKS_DIR / "make_reasoning.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.text() == (TASKS_DIR / "reasoning.jsonl").read_text()


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def model_and_run(tmp_path_factory):
    """A model with next tokens that differ much in probability, and its run."""
    model = tiny_model(vocab_size=tokenizer.VOCAB_SIZE, block_size=64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    run = tmp_path_factory.mktemp("run")
    identity = {"model": vars(model.config), "data_sha256": None}
    meta = {"val_loss": 1.0, "identity": identity, "settings": {"data_dir": ""}}
    checkpoint.save(run, 7, model=model.state_dict(), train_state={}, meta=meta)
    return model, str(run)


@pytest.fixture(scope="module")
def lm(model_and_run):
    return tasks.as_lm(model_and_run[1], "best", CPU, torch.float32, 16)


def by_hand(model, name: str, n: int, chat_format: bool) -> tuple[float, float]:
    """The shares of the first items whose right choice is the likeliest: whole, and a character.

    In chat format lm_eval scores the newline that ends the prompt with the choice.
    """
    encode = tokenizer.encoding().encode_ordinary
    right, right_a_character = 0, 0
    for item in read(name)[:n]:
        asked = item.get("context") or f"Question: {item['question']}\nAnswer:"
        context, before = encode(asked), " "
        if chat_format:
            context, before = tokenizer.prompt_ids([("user", asked)])[:-1], "\n"
        pairs = [(context, encode(before + choice)) for choice in item["choices"]]
        values = np.array([value for value, _ in likelihood.score(model, pairs, 4)])
        lengths = [len(choice) for choice in item["choices"]]
        right += int(np.argmax(values)) == item["answer"]
        right_a_character += int(np.argmax(values / lengths)) == item["answer"]
    return right / n, right_a_character / n


@pytest.mark.parametrize("chat_format", [False, True])
def test_local_tasks_equal_our_likelihoods_offline_and_from_any_folder(
    offline, monkeypatch, tmp_path, model_and_run, lm, chat_format
):
    monkeypatch.chdir(tmp_path)
    figures, not_run = tasks.measure(lm, list(LOCAL_TASKS), limit=25, chat_format=chat_format)
    assert list(figures) == list(LOCAL_TASKS) and not_run == []
    for name, scored in figures.items():
        assert scored["metric"] == "acc_norm" and scored["chance"] == 0.25 and scored["n"] == 25
        assert scored["stderr"] > 0 and scored["asked_as"] == name
        acc, acc_norm = by_hand(model_and_run[0], name, 25, chat_format)
        assert scored["metrics"]["acc"] == pytest.approx(acc)
        assert scored["score"] == pytest.approx(acc_norm) == np.mean(scored["scores"])
        assert len(scored["scores"]) == 25


def test_unknown_and_unreachable_tasks_are_said_in_one_line(monkeypatch, lm):
    class Unreachable:
        all_tasks = ("hellaswag",)

        def __init__(self, **_: object):
            pass

        def load(self, names: list[str]):
            raise ConnectionError("Couldn't reach the hub\nand more lines")

    monkeypatch.setattr(tasks, "TaskManager", Unreachable)
    figures, not_run = tasks.measure(lm, ["quetsions", "hellaswag"], limit=1, chat_format=False)
    assert figures == {} and len(not_run) == 2
    assert "no task 'quetsions'; wanted questions, completion" in not_run[0]
    assert "(ConnectionError: Couldn't reach the hub)" in not_run[1] and "\n" not in not_run[1]
