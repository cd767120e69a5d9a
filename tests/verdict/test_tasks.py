"""Likelihoods, and the model behind lm_eval, against direct computation; the local tasks' data."""

import importlib.util
import json
import socket
from collections import Counter

import numpy as np
import pytest
import torch

from nanosynth import UserError, tokenizer
from nanosynth.inference import likelihood
from tiny import REPO, tiny_model
from verdict import tasks

TASKS_DIR = REPO / "data" / "tasks"


def chat_model():
    """Of the whole vocabulary, with next tokens that differ much in probability."""
    model = tiny_model(vocab_size=tokenizer.VOCAB_SIZE, block_size=24).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    return model


def direct(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward a token, each with as much context as fits."""
    total, greedy = 0.0, True
    ids = [*context, *continuation][-(model.config.block_size + 1) :]
    for place in range(len(ids) - len(continuation), len(ids)):
        logits = model(torch.tensor([ids[:place]]))[-1].detach().double()
        total += torch.log_softmax(logits, dim=0)[ids[place]].item()
        greedy &= int(logits.argmax()) == ids[place]
    return total, greedy


def test_score_equals_a_direct_computation():
    model = chat_model()
    ids = np.random.default_rng(0).integers(0, tokenizer.N_IDS, 200).tolist()
    pairs = [(ids[k : k + 1 + k % 7], ids[50 + k : 51 + k + k % 3]) for k in range(9)]
    likely = int(model(torch.tensor([ids[:5]]))[-1].argmax())
    pairs += [(ids[:5], [likely]), (ids[:5], [likely ^ 1])]
    wanted = [direct(model, *pair) for pair in pairs]
    assert [greedy for _, greedy in wanted[-2:]] == [True, False]
    for batch_size in (1, 4, 100):
        found = likelihood.score(model, pairs, batch_size)
        assert [v for v, _ in found] == pytest.approx([v for v, _ in wanted], rel=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert likelihood.score(model, [], 4) == []


def test_batches_are_limited_in_rows_and_in_scored_tokens(monkeypatch):
    monkeypatch.setattr(likelihood, "MAX_TARGETS", 10)
    pairs = [([1], [1] * n) for n in (3, 12, 4, 6, 1, 1, 1)]
    assert likelihood.batches(pairs, 3) == [[1], [3, 2], [0, 4, 5], [6]]
    assert likelihood.batches([], 3) == []


@pytest.mark.parametrize(("n_context", "n_continuation"), [(22, 3), (30, 3), (60, 24), (5, 24)])
def test_what_exceeds_the_context_is_cut_on_the_left(n_context, n_continuation):
    model = chat_model()
    ids = np.random.default_rng(1).integers(0, tokenizer.N_IDS, 100).tolist()
    context, continuation = ids[:n_context], ids[n_context : n_context + n_continuation]
    kept, scored = likelihood.fit((context, continuation), 24)
    assert kept == context[-(25 - n_continuation) :] and scored == continuation
    found = likelihood.score(model, [(context, continuation)], 1)[0]
    assert found[0] == pytest.approx(direct(model, context, continuation)[0], rel=1e-5)


def requests(kind: str, *arguments: tuple) -> list[tasks.Instance]:
    return [tasks.Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


def test_loglikelihood_through_the_harness():
    model = chat_model()
    encode = tokenizer.encoding().encode_ordinary
    pairs = [
        ("The capital of France is", " Paris"),
        ("A b c ", "d e"),
        ("", "Hi"),
        ("a " * 40, "b"),
    ]
    wanted = [
        direct(model, encode("The capital of France is"), encode(" Paris")),
        direct(model, encode("A b c"), encode(" d e")),  # a space belongs to the word behind it
        direct(model, [tokenizer.END_OF_TEXT], encode("Hi")),
        direct(model, encode("a " * 39 + "a"), encode(" b")),
    ]
    lm = tasks.HarnessLM(model, batch_size=3)
    found = lm.loglikelihood(requests("loglikelihood", *pairs))
    assert [v for v, _ in found] == pytest.approx([v for v, _ in wanted], rel=1e-5)
    long = " ".join(f"word{k}" for k in range(20))
    assert len(encode(f" {long}")) > 24  # more than the context: scored in two pieces
    pieces = [encode(f" {long}")[:24], encode(f" {long}")[24:]]
    value = direct(model, encode("Say"), pieces[0])[0]
    value += direct(model, encode("Say") + pieces[0], pieces[1])[0]
    found = lm.loglikelihood(requests("loglikelihood", ("Say", f" {long}")))
    assert found[0][0] == pytest.approx(value, rel=1e-5)
    in_chat = tasks.HarnessLM(model, batch_size=3, chat_format=True)
    found = in_chat.loglikelihood(requests("loglikelihood", ("Hi", " Yo")))
    prompt = tokenizer.prompt_ids([("user", "Hi")])
    assert found[0][0] == pytest.approx(direct(model, prompt, encode("Yo"))[0], rel=1e-5)


def test_rolling_likelihood_scores_each_token_once():
    """Windows without overlap, the first behind <|endoftext|>, the last with a full context."""
    model = chat_model()
    text = " ".join(f"word{k}" for k in range(30))
    ids = tokenizer.encoding().encode_ordinary(text)
    assert len(ids) > 2 * 24 and len(ids) % 24
    padded = [tokenizer.END_OF_TEXT, *ids]
    wanted = 0.0
    for start in range(0, len(ids), 24):
        stop = min(start + 24, len(ids))
        first = stop - 24 if start else 0
        context, continuation = padded[first : start + 1], ids[start:stop]
        wanted += direct(model, context, continuation)[0]
    lm = tasks.HarnessLM(model, batch_size=2)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("Hi",)))
    assert found[0] == pytest.approx(wanted, rel=1e-5)
    assert found[1] == pytest.approx(
        direct(model, [tokenizer.END_OF_TEXT], tokenizer.encoding().encode_ordinary("Hi"))[0],
        rel=1e-5,
    )


def test_generate_until_stops_at_the_string():
    model = chat_model()
    lm = tasks.HarnessLM(model, batch_size=2)
    greedy = {"max_gen_toks": 12, "do_sample": False}
    contexts = ["Hello there", "One two three four", "a " * 40]
    whole = lm.generate_until(
        requests("generate_until", *[(context, {**greedy, "until": []}) for context in contexts])
    )
    ids = list(tokenizer.encoding().encode_ordinary(contexts[0]))
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[-1, : tokenizer.N_IDS].argmax()))
    assert whole[0] == tokenizer.decode(ids[-12:]) and all(whole)
    stop = whole[0][3:5]
    cut = lm.generate_until(requests("generate_until", (contexts[0], {**greedy, "until": stop})))
    assert cut == [whole[0].split(stop)[0]]


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


@pytest.mark.parametrize("name", tasks.LOCAL_TASKS)
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


def test_local_tasks_run_offline_and_from_any_folder(offline, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = chat_model()
    lm = tasks.HarnessLM(model, batch_size=16)
    figures = {}
    for name in tasks.LOCAL_TASKS:
        figures |= tasks.measure(lm, tasks.load(name, TASKS_DIR), limit=10)
    assert list(figures) == list(tasks.LOCAL_TASKS)
    for name, found in figures.items():
        assert found["metric"] == "acc_norm" and found["chance"] == 0.25 and found["n"] == 10
        assert 0 < found["stderr"] < 0.2 or found["score"] in (0.0, 1.0)
        assert found["metrics"]["acc"] == pytest.approx(by_hand(model, name, 10))


def by_hand(model, name: str, n: int) -> float:
    """The share of the first items whose right choice is the likeliest."""
    encode = tokenizer.encoding().encode_ordinary
    right = 0
    for item in read(name)[:n]:
        asked = item.get("context") or f"Question: {item['question']}\nAnswer:"
        values = [direct(model, encode(asked), encode(f" {c}"))[0] for c in item["choices"]]
        right += int(np.argmax(values)) == item["answer"]
    return right / n


class Unreachable:
    all_tasks = ("hellaswag",)

    def load(self, names: list[str]):
        raise ConnectionError("Couldn't reach the hub\nand more lines")


def test_unknown_and_unreachable_tasks_are_said_in_one_line(monkeypatch):
    monkeypatch.setattr(tasks, "_manager", Unreachable)
    with pytest.raises(UserError, match="no task 'quetsions'; wanted questions, completion"):
        tasks.load("quetsions", TASKS_DIR)
    with pytest.raises(UserError) as error:
        tasks.load("hellaswag", TASKS_DIR)
    assert "look at the network or its cache (ConnectionError: Couldn't reach" in str(error.value)
    assert "\n" not in str(error.value)
