import os
import shutil

import pytest
import torch

from nanosynth import UserError, checkpoint, tokenizer
from nanosynth.inference.load import load
from tiny import CPU, random_ids, tiny_model


def save(run_dir, step, val_loss, *, seed=0, vocab_size=tokenizer.VOCAB_SIZE):
    """A step folder of a tiny model, as train.py writes it; the model."""
    model = tiny_model(seed, vocab_size=vocab_size)
    identity = {"model": vars(model.config), "loss_on": "all"}
    meta = {"val_loss": val_loss, "identity": identity, "settings": {"data_dir": ""}}
    run_dir.mkdir(exist_ok=True)
    checkpoint.save(run_dir, step, model=model.state_dict(), train_state={}, meta=meta)
    return model


def test_a_trained_run_opens_ready_for_inference(run_dir):
    model, path, meta = load(str(run_dir), device=CPU, dtype=torch.float32)
    assert path.parent == run_dir and meta["step"] == int(path.name.removeprefix("step_"))
    assert not model.training and model.config.vocab_size == tokenizer.VOCAB_SIZE
    assert model(random_ids(1, 4)).shape == (4, tokenizer.VOCAB_SIZE)


def test_the_weights_are_those_that_were_saved(tmp_path):
    saved = save(tmp_path / "run", 3, 2.0).eval()
    loaded = load(str(tmp_path / "run"), device=CPU, dtype=torch.float32).model
    ids = random_ids(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), saved(ids))


@pytest.mark.parametrize(("step", "wanted"), [("best", 2), ("latest", 3), ("1", 1)])
def test_best_latest_or_a_number(tmp_path, step, wanted):
    run_dir = tmp_path / "run"
    models = {n: save(run_dir, n, loss, seed=n) for n, loss in ((1, 3.0), (2, 1.0), (3, 2.0))}
    for run in ([run_dir, step], [run_dir / f"step_{wanted:06d}"]):  # a folder says it by itself
        loaded = load(*map(str, run), device=CPU, dtype=torch.float32)
        assert loaded.meta["step"] == wanted and loaded.path == run_dir / f"step_{wanted:06d}"
        weight = models[wanted].transformer.wte.weight
        assert torch.equal(loaded.model.transformer.wte.weight, weight)


@pytest.mark.parametrize(("cast", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_weights_are_cast_or_stay_for_autocast(run_dir, cast, wanted):
    model = load(str(run_dir), device=CPU, dtype=torch.bfloat16, cast=cast).model
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}


def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    newest = checkpoint.folder(copy, checkpoint.steps(copy)[-1])
    os.truncate(newest / checkpoint.MODEL, 1000)
    with pytest.raises(checkpoint.Damaged, match="model.safetensors has 1000 bytes"):
        load(str(copy), "latest", device=CPU, dtype=torch.float32)


def test_a_run_that_is_not_there_is_refused(run_dir):
    for run, step, said in (("missing", "best", "no checkpoint"), (run_dir, "7", "no step '7'")):
        with pytest.raises(UserError, match=said):
            load(str(run), step, device=CPU, dtype=torch.float32)


def test_a_vocabulary_without_the_chat_marks_is_refused(tmp_path):
    save(tmp_path / "run", 3, 2.0, vocab_size=50_257)
    with pytest.raises(UserError, match="a vocabulary of 50257; wanted 50259 or more"):
        load(str(tmp_path / "run"), device=CPU, dtype=torch.float32)
    save(tmp_path / "converted", 3, 2.0, vocab_size=tokenizer.N_IDS)
    load(str(tmp_path / "converted"), device=CPU, dtype=torch.float32)
