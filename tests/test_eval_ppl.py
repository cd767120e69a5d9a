import json
import math
import shutil

import numpy as np
import pytest
import torch

import eval_ppl
from nanosynth import UserError, files, tokenizer
from nanosynth.data import bins
from tiny import ALONE, tiny_model


@pytest.mark.parametrize("n_tokens", [2, 3, 16, 17, 18, 50, 65])
@pytest.mark.parametrize("stride", [1, 3, 8, 16])
def test_windows_score_each_token_but_the_first_once(n_tokens, stride):
    scored = []
    for start, end, n_scored in eval_ppl.windows(n_tokens, 16, stride):
        assert 0 <= start < end <= n_tokens - 1 and end - start <= 16
        assert 1 <= n_scored <= min(stride, end - start)
        scored += range(end - n_scored + 1, end + 1)
    assert scored == list(range(1, n_tokens))


def test_windows_give_each_token_its_context():
    found = eval_ppl.windows(8, block_size=4, stride=2)
    assert found == [(0, 2, 2), (0, 4, 2), (2, 6, 2), (4, 7, 1)]


@pytest.mark.parametrize(("stride", "batch_size"), [(16, 3), (16, 1), (5, 4), (1, 8)])
def test_score_equals_a_naive_loop(stride, batch_size):
    model = tiny_model().eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10)
    ids = np.random.default_rng(0).integers(0, 64, 71)
    wanted = []
    for place in range(1, 71):
        first = (place - 1) // stride * stride
        context = torch.from_numpy(ids[max(0, first + stride - 16) : place])[None]
        log_probabilities = torch.log_softmax(model(context)[-1].detach(), dim=0)
        wanted.append(-log_probabilities[ids[place]].item())
    found = eval_ppl.score(
        model, ids, ALONE, stride=stride, batch_size=batch_size, dtype=torch.float32
    )
    assert found == pytest.approx(np.array(wanted), rel=1e-4, abs=1e-5)


def test_perplexity_by_hand():
    # Two documents of three tokens: "Hi" " Hi" end; the first token of all is not scored.
    ids = np.array([17250, 15902, tokenizer.END_OF_TEXT] * 2)
    mask = np.array([0, 1, 0, 0, 1, 0], dtype=np.uint8)
    assert tokenizer.token_bytes()[ids].tolist() == [2, 3, 0] * 2
    losses = np.log([2.0, 4.0, 8.0, 2.0, 16.0])
    found = eval_ppl.figures(losses, ids[1:], mask[1:], seed=0)
    assert found["all"]["perplexity"] == pytest.approx(2 ** (11 / 5))
    assert found["all"]["loss"] == pytest.approx(11 / 5 * math.log(2))
    assert found["all"]["bits_per_byte"] == pytest.approx(11 / 8)
    assert found["all"]["tokens"] == 5
    assert found["assistant"]["perplexity"] == pytest.approx(2.0)
    assert found["assistant"]["bits_per_byte"] == pytest.approx(2 / 6)
    assert found["assistant"]["tokens"] == 2 and found["documents"] == 2


def test_figures_by_source_by_hand():
    """Of 25 sources the 20 largest are told apart; intervals are over a source's own documents."""
    generator, sizes = np.random.default_rng(0), np.arange(25, 0, -1)
    numbers = np.repeat(np.arange(25), sizes)
    generator.shuffle(numbers)
    names = [f"s{n}" for n in range(25)]
    ids = np.array([17250, 15902, tokenizer.END_OF_TEXT] * len(numbers))
    mask = np.array([0, 1, 0] * len(numbers), dtype=np.uint8)
    losses = np.repeat(1.0 + numbers / 10, 3)[1:]
    labels = {"source": (names, numbers), "category": (["c"], np.zeros_like(numbers))}
    found = eval_ppl.by_label(losses, ids, mask, labels, seed=0)
    assert list(found["by_source"])[-1] == "5 others" and len(found["by_source"]) == 21
    first = int(numbers[0])  # its first token is not scored
    assert sum(of["all"]["tokens"] for of in found["by_source"].values()) == len(losses)
    for n in range(20):
        of = found["by_source"][f"s{n}"]
        assert of["all"]["loss"] == pytest.approx(1 + n / 10)
        assert of["all"]["perplexity_95"] == pytest.approx([math.exp(1 + n / 10)] * 2)
        assert of["all"]["tokens"] == 3 * (25 - n) - (n == first) and of["documents"] == 25 - n
        assert of["assistant"]["tokens"] == 25 - n
        assert of["assistant"]["bits_per_byte"] == pytest.approx((1 + n / 10) / math.log(2) / 3)
    others = found["by_source"]["5 others"]
    assert others["documents"] == 15 and others["all"]["tokens"] == 45 - (first >= 20) * 1
    low, high = others["all"]["perplexity_95"]
    assert low < others["all"]["perplexity"] < high
    assert (
        found["by_category"]["c"]["all"]
        == eval_ppl.figures(losses, ids[1:], mask[1:], seed=0)["all"]
    )


def interval_of(losses: list[float], n_documents: int) -> list[float]:
    """Of documents of like length."""
    ids = np.zeros(len(losses), dtype=np.int64)
    ids[len(losses) // n_documents - 1 :: len(losses) // n_documents] = tokenizer.END_OF_TEXT
    return eval_ppl.figures(np.array(losses), ids, np.zeros(len(ids)), 0)["all"]["perplexity_95"]


def test_bootstrap_interval_contains_the_value_and_narrows():
    generator = np.random.default_rng(0)
    widths = []
    for n_documents in (20, 500):
        losses = np.repeat(generator.normal(3.0, 0.5, n_documents), 10)
        low, high = interval_of(losses, n_documents)
        assert low < math.exp(losses.mean()) < high
        widths.append(high - low)
    # The interval of a mean over 500 documents, by the normal approximation.
    assert widths[1] == pytest.approx(2 * 1.96 * 0.5 / 500**0.5 * math.exp(3.0), rel=0.15)
    assert widths[0] > 3 * widths[1]


def test_bootstrap_resamples_documents_and_not_tokens():
    low, high = interval_of(np.repeat([1.0, 3.0], 1000), 2)
    assert (low, high) == (pytest.approx(math.exp(1.0)), pytest.approx(math.exp(3.0)))


def test_a_bootstrap_keeps_what_is_paired():
    """Each unit's two figures differ by 1 exactly: so does every resample, however they spread."""
    first = np.random.default_rng(0).normal(0, 100, 50)
    pairs = np.stack([first + 1, first, np.ones(50)], axis=1)
    found = eval_ppl.bootstrap(pairs, lambda own, other, n: (own - other) / n)
    assert found == pytest.approx([1.0, 1.0])
    low, high = eval_ppl.bootstrap(pairs, lambda own, other, n: own / n)
    wanted = 1.96 * first.std() / 50**0.5  # the interval of a mean by the normal distribution
    assert (high - low) / 2 == pytest.approx(wanted, rel=0.15) and low < first.mean() + 1 < high


def test_whole_evaluation(tiny_bins, run_dir, tmp_path, capsys):
    out_dir = shutil.copytree(run_dir, tmp_path / "run")
    results = []
    for changes in ({}, {"batch_size": 1}, {"stride": 4}):
        config = eval_ppl.EvalConfig(run=str(out_dir), dtype="float32", device="cpu", **changes)
        eval_ppl.main(config)
        results.append(json.loads((out_dir / "eval_ppl.json").read_text()))
    plain, one_by_one, overlapping = results
    parts = ("all", "assistant", "documents")
    split = bins.Split(tiny_bins, "val")
    assert plain["all"]["tokens"] == split.n_tokens - 1
    assert plain["assistant"]["tokens"] == split.mask(1, split.n_tokens - 1).sum()
    assert plain["documents"] == split.meta["splits"]["val"]["documents"]
    assert plain["by_source"] == {"conversations.jsonl": {k: plain[k] for k in parts}}
    assert plain["checkpoint"].endswith("step_000006") and plain["stride"] == 16
    assert one_by_one["all"]["perplexity"] == pytest.approx(plain["all"]["perplexity"], rel=1e-6)
    assert overlapping["all"]["perplexity"] != plain["all"]["perplexity"]
    assert f"{plain['all']['perplexity']:,.3f}" in capsys.readouterr().out


def result_of(loss_on: str | None) -> dict:
    figures = {"perplexity_95": [1.0, 2.0], "bits_per_byte": 0.5, "tokens": 7}
    return {
        "all": {"perplexity": 73425.103, **figures},
        "assistant": {"perplexity": 5.949, **figures},
        **{"documents": 3, "data": "x/val.bin", "checkpoint": "out/x/step_000006"},
        **{"block_size": 16, "stride": 16, "dtype": "float32", "loss_on": loss_on},
    }


@pytest.mark.parametrize("loss_on", ["all", None])  # None: weights that were brought here
def test_the_headline_is_over_all_tokens(loss_on):
    rows = eval_ppl.report(result_of(loss_on)).splitlines()
    assert rows[1].split()[:3] == ["all", "tokens", "73,425.103"]
    assert rows[2].split()[:3] == ["assistant", "tokens", "5.949"]


def test_the_headline_is_over_what_training_had_for_targets():
    said = eval_ppl.report(result_of("assistant"))
    assert said.splitlines()[1].split()[:3] == ["assistant", "tokens", "5.949"]
    assert "loss_on=assistant" in said and "73,425" not in said
    no_answers = {k: v for k, v in result_of("assistant").items() if k != "assistant"}
    assert "73,425.103" in eval_ppl.report(no_answers)


def test_the_table_by_source_is_of_what_training_had_for_targets():
    parts = {"all": result_of("all")["all"], "assistant": result_of("all")["assistant"]}
    sources = {"by_source": {"airoboros": parts, "metamath": parts, "plain": {"all": parts["all"]}}}
    said = eval_ppl.report(result_of("assistant") | sources).splitlines()
    assert said[-3].startswith("assistant tokens by source")
    assert [line.split()[:2] for line in said[-2:]] == [
        ["airoboros", "5.949"],
        ["metamath", "5.949"],
    ]
    assert "by source" not in eval_ppl.report(result_of("all") | {"by_source": {"one": parts}})


def test_stride_past_the_context_is_refused(run_dir):
    config = eval_ppl.EvalConfig(run=str(run_dir), stride=17, device="cpu")
    with pytest.raises(UserError, match="--stride=17; wanted at most the context, 16"):
        eval_ppl.main(config)


@pytest.mark.parametrize("stride", [4, 2, 1])
def test_loss_by_position_agrees_with_the_windows(stride):
    """A loss that says how many tokens of its window stand before its target."""
    wanted: dict[int, list[int]] = {}
    losses = np.zeros(10)
    for start, end, n_scored in eval_ppl.windows(11, 4, stride):
        for place in range(end - n_scored, end):
            losses[place] = 1000 * (place - start + 1)
            wanted.setdefault((place - start).bit_length(), []).append(losses[place])
    found = eval_ppl.by_position(losses, np.ones(10), block_size=4, stride=stride)
    assert [part["before"] for part in found] == [[1, 1], [2, 2], [3, 4]]
    assert [part["loss"] for part in found] == [np.mean(wanted[n]) for n in sorted(wanted)]
    assert [part["tokens"] for part in found] == [len(wanted[n]) for n in sorted(wanted)]
    half = eval_ppl.by_position(losses, np.arange(10) % 2, block_size=4, stride=stride)
    assert sum(part["tokens"] for part in half) == 5


@pytest.mark.filterwarnings("error")
def test_a_diverged_model_has_a_loss_and_no_perplexity(tmp_path):
    ids = np.array([1, 2, tokenizer.END_OF_TEXT, 3, 4, tokenizer.END_OF_TEXT])
    for loss in (1000.0, math.nan):
        losses = np.full(5, loss, dtype=np.float32)
        found = eval_ppl.figures(losses, ids[1:], np.ones(5, dtype=np.uint8), seed=0)
        written = json.loads(files.json_text(found), parse_constant=pytest.fail)
        assert (
            written["all"]["perplexity"] is None and written["all"]["perplexity_95"] == [None] * 2
        )
        assert written["all"]["loss"] == (None if math.isnan(loss) else loss)
        whole = {"loss_on": "all", "data": "d", "checkpoint": "c", "block_size": 4, "stride": 4}
        assert "all tokens" in eval_ppl.report(found | whole | {"dtype": "float32"})
