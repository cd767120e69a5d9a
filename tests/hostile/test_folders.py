"""Damaged, foreign and forged folders, and places where nothing can be written."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hostile.scripts import complaints, run
from nanosynth import checkpoint
from nanosynth.data import bins
from tiny import RUN, flags
from verdict import runs

DEEP = "[" * 100_000
TEXTS = ("", "{", "null", "[]", "{}", "5", '"x"', DEEP, '{"a": ' * 50_000, "\udcff", "NaN")


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode(errors="surrogateescape"))


def readers(data_dir: Path) -> list[tuple[str, list[str]]]:
    """Each script that opens prepared data."""
    return [("train", flags(**{**RUN, "data_dir": data_dir, "out_dir": "out"}))]


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_bins, run_dir) -> Path:
    """A folder with copies of prepared data and of a run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bins, tmp_path / "data")
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path


def as_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def as_link_to_nothing(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("nothing")


def as_link_to_itself(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path)


def as_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def meta_is_a_folder(path: Path) -> None:
    (path / "meta.json").unlink()
    (path / "meta.json").mkdir()


FOLDERS: tuple[Callable[[Path], None], ...] = (
    *(as_file, as_link_to_nothing, as_link_to_itself, as_empty),
)


@pytest.mark.parametrize("change", [*FOLDERS, meta_is_a_folder], ids=lambda change: change.__name__)
def test_data_folders(place, change, capfd):
    change(place / "data")
    (found,) = readers(place / "data")
    assert not complaints(*found, capfd, place)
    scored = ["--run=run", f"--data_dir={place / 'data'}", "--device=cpu"]
    assert not complaints("eval_ppl", scored, capfd, place)


def metas(intact: dict) -> list[str]:
    """Texts in the place of a meta.json: none of its form, or one value of another kind."""
    wrong = (None, -1, 1.5, "x", [], {}, 10**30)
    changed = [{**intact, key: value} for key in ("format_version", "vocab_size", "files")
               for value in wrong]  # fmt: skip
    changed += [{**intact, "files": {**intact["files"], "train.bin": value}} for value in wrong]
    changed += [
        {**intact, "files": {**intact["files"], "val.bin": {"bytes": value, "sha256": "x"}}}
        for value in wrong
    ]
    return [*TEXTS, *map(json.dumps, changed)]


def test_metas_of_data(place, capfd):
    intact = json.loads((place / "data" / "meta.json").read_text())
    found = []
    for text in metas(intact):
        write(place / "data" / "meta.json", text)
        (train,) = readers(place / "data")
        found += complaints(*train, capfd, place)
    assert not found, "\n".join(found[:10])


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:4])
def test_what_was_checked_of_data(place, text):
    """A file that cannot be read means that all is checked again."""
    write(place / "data" / bins.CHECKED, text)
    bins.Split(str(place / "data"), "train")


READ_A_RUN = {
    "sample": ["--run=run", "--prompt=Hi", "--device=cpu", "--max_new_tokens=1"],
    "eval_ppl": ["--run=run", "--device=cpu"],
    "convert.hf": ["--run=run", "--to=converted"],
}


@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("script", [*READ_A_RUN, "verdict.__main__"])
def test_run_folders(place, script, change, capfd):
    change(place / "run")
    given = READ_A_RUN.get(script, ["--run=run", "--device=cpu"])
    assert not complaints(script, given, capfd, place)


def sign(path: Path, meta: dict) -> None:
    """A meta.json whose hash is right, whatever it says."""
    meta = {key: value for key, value in meta.items() if key != "meta_sha256"}
    (path / checkpoint.META).write_bytes(checkpoint._serialise(meta))


SHAPES = (
    *({"n_layer": 10**9}, {"n_layer": 10**30}, {"n_layer": 0}, {"n_layer": -1}, {"n_layer": "x"}),
    *({"n_layer": 2.5}, {"n_layer": None}, {"n_layer": 1}, {"n_head": 0}, {"n_head": 3}),
    *({"n_head": "2"}, {"n_embd": 10**9}, {"n_embd": 32}, {"n_embd": []}, {"block_size": 10**12}),
    *({"block_size": 8}, {"vocab_size": 10**12}, {"vocab_size": 5}, {"vocab_size": None}),
    *({"bias": False}, {"dropout": "x"}, {"nonsense": 1}, {"dropout": None}),
)


@pytest.mark.parametrize("script", READ_A_RUN)
def test_forged_shapes(place, script, capfd):
    """Signed as ours are; refused before a model of that size is built."""
    path = checkpoint.best(place / "run")
    intact, found = checkpoint.read_meta(path), []
    given = [*READ_A_RUN[script], f"--step={intact['step']}"]
    for shape in SHAPES:
        identity = {**intact["identity"], "model": intact["identity"]["model"] | shape}
        sign(path, {**intact, "identity": identity})
        found += complaints(script, given, capfd, place)
    for identity in (None, [], {}, {"model": None}, {"model": []}, {"model": {}}):
        sign(path, {**intact, "identity": identity})
        found += complaints(script, given, capfd, place)
    assert not found, "\n".join(found[:10])


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "eval_ppl.json", "tasks.json"])
def test_files_that_the_verdict_reads(place, name):
    """It leaves out what is not of its form, and says so."""
    for text in TEXTS:
        write(place / "run" / name, text)
        read = runs.read("run")
        assert any(name in note for note in read.notes) or text in ("", "{}"), (name, text[:20])


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:4])
def test_prompts(place, text, capfd):
    write(place / "prompts.jsonl", text)
    given = ["--run=run", "--device=cpu", "--prompts=prompts.jsonl"]
    assert not complaints("sample", given, capfd, place)
    assert not complaints("verdict.__main__", [*given, "--only=tasks"], capfd, place)


PLACES = ("file/x", "/dev/null", "/proc/self/x", "x" * 300, "dangling", "loop/x")


@pytest.mark.parametrize("target", PLACES, ids=str)
def test_places_where_nothing_can_be_written(place, target, capfd):
    (place / "file").write_text("")
    (place / "dangling").symlink_to("nowhere/x")
    (place / "loop").symlink_to("loop")
    (place / "prompts.txt").write_text("Hi\n")
    rows = json.dumps({"instruction": "a", "output": "b"}) + "\n"
    (place / "rows.jsonl").write_text(rows)
    sampled = ["--run=run", "--prompts=prompts.txt", "--device=cpu", "--max_new_tokens=1"]
    cases = {
        "train": flags(**{**RUN, "data_dir": "data", "out_dir": target}),
        "sample": [*sampled, f"--output_dir={target}"],
        "eval_ppl": ["--run=run", "--device=cpu", f"--output_dir={target}"],
        "verdict.__main__": ["--run=run", "--only=report", f"--output_dir={target}"],
        "prepare": ["--source=rows.jsonl", f"--data_dir={target}"],
        "convert.hf": ["--run=run", f"--to={target}"],
    }
    found = [c for script, given in cases.items() for c in complaints(script, given, capfd, place)]
    assert not found, "\n".join(found)


FORGED = (
    *("val_loss", "files", "files/model.safetensors", "files/train_state.pt", "aliases", "step"),
    *("files/model.safetensors/bytes", "files/model.safetensors/sha256", "aliases/lm_head.weight"),
    *("aliases/nonsense", "settings", "identity", "identity/model"),
)


def test_forged_metas(place, capfd):
    """Signed as ours are; the only checkpoint, so that no other one can be taken."""
    path, found = checkpoint.folder(place / "run", 6), []
    shutil.rmtree(checkpoint.folder(place / "run", 3))
    intact = (path / checkpoint.META).read_text()
    readers = {script: [*given, "--step=6"] for script, given in READ_A_RUN.items()}
    readers["train"] = flags(**{**RUN, "data_dir": "data", "out_dir": "run", "max_steps": 9})
    for at in FORGED:
        *parents, name = at.split("/")
        for value in ("x", [[1]], 10**400):
            meta = json.loads(intact)
            functools.reduce(dict.__getitem__, parents, meta)[name] = value
            sign(path, meta)
            for script, given in readers.items():
                found += [f"{at}: {c}" for c in complaints(script, given, capfd, place)]
            assert runs.read("run").val  # of the other files
    assert not found, "\n".join(found[:10])


def save_anew(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Save a checkpoint again with its tensors and training state changed, signed as ours are."""
    meta = checkpoint.read_meta(path)
    tensors, state = checkpoint.read_model(path, meta), checkpoint.read_train_state(path)
    change(tensors, state)
    shutil.rmtree(path)
    kept = {key: meta[key] for key in ("val_loss", "identity", "settings", "torch")}
    checkpoint.save(path.parent, meta["step"], model=tensors, train_state=state, meta=kept)


FORGED_STATES = {
    "optimizer": ["x", {}, {"state": {}, "param_groups": []}, {"state": {0: {}}}, None],
    "guard": ["x", {}, {"losses": torch.zeros(3)}, None],
    "scaler": ["x", {"scale": "x"}, torch.zeros(3)],
    "metrics_bytes": ["x", -1, None, [1]],
}


@pytest.mark.parametrize("name", FORGED_STATES)
def test_forged_training_states(place, name, capfd):
    path, found = checkpoint.folder(place / "run", 6), []
    given = flags(**{**RUN, "data_dir": "data", "out_dir": "run", "max_steps": 9})
    for value in FORGED_STATES[name]:
        save_anew(path, lambda tensors, state, value=value: state.update({name: value}))
        found += complaints("train", given, capfd, place)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["exp_avg", "step"])
def test_moments_of_another_shape(place, name, capfd):
    path = checkpoint.folder(place / "run", 6)
    save_anew(path, lambda _, state: state["optimizer"]["state"][0].update({name: torch.ones(3)}))
    given = flags(**{**RUN, "data_dir": "data", "out_dir": "run", "max_steps": 9})
    assert not complaints("train", given, capfd, place)


def test_weights_that_are_not_finite(place, capfd):
    """Signed as ours are."""
    path = checkpoint.best(place / "run")
    save_anew(path, lambda tensors, _: tensors["lm_head.weight"].view(-1)[3].fill_(torch.nan))
    for script, given in READ_A_RUN.items():
        assert not complaints(script, given, capfd, place), script
    given = flags(**{**RUN, "data_dir": "data", "out_dir": "run", "max_steps": 9})
    assert not complaints("train", given, capfd, place)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite(place, temperature, capfd):
    """Of weights that are: their products overflow."""
    path = checkpoint.best(place / "run")
    save_anew(path, lambda tensors, _: tensors["lm_head.weight"].mul_(1e38))
    given = [*READ_A_RUN["sample"], f"--temperature={temperature}", "--dtype=float32"]
    assert not complaints("sample", given, capfd, place)


@pytest.mark.parametrize("name", ["meta.json", "val.bin", "train_sources.bin", "stats.png"])
def test_what_prepare_has_not_written_stays(place, name, capfd):
    (place / "mine").mkdir()
    (place / "mine" / name).write_text("mine")
    (place / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    given = ["--source=rows.jsonl", "--data_dir=mine"]
    assert not complaints("prepare", given, capfd, place)


def test_a_read_only_run_is_not_measured(place, monkeypatch, capfd):
    """Said before the work, also to root, whom no mode stops."""
    intact = Path.touch

    def touch(self, *arguments, **keywords):
        if self.parent.name == "run":
            raise PermissionError(13, os.strerror(13), str(self))
        intact(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "touch", touch)
    (place / "prompts.txt").write_text("Hi\n")
    for script, given in {
        "eval_ppl": ["--run=run", "--device=cpu"],
        "sample": ["--run=run", "--device=cpu", "--prompts=prompts.txt"],
        "verdict.__main__": ["--run=run", "--device=cpu", "--only=perplexity"],
    }.items():
        assert not complaints(script, given, capfd, place)
    given = ["--run=run", "--device=cpu", f"--output_dir={place / 'scored'}"]
    assert run("eval_ppl", given, capfd).code == 0
    assert json.loads((place / "scored" / "eval_ppl.json").read_text())["all"]["tokens"]


LOST = {  # where a folder stands in the place of a file: what is printed instead
    "generations.jsonl": ("sample", ["--run=run", "--prompts=prompts.txt"], '"finish": "length"'),
    "eval_ppl.json": ("eval_ppl", ["--run=run"], "bits/byte"),
    "tasks.json": ("verdict.__main__", ["--run=run", "--only=tasks", "--tasks="], '"prompts": {}'),
    "report.md": ("verdict.__main__", ["--run=run", "--only=report"], "criterion"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_kept_is_printed(place, name, capfd):
    (place / "prompts.txt").write_text("Hi\n")
    (place / "run" / name).mkdir()
    script, given, figures = LOST[name]
    given = [*given, "--device=cpu"]
    given += ["--max_new_tokens=2"] if script != "eval_ppl" else []
    ended = run(script, given, capfd)
    assert ended.code == 1 and figures in ended.out
    assert ": error: " in ended.err.splitlines()[-1] and "Traceback" not in ended.err
