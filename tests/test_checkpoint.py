import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from nanosynth import UserError, checkpoint

FILES = [checkpoint.MODEL, checkpoint.TRAIN_STATE, checkpoint.META]
IDENTITY = {"seed": 1}


def save(run_dir: Path, step: int, val_loss: float | None = None) -> Path:
    generator = torch.Generator().manual_seed(step)
    wte = torch.randn(8, 4, generator=generator)
    run_dir.mkdir(exist_ok=True)
    return checkpoint.save(
        run_dir,
        step,
        model={"wte": wte, "bias": torch.randn(4, generator=generator).half(), "lm_head": wte},
        train_state={"moments": [torch.ones(3), {"step": torch.tensor(5.0)}], "scale": 0.1},
        meta={"val_loss": val_loss, "identity": IDENTITY},
    )


@pytest.fixture
def run(tmp_path) -> Path:
    """Three checkpoints; the second is the best."""
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save(tmp_path / "run", step, val_loss)
    return tmp_path / "run"


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_round_trip(run):
    path = checkpoint.folder(run, 2)
    meta = checkpoint.verify(path)
    assert meta["step"] == 2 and meta["val_loss"] == 1.0
    generator = torch.Generator().manual_seed(2)
    tensors = checkpoint.read_model(path, meta)
    assert torch.equal(tensors["wte"], torch.randn(8, 4, generator=generator))
    assert tensors["bias"].dtype == torch.float16
    assert tensors["lm_head"].data_ptr() == tensors["wte"].data_ptr()
    assert set(tensors) == {"wte", "bias", "lm_head"}
    state = checkpoint.read_train_state(path)
    assert torch.equal(state["moments"][0], torch.ones(3)) and state["scale"] == 0.1


def test_a_tied_tensor_is_stored_once(run):
    size = (checkpoint.folder(run, 1) / checkpoint.MODEL).stat().st_size
    assert size < 8 * 4 * 4 + 4 * 2 + 300


def test_a_copy_on_the_host_is_its_own_and_ties_what_was_tied():
    wte = torch.ones(4, 2)
    state = {"model": {"wte": wte, "head": wte.view(4, 2)}, "moments": [wte[0], {"scale": 0.5}]}
    found = checkpoint.on_host(state)
    wte.zero_()
    assert found["model"]["wte"].sum() == 8 and found["moments"][0].tolist() == [1, 1]
    assert found["model"]["wte"].data_ptr() == found["model"]["head"].data_ptr()
    assert found["moments"][1] == {"scale": 0.5}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(run, name):
    (checkpoint.folder(run, 3) / name).unlink()
    with pytest.raises(checkpoint.Damaged, match=name):
        checkpoint.verify(checkpoint.folder(run, 3))


def test_every_edit_of_the_meta_is_found(run):
    path = checkpoint.folder(run, 3)
    content = (path / checkpoint.META).read_text()
    meta = json.loads(content)
    edits = [json.dumps(meta), content.replace("2.0", "0.5"), "[]", "{}", "null"]
    edits += [json.dumps({**meta, name: "edited"}, indent=2) for name in meta]
    edits += [json.dumps({k: v for k, v in meta.items() if k != name}, indent=2) for name in meta]
    for edited in edits:
        assert edited != content
        (path / checkpoint.META).write_text(edited)
        with pytest.raises(checkpoint.Damaged):
            checkpoint.verify(path)
    (path / checkpoint.META).write_text(content)
    checkpoint.verify(path)


def test_a_folder_under_another_steps_name_is_refused(run):
    os.rename(checkpoint.folder(run, 3), checkpoint.folder(run, 4))
    with pytest.raises(checkpoint.Damaged):
        checkpoint.verify(checkpoint.folder(run, 4))


def test_newest_good_falls_back_and_says_so(run):
    for step, name in ((3, checkpoint.MODEL), (2, checkpoint.META)):
        flip_bit(checkpoint.folder(run, step) / name, 40)
    said = []
    assert checkpoint.newest_good(run, said.append) == checkpoint.folder(run, 1)
    assert len(said) == 2 and "step_000003" in said[0] and "step_000002" in said[1]
    assert checkpoint.steps(run) == [1]
    assert (run / "step_000003.damaged").is_dir() and (run / "step_000002.damaged").is_dir()
    assert checkpoint.newest_good(run / "nowhere") is None


@pytest.mark.parametrize("what", ["step", "file"])
def test_a_linked_checkpoint_is_not_taken_for_a_damaged_one(run, what, tmp_path):
    """An older one in its place would lose steps, and a new run all of them."""
    path = checkpoint.folder(run, 3)
    linked = path if what == "step" else path / checkpoint.MODEL
    os.rename(linked, tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(checkpoint.Linked, match="symbolic link; put what it names in its place"):
        checkpoint.find_start(run, "auto", IDENTITY)
    assert checkpoint.steps(run) == [1, 2, 3]
    save(run, 4)
    save(run, 5)
    checkpoint.prune(run, 2)  # leaves a link alone
    assert checkpoint.steps(run) == ([2, 3, 4, 5] if what == "step" else [2, 4, 5])


def test_a_save_cut_short_leaves_the_run_as_it_was(run):
    with pytest.raises(TypeError):  # after both other files are written
        checkpoint.save(run, 4, model={"w": torch.ones(2)}, train_state={}, meta={"x": object()})
    assert checkpoint.steps(run) == [1, 2, 3]
    assert not list(run.glob(".tmp*"))


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [2, 5]), (2, [2, 4, 5]), (4, [2, 3, 4, 5])])
def test_prune_keeps_the_newest_and_the_best(run, keep_last, kept):
    for step in (4, 5):
        save(run, step)
    checkpoint.prune(run, keep_last)
    assert checkpoint.steps(run) == kept
    assert (run / "best").read_text() == "step_000002"
    assert not list(run.glob(".trash*"))


def test_best(run, tmp_path):
    assert checkpoint.best_loss(run) == 1.0
    assert checkpoint.best(run) == checkpoint.folder(run, 2)
    save(tmp_path / "unevaluated", 1)
    assert checkpoint.best(tmp_path / "unevaluated") is None
    assert checkpoint.best_loss(tmp_path / "unevaluated") == math.inf


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, loss):
    for step, val_loss in ((1, loss), (2, 2.0), (3, 3.0)):
        save(tmp_path / "run", step, val_loss)
    assert checkpoint.best(tmp_path / "run") == checkpoint.folder(tmp_path / "run", 2)
    assert checkpoint.best_loss(tmp_path / "run") == 2.0


@pytest.mark.parametrize(("step", "wanted"), [("best", 2), ("latest", 3), ("1", 1)])
def test_find(run, step, wanted):
    assert checkpoint.find(str(run), step) == checkpoint.folder(run, wanted)


def test_find_takes_a_step_folder(run):
    path = checkpoint.folder(run, 1)
    assert checkpoint.find(str(path)) == checkpoint.find(f"{path}/") == path


@pytest.mark.parametrize("step", ["7", "newest", "-1", "\u00b2", "\u0661", "1" * 5000])
def test_find_names_the_steps_there_are(run, step):
    with pytest.raises(
        UserError, match=f"no step '{step}' .*wanted best, latest or one of 1, 2, 3"
    ):
        checkpoint.find(str(run), step)


def test_a_damaged_best_is_said(run, capfd):
    flip_bit(checkpoint.folder(run, 2) / checkpoint.META, 40)
    assert checkpoint.find(str(run)) == checkpoint.folder(run, 3)
    said = capfd.readouterr().err
    assert "step_000002" in said and "the best of the others is taken" in said


def test_find_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in .*python train.py"):
        checkpoint.find(str(tmp_path / "nowhere"))


def test_only_what_is_read_is_hashed(run):
    """Twice as much is in the training state, which a sampler does not read."""
    flip_bit(checkpoint.folder(run, 2) / checkpoint.TRAIN_STATE, 90)
    assert checkpoint.find(str(run), "2") == checkpoint.folder(run, 2)
    with pytest.raises(checkpoint.Damaged, match=checkpoint.TRAIN_STATE):
        checkpoint.find_start(run, str(checkpoint.folder(run, 2)), IDENTITY)


def test_find_start(run):
    assert checkpoint.find_start(run, "auto", IDENTITY) == checkpoint.folder(run, 3)
    with pytest.raises(UserError, match="made with seed=1, this run has 2"):
        checkpoint.find_start(run, "auto", {"seed": 2})


@pytest.mark.parametrize("left", ["step_000006.damaged", "step_000006", "latest", "best", "notes"])
@pytest.mark.parametrize("resume", ["auto", "never", "other"])
def test_a_folder_that_holds_work_is_not_started_over(run, tmp_path, left, resume):
    """'auto' may: other files than checkpoints are not in its way."""
    other = tmp_path / "other"
    other.mkdir()
    assert checkpoint.find_start(other, resume.replace("other", "never"), IDENTITY) is None
    (other / left).write_text("work")
    if left == "notes" and resume == "auto":
        assert checkpoint.find_start(other, "auto", IDENTITY) is None
        return
    resume = str(checkpoint.folder(run, 3)) if resume == "other" else resume
    with pytest.raises(UserError, match=f"{left}.*another --out_dir"):
        checkpoint.find_start(other, resume, IDENTITY)
    assert (other / left).read_text() == "work"


def test_find_start_at_a_step_however_it_is_written(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    start = checkpoint.find_start(Path("run"), str(checkpoint.folder(run, 2)), IDENTITY)
    assert start == Path("run/step_000002")


def test_a_second_roll_back_keeps_what_the_first_set_aside(run):
    for note in ("first", "second", "third"):
        if note != "first":
            save(run, 3)
        (run / "step_000003" / "note").write_text(note)
        checkpoint.find_start(run, str(checkpoint.folder(run, 2)), IDENTITY)
    asides = [run / f"step_000003.abandoned{number}" for number in ("", "-2", "-3")]
    assert [(path / "note").read_text() for path in asides] == ["first", "second", "third"]


def test_names_that_only_look_like_steps(run):
    """Digits of other scripts, too many of them, a file."""
    for name in (
        "step_\u0660\u0660\u0660\u0660\u0660\u0667",
        "step_0000008",
        "step_9",
        "step_000009.x",
    ):
        (run / name).mkdir()
    assert checkpoint.steps(run) == [1, 2, 3]
    (run / "step_000010").write_text("")
    assert checkpoint.find_start(run, "auto", IDENTITY) == checkpoint.folder(run, 3)
    assert (run / "step_000010.damaged").is_file()


def test_find_start_at_an_older_step_sets_the_later_ones_aside(run):
    path = checkpoint.folder(run, 1)
    assert checkpoint.find_start(run, str(path), IDENTITY) == path
    assert checkpoint.steps(run) == [1]
    assert (run / "step_000003.abandoned").is_dir()


def test_find_start_orders_steps_as_numbers(run):
    for step in (999_999, 1_000_000):
        save(run, step)
    checkpoint.find_start(run, str(checkpoint.folder(run, 999_999)), IDENTITY)
    assert checkpoint.steps(run) == [1, 2, 3, 999_999]


def test_find_start_removes_what_was_cut_short(run):
    for name in (".tmp-step_000009", ".trash-step_000001"):
        (run / name).mkdir()
    checkpoint.find_start(run, "auto", IDENTITY)
    assert not list(run.glob(".*-step_*"))


def test_a_run_that_will_not_fit_is_refused(run):
    checkpoint.check_space(run, 1000, 3)
    # What is set aside stays: its room is not counted as if it came free.
    free = shutil.disk_usage(run).free
    needed = (free + 10**9) // (12 * 5)
    with open(run / "step_000009.abandoned", "wb") as file:
        file.truncate(2 * 10**9)  # sparse
    with pytest.raises(UserError, match="has room for"):
        checkpoint.check_space(run, needed, 3)
    with pytest.raises(UserError, match="5 checkpoints take 60000000.0 GB.*--keep_last"):
        checkpoint.check_space(run, 10**15, 3)
