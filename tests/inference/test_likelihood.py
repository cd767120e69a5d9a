"""Likelihoods against direct computation."""

import numpy as np
import pytest
import torch

from nanosynth import tokenizer
from nanosynth.inference import likelihood
from tiny import tiny_model


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


def test_widths_are_rounded_up_to_the_context():
    widths = []
    model = tiny_model(vocab_size=tokenizer.VOCAB_SIZE, block_size=80).eval()
    model.register_forward_pre_hook(lambda _, arguments: widths.append(arguments[0].shape[1]))
    pairs = [([1] * n, [2]) for n in (80, 65, 64, 40, 33, 32, 3)]
    likelihood.score(model, pairs, batch_size=1)
    assert widths == [80, 80, 64, 64, 64, 32, 32]


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
