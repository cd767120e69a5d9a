import json
import statistics

import numpy as np
import pytest

from benchmarks import recipe
from nanosynth import UserError, tokenizer
from nanosynth.data import bins
from tiny import write_bins

CONFIG = recipe.RecipeConfig()


def made(*losses: float) -> recipe.Run:
    """A run evaluated at equal distances up to the whole budget."""
    budget = recipe.STEPS * recipe.TOKENS_PER_STEP
    step = budget // len(losses)
    return recipe.Run({step * (n + 1): loss for n, loss in enumerate(losses)}, losses[-1])


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (3e-3, [1.5e-3, 3e-3, 6e-3]),
        (1.2e-2, [3e-3, 6e-3, 1.2e-2, 2.4e-2]),
        (7.5e-4, [3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3]),
    ],
)
def test_the_best_learning_rate_has_a_worse_one_on_either_side(monkeypatch, best, tried):
    monkeypatch.setattr(
        recipe, "run", lambda config, name, rate, seed: made(abs(np.log(rate / best)))
    )
    losses = recipe.tune(CONFIG, "adamw")
    assert list(losses) == pytest.approx(tried)
    assert min(losses, key=losses.get) == pytest.approx(best)


def test_tokens_to_reach_a_loss_lie_between_two_evaluations():
    losses = {100: 4.0, 200: 3.0, 300: 3.5, 400: 2.0}
    assert recipe.tokens_to_reach(losses, 3.25) == 175
    assert recipe.tokens_to_reach(losses, 2.75) == 350
    assert recipe.tokens_to_reach(losses, 1.0) is None
    assert recipe.tokens_to_reach(losses, 5.0) == 100


def test_the_interval_is_students():
    values = [2.0, 3.0, 4.0]
    mean, half = recipe.interval(values)
    assert mean == 3.0
    assert half == pytest.approx(4.303 * statistics.stdev(values) / 3**0.5)


def test_the_table_keeps_what_lost():
    runs = {
        "adamw": [made(4.0, 3.0), made(4.2, 3.2), made(4.4, 3.1)],
        "muon": [made(3.1, 2.5)] * 3,
        "fast": [made(5.0, 4.0)] * 3,
    }
    text = recipe.table(runs, {"adamw": {0.012: 3.0}}, dict.fromkeys(runs, 0.012))
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    assert rows["adamw"].startswith("| adamw | 0.012 | 3.100 ± 0.248 |")
    assert rows["muon"].endswith("| 50% ± 0% |")
    assert rows["fast"].endswith("| not reached by every seed |")
    assert "- adamw: 0.012: 3.000" in text


def test_made_bins_change_the_training_tokens_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.BASE, "block_size", 8)
    monkeypatch.setattr(recipe, "TOKENS_PER_STEP", 8)
    monkeypatch.setattr(recipe, "STEPS", 10)
    documents = [([n] * (4 + n) + [tokenizer.END_OF_TEXT], [1] * (5 + n)) for n in range(1, 12)]
    source = write_bins(tmp_path / "data", {"train": documents, "val": documents})
    config = recipe.RecipeConfig(data_dir=source, out_dir=str(tmp_path))
    old = bins.Split(source, "train")
    ids = old.ids(0, old.n_tokens)
    half = bins.Split(recipe.make_bins(config, "half"), "train")
    assert np.array_equal(half.ids(0, half.n_tokens), ids[:41])
    aligned = bins.Split(recipe.make_bins(config, "aligned"), "train")
    starts = aligned.ids(0, aligned.n_tokens)[::8]
    assert len(starts) > 3 and tokenizer.END_OF_TEXT not in starts
    firsts = ids[np.flatnonzero(np.append(True, ids[:-1] == tokenizer.END_OF_TEXT))]
    assert set(starts) <= set(firsts)
    for name in ("half", "aligned"):
        val = (tmp_path / f"bins_{name}" / "val.bin").read_bytes()
        assert val == (tmp_path / "data" / "val.bin").read_bytes()
        meta = json.loads((tmp_path / f"bins_{name}" / "meta.json").read_text())
        assert (
            meta["files"]["train.bin"]["sha256"]
            == bins.Split(str(tmp_path / f"bins_{name}"), "train").sha256
        )


def test_an_unknown_recipe_is_named():
    with pytest.raises(UserError, match="--recipe=sophia; wanted one of: adamw; "):
        recipe.RecipeConfig(recipe=("sophia",))
