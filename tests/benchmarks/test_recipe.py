import json
import math
import statistics

import pytest

from benchmarks import recipe
from nanosynth import UserError
from nanosynth.data import bins
from tiny import tiny_model, write_bins

CONFIG = recipe.RecipeConfig()


def test_the_search_ends_where_no_value_beside_is_better():
    """A bowl whose bottom is far from the start, in rates and in values of a ladder alike."""
    bottom = {**recipe.START["adamw"], "learning_rate": 0.024, "beta1": 0.95, "zero_init": True}
    bottom["embedding_learning_rate"] = 0.008
    tried = []

    def score(knobs: dict) -> float:
        tried.append(knobs)
        distance = sum(abs(math.log2(knobs[n] / bottom[n])) for n in recipe.RATES)
        return distance + sum(
            abs(ladder.index(knobs[n]) - ladder.index(bottom[n]))
            for n, ladder in recipe.LADDERS.items()
        )

    assert recipe.search(score, recipe.START["adamw"], recipe.KNOBS) == bottom
    for knob in recipe.KNOBS:
        assert all(near in tried for near in recipe.beside(bottom, knob))
    found = recipe.search(score, recipe.START["adamw"], ("beta1",))
    assert found == {**recipe.START["adamw"], "beta1": 0.95}


def test_every_start_stands_on_the_ladders():
    for start in recipe.START.values():
        assert list(start) == list(recipe.KNOBS)
        assert all(start[name] in ladder for name, ladder in recipe.LADDERS.items())


def test_tokens_to_reach_a_loss_lie_between_two_evaluations():
    curve = [[100, 4.0], [200, 3.0], [300, 3.5], [400, 2.0]]
    assert recipe.tokens_to_reach(curve, 3.25) == 175
    assert recipe.tokens_to_reach(curve, 2.75) == 350
    assert recipe.tokens_to_reach(curve, 1.0) is None
    assert recipe.tokens_to_reach(curve, 5.0) == 100


def test_the_interval_is_students():
    half = 4.303 * statistics.stdev([2.0, 3.0, 4.0]) / 3**0.5
    assert recipe.interval([2.0, 3.0, 4.0]) == f"3.000 ± {half:.3f}"
    assert recipe.interval([2.0]) == "2.000 (one seed)"


def made(optimizer: str, *losses: float, seed: int = 42, **knobs) -> dict:
    """A finished run, evaluated at equal distances up to its last token."""
    knobs = {**recipe.START[optimizer], **knobs}
    n_tokens = CONFIG.steps * recipe.ROWS * recipe.BLOCK_SIZE
    tokens = [n_tokens * (n + 1) // len(losses) for n in range(len(losses))]
    cell = recipe.cell_of(CONFIG, optimizer, knobs, seed)
    return {"cell": cell, "curve": list(map(list, zip(tokens, losses, strict=True)))}


def test_the_report_takes_the_best_of_each_and_keeps_what_lost(tmp_path):
    runs = [
        *(
            made("adamw", 4.0, loss, seed=seed)
            for seed, loss in zip(recipe.SEEDS, (3.0, 3.2, 3.1), strict=True)
        ),
        made("adamw", 4.0, 3.5, beta1=0.9),
        made("adamw", 4.0, 2.9, warmup=0.1),  # lower, but by one seed alone
        *(made("muon", 3.1, 2.5, seed=seed) for seed in recipe.SEEDS),
        made("muon", 4.0, math.nan, learning_rate=0.096),
    ]
    text = recipe.report(recipe.RecipeConfig(out_dir=str(tmp_path)), runs)
    (row,) = (line for line in text.splitlines() if line.startswith("| 3 x 64"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("3 x 64", "250", "3.100 ± 0.248", "2.500 ± 0.000", "53% ± 12%")  # 58, 50 and 50
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["beta1", "**0.8**, 0.9: +0.500", "**0.8**"] in rows
    assert ["warmup", "0.1: -0.100, **0.3**", "**0.1**"] in rows
    assert ["learning_rate", "**0.006**", "**0.024**, 0.096: +inf"] in rows
    assert (tmp_path / "recipe_s_250.png").exists()


def test_a_value_is_judged_beside_the_run_that_is_else_the_same():
    """That is the best itself, unless another knob has made it better since."""
    runs = [made("muon", 3.0), made("muon", 3.1, beta1=0.9), made("muon", 2.0, zero_init=True)]
    assert recipe.costs(runs, runs[-1]["cell"], "beta1") == "**0.8**, 0.9: +0.100"
    assert recipe.costs(runs, runs[-1]["cell"], "zero_init") == "0: +1.000, **1**"
    tried = [*runs, made("muon", 2.5, beta1=0.9, zero_init=True)]
    assert recipe.costs(tried, runs[-1]["cell"], "beta1") == "**0.8**, 0.9: +0.500"


def test_a_muon_that_never_comes_there_is_said(tmp_path):
    runs = [made("adamw", 4.0, 3.0), made("muon", 4.0, 3.5)]
    text = recipe.report(recipe.RecipeConfig(out_dir=str(tmp_path)), runs)
    assert "3.500 (one seed)" in text and "not reached by every seed" in text


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A config whose runs take a moment."""
    monkeypatch.setitem(recipe.SIZES, "s", {"n_layer": 1, "n_head": 2, "n_embd": 8})
    monkeypatch.setattr(recipe, "BLOCK_SIZE", 8)
    documents = [([1, 2, 3, 50_000 + n, 50_256], [1] * 5) for n in range(40)]
    source = write_bins(tmp_path / "data", {"train": documents, "val": documents})
    return recipe.RecipeConfig(
        data_dir=source, out_dir=str(tmp_path / "out"), vocabulary=5, steps=20
    )


def test_the_vocabulary_is_cut_to_the_commonest_ids(small):
    folder, vocab_size = recipe.cut_vocabulary(small)
    old, new = bins.Split(small.data_dir, "val"), bins.Split(folder, "val")
    ids = new.ids(0, new.n_tokens)
    assert vocab_size == 5 and set(ids) == {0, 1, 2, 3, 4}
    assert set(old.ids(0, old.n_tokens)[ids == 4]) == {50_000 + n for n in range(40)}
    assert recipe.cut_vocabulary(small)[0] == folder  # the second time it is there


@pytest.mark.parametrize("optimizer", recipe.START)
def test_a_run_learns_and_is_not_made_again(small, monkeypatch, optimizer):
    runs = recipe.Runs(small)
    cell = recipe.cell_of(small, optimizer, recipe.START[optimizer], 42)
    curve = runs.curve(cell)
    assert (
        [point[0] for point in curve]
        == [128 * n for n in range(1, 11)]
        == [2 * recipe.ROWS * 8 * n for n in range(1, 11)]
    )
    assert curve[-1][1] < math.log(5) - 0.1
    monkeypatch.setattr(recipe, "run", None)
    assert recipe.Runs(small).curve(json.loads(json.dumps(cell))) == curve
    with pytest.raises(TypeError):  # another seed is another run
        runs.curve({**cell, "seed": 43})


def test_positions_move_at_their_share_of_the_tokens_rate():
    model = tiny_model()
    tokens, _, _, positions = recipe.groups_with_positions(0.5, model, 0.1, 3.0)
    assert tokens["params"] == [model.transformer.wte.weight] and tokens["lr_share"] == 3.0
    assert positions["params"] == [model.transformer.wpe.weight] and positions["lr_share"] == 1.5


def test_an_unknown_contender_or_knob_is_named():
    with pytest.raises(UserError, match="--contender.* no sophia; wanted of: adamw, muon"):
        recipe.RecipeConfig(contender=("sophia",))
    with pytest.raises(UserError, match="--knob.* no beta3; wanted of: learning_rate, "):
        recipe.RecipeConfig(knob=("beta3",))
