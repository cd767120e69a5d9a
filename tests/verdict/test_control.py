"""A control run beside the run that is judged: figures by hand, pairs, and the one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_report import compose, sample_of
from test_verdict import chat_document, config_of, no_pictures, stub  # noqa: F401

import eval_ppl
from nanosynth import UserError, checkpoint, tokenizer
from nanosynth.data import bins
from tiny import ALONE, tiny_model, write_bins
from verdict import __main__ as verdict
from verdict import control, runs


def save_run(folder, seed: int, documents: list, loss_on: str = "all") -> str:
    """An untrained model of a seed, as a run on these documents."""
    data_dir = write_bins(folder / "bins", {"train": documents * 2, "val": documents})
    model = tiny_model(seed, vocab_size=tokenizer.VOCAB_SIZE, block_size=64, n_layer=1)
    identity = {"model": vars(model.config), "loss_on": loss_on}
    identity["data_sha256"] = bins.Split(data_dir, "train").sha256
    settings = {"data_dir": data_dir, "loss_on": loss_on}
    meta = {"val_loss": 1.0, "identity": identity, "settings": settings}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    checkpoint.save(folder, 7, model=model.state_dict(), train_state={}, meta=meta)
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    """A run on chats and its control on other chats."""
    folders = []
    for seed, name in enumerate(("run", "control")):
        (tmp_path / name).mkdir()
        documents = [chat_document(f"{name} {n}", f"It is {n}.") for n in range(8)]
        folders.append(save_run(tmp_path / name, seed, documents))
    return folders


def load(path: str) -> verdict.load:
    return verdict.load(path, device=torch.device("cpu"), dtype=torch.float32, cast=False)


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_bits_a_byte_crosswise_are_those_of_eval_ppl(pair, loss_on):
    own, other = map(runs.read, pair)
    other.settings["loss_on"] = loss_on  # where one was trained on answers alone, those count
    found = list(control.bits_per_byte(own, other, load, torch.float32))
    for measured, of in zip(found, (own, other), strict=True):
        split = bins.Split(of.settings["data_dir"], "val")
        assert measured["of"] == str(split.path) and measured["n"] == 8
        ids, mask = split.ids(0, split.n_tokens), split.mask(0, split.n_tokens)
        for name, run in (("run", own), ("control", other)):
            how = {"stride": 64, "batch_size": 8, "dtype": torch.float32}
            losses = eval_ppl.score(load(run.path).model, ids, ALONE, **how)
            wanted = eval_ppl.figures(losses, ids[1:], mask[1:], seed=0)[loss_on]["bits_per_byte"]
            assert measured[name] == pytest.approx(wanted, rel=1e-6)
        low, high = measured["interval"]
        assert low <= measured["difference"] <= high
        assert measured["difference"] == pytest.approx(measured["run"] - measured["control"])


def test_data_that_both_have_counts_once(pair):
    own = runs.read(pair[0])
    (found,) = control.bits_per_byte(own, own, load, torch.float32)
    assert found["difference"] == 0 and found["interval"] == [0, 0]


def test_tasks_and_prompts_are_paired():
    """Of 40 questions the run gets 30 right and the control 20 of those: 0.25 by hand."""
    own, other = runs.Run(path="a"), runs.Run(path="b")
    for run, scores in ((own, [1] * 30 + [0] * 10), (other, [1] * 20 + [0] * 20)):
        scored = {"metric": "acc", "score": np.mean(scores), "n": 40}
        run.tasks = {"step": 7, "zero_shot": {"quiz": scored, "old": scored, "short": scored}}
        run.items = {"quiz": {"step": 7, "scores": scores}, "old": {"step": 6, "scores": scores}}
    own.items["short"] = {"step": 7, "scores": [1]}
    (quiz,) = control.tasks(own, other)
    assert (quiz["run"], quiz["control"], quiz["difference"], quiz["n"]) == (0.75, 0.5, 0.25, 40)
    low, high = quiz["interval"]  # of a share of 0.25: 10 of 40 differ, and never the other way
    assert 0.1 <= low < 0.25 < high <= 0.4
    own.samples = [sample_of(n) | {"set": "prompts", "obeys": True} for n in range(9)]
    other.samples = [sample_of(n) | {"set": "prompts", "obeys": n < 3} for n in range(1, 10)]
    other.samples.append(sample_of(0) | {"set": "validation"})
    coherent, obeys = control.prompts(own, other)
    assert coherent["difference"] == 0 and coherent["n"] == obeys["n"] == 8
    assert obeys["difference"] == 0.75 and obeys["of"] == "prompts, sampled"


def test_the_sentence_names_what_is_larger_than_its_interval():
    one = {"what": "acc", "of": "quiz", "difference": 0.25, "interval": [0.1, 0.4]}
    two = {"what": "acc", "of": "other", "difference": -0.02, "interval": [-0.1, 0.06]}
    found = {"control": "out/web", "differences": [one, two], "unlike": ["n_layer 2 and 4"]}
    assert control.sentence(found) == (
        "Larger than their interval, of 2 differences to out/web: acc of quiz (+0.25). "
        "The two are unlike in n_layer 2 and 4."
    )


def test_the_whole_program_beside_a_control(pair, capsys, monkeypatch):
    stub([], monkeypatch)
    own, other = pair
    verdict.main(config_of(own, control=other, tasks="questions", num_prompts=2))
    assert f"{own}: measuring it beside {other}" in capsys.readouterr().out
    text, found = compose(own)
    assert f"## {own} beside {other}\n\nLarger than their interval, of 7 differences" in text
    with monkeypatch.context() as once:
        once.setattr(control, "bits_per_byte", None)  # is not asked for again
        verdict.main(config_of(own, control=other, tasks="questions", num_prompts=2))
    of = [d["of"] for d in runs.read(own).control["differences"]]
    assert of[2:] == ["questions", *["prompts, greedy"] * 2, *["prompts, sampled"] * 2]
    meta = checkpoint.read_meta(Path(own, "step_000007"))
    meta = {key: meta[key] for key in ("identity", "settings")} | {"val_loss": 0.5}
    model = tiny_model(9, vocab_size=tokenizer.VOCAB_SIZE, block_size=64, n_layer=1)
    checkpoint.save(Path(own), 8, model=model.state_dict(), train_state={}, meta=meta)
    before = runs.read(own).control["differences"][0]["run"]
    verdict.main(config_of(own, control=other, tasks="", generation=False))
    assert runs.read(own).control["differences"][0]["run"] != before  # of another checkpoint
    Path(other, "bins", "meta.json").unlink()
    verdict.main(config_of(own, control=other, tasks="questions"))
    said = capsys.readouterr().err
    assert f"{own}: not compared with {other}: " in said and f"--data_dir={other}/bins" in said
    with pytest.raises(UserError, match="--control=.*wanted another run"):
        config_of(own, control=own)
