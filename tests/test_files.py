import contextlib
import errno
import fcntl
import multiprocessing
import os
import secrets
import threading
from pathlib import Path

import pytest

from nanosynth import UserError, files
from nanosynth.training.log import MetricsFile


@pytest.fixture
def others(tmp_path) -> Path:
    """A file that a link of somebody's names."""
    path = tmp_path / "others"
    path.write_text("theirs")
    return path


def test_no_link_is_followed(tmp_path, others, monkeypatch):
    """Neither in the place of a file, nor in that of its temporary name, were it foreseen."""
    monkeypatch.setattr(secrets, "token_hex", lambda n: "foreseen")
    path = tmp_path / "report.md"
    path.symlink_to(others)
    files.write_atomically(path, "ours")
    assert path.read_text() == "ours" and not path.is_symlink()
    files.temporary(path).symlink_to(others)
    for write in (files.write_atomically, lambda path, _: files.HashedFile(files.temporary(path))):
        with pytest.raises(FileExistsError):
            write(path, "new")
        assert others.read_text() == "theirs" and path.read_text() == "ours"
        files.temporary(path).unlink(missing_ok=True)
        files.temporary(path).symlink_to(others)
    (tmp_path / "metrics.jsonl").symlink_to(others)
    with pytest.raises(OSError):
        MetricsFile(tmp_path / "metrics.jsonl", 0)
    (tmp_path / files.LOCK).symlink_to(others)
    with pytest.raises(OSError), files.lock(tmp_path):
        pass
    assert others.read_text() == "theirs"


def test_temporary_names_differ(tmp_path):
    names = {files.temporary(tmp_path / "x").name for _ in range(100)}
    assert len(names) == 100 and all(len(name) > 20 for name in names)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "planted")

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="planted"):
        files.write_atomically(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_text_that_is_no_unicode_is_written(tmp_path):
    files.write_atomically(tmp_path / "x", "out/\udcff")  # as Python gives a path's odd bytes
    assert (tmp_path / "x").read_text() == "out/\\udcff"


def hold(folder: Path, ready, done) -> None:
    with files.lock(folder):
        ready.set()
        done.wait(30)


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, done), daemon=True)
    process.start()
    assert ready.wait(30)
    for _ in range(2):  # a refusal takes nothing from the holder
        with pytest.raises(UserError, match="another process works in .*"), files.lock(tmp_path):
            pass
    process.kill()
    process.join()
    with files.lock(tmp_path):
        assert (tmp_path / files.LOCK).exists()
    assert not any(tmp_path.iterdir())


def test_a_process_that_is_ending_is_waited_for(tmp_path):
    """A killed one holds the lock until its last thread has ended."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    context.Process(target=hold, args=(tmp_path, ready, done), daemon=True).start()
    assert ready.wait(30)
    threading.Timer(0.2, done.set).start()
    with files.lock(tmp_path):
        assert done.is_set()


def test_a_lock_whose_file_its_owner_removes_is_taken_anew(tmp_path, monkeypatch):
    """Between the opening and the locking: else two would hold a folder, one by a file that has no
    name any more.
    """
    intact, calls = fcntl.flock, []

    def flock(descriptor, operation):
        if not calls:
            (tmp_path / files.LOCK).unlink()
        calls.append(descriptor)
        intact(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.lock(tmp_path):
        assert len(calls) == 2 and (tmp_path / files.LOCK).exists()
        with pytest.raises(UserError), files.lock(tmp_path):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capfd, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.lock(tmp_path))
        assert "a file system without locks" in capfd.readouterr().err


@pytest.mark.parametrize("path", [".", "/", "folder/.."])
def test_a_folder_in_the_place_of_a_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write_atomically(Path(path), "x")
    assert [found.name for found in tmp_path.iterdir()] == ["folder"]


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no plain file"):
        files.write_atomically(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()
