"""Where a run comes from: its starts, and the commit."""

import json
import subprocess
import sys

import torch

from nanosynth.training import provenance
from tiny import train_run


def test_a_run_keeps_its_starts(tiny_bins, tmp_path):
    for max_steps in (3, 6):
        train_run(tiny_bins, tmp_path / "x", max_steps=max_steps, save_interval=3)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert [start["first_step"] for start in config["starts"]] == [0, 3]
    assert all(start["command"] and start["date"] for start in config["starts"])
    assert config["torch"] == torch.__version__ and config["python"]


def test_the_command_is_kept_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # a script, no module
    monkeypatch.setattr("sys.argv", ["/a/train.py", "config/500m.py", "--out_dir=out/a b"])
    (start,) = provenance.starts(tmp_path / "config.json", world_size=8, device="x", first_step=0)
    assert start["command"] == "train.py config/500m.py '--out_dir=out/a b'"


def test_the_commit_is_dirty_where_files_differ_and_none_without_git(tmp_path):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x")
    assert provenance.commit(tmp_path / "missing") is None
    subprocess.run([*git, "init", "-q"], check=True)
    assert provenance.commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    clean = provenance.commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("b")
    assert provenance.commit(tmp_path) == f"{clean}-dirty"


def test_starts_of_a_broken_config_are_forgotten(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert len(provenance.starts(tmp_path / "config.json", first_step=0)) == 1
