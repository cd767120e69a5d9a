"""Files that others read: written under a temporary name, synced, and renamed into place."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nanosynth import UserError, terminal


class HashedFile:
    """A new binary file that counts and hashes what is written, and syncs it when closed."""

    def __init__(self, path: Path):
        self._file = open(path, "xb", buffering=1 << 20)  # never through a link
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.error: OSError | None = None  # the first; torch.save turns it into a RuntimeError

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()

    def summary(self) -> dict:
        """{'bytes': ..., 'sha256': ...} of what was written."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, error_type: type | None, error: object, trace: object) -> None:
        with self._file:
            if error_type is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def not_through_a_link(path: str, flags: int) -> int:
    """An opener for `open`: a link in the place of a file is an OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def temporary(path: Path, kind: str = "tmp") -> Path:
    """A name beside `path` to write under. Nobody can foresee it, so no link lies in wait there,
    and nothing of the user's has it.
    """
    return path.parent / f".{kind}-{path.name}-{secrets.token_hex(8)}"  # also of "." and "/"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: a crash leaves the old content or the new, never a part.

    A text is UTF-8; the bytes of a path that are none stand in it as escapes. A device or a pipe is
    no file to replace: OSError.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "no plain file, and is not replaced", str(path))
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    unfinished = temporary(path)
    try:
        with HashedFile(unfinished) as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def json_text(value: object) -> str:
    """JSON has no NaN and no infinity: null stands for them."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2)


@contextlib.contextmanager
def printed_if_lost(found: object) -> Iterator[None]:
    """Where the files written here cannot be, what was computed for them is printed instead."""
    try:
        yield
    except OSError:
        terminal.say(json_text(found))
        raise


def writable(folder: Path, mend: str) -> Path:
    """`folder`, made where it is not there; where no file can be written in it a UserError says so
    before hours of work, and `mend`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = temporary(folder / "trial")
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error}; {mend}") from None
    return folder


def set_aside(path: Path, why: str) -> Path:
    """Rename to NAME.WHY, or NAME.WHY-2 and so on where that is taken; the new path."""
    aside, number = path.with_name(f"{path.name}.{why}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.{why}-{number}")
    os.rename(path, aside)
    return aside


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable: a rename survives a power cut only
    after this.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to write synced files into; it becomes `path`, durably, if
    nothing fails, and is gone if anything does.
    """
    unfinished = temporary(path)
    unfinished.mkdir()
    try:
        yield unfinished
        sync(unfinished)
        os.rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`published` for files that others write, below folders that may not be there.

    `path` must not exist, or be an empty folder.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"{path} is there and is no empty folder; give the name of a new one")
    new_parents = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with published(path) as unfinished:
            yield unfinished
            for part in unfinished.rglob("*"):
                sync(part)
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in new_parents:
                parent.rmdir()
        raise


LOCK = ".lock"
ENDING_SECONDS = 1.0  # a killed process holds its lock until the last of its threads has ended
# What a file system without locks answers; those of a network often have none.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a folder and hold it for this process alone, by a lock on the file .lock in it, which
    the kernel releases however the process ends; raises UserError where another process holds it.
    New folders that stay empty go again.

    Where the file system has no locks that is said, and nothing is held.
    """
    path = folder / LOCK
    new_folders = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    limit = time.monotonic() + ENDING_SECONDS
    while True:
        descriptor = not_through_a_link(str(path), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() < limit:
                time.sleep(0.02)
                continue
            raise UserError(
                f"another process works in {folder}; wait for it, end it, or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            said = f"{folder} is on a file system without locks: let no other process work there"
            print(said, file=sys.stderr)
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # its owner has removed it since it was opened
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held, so that nobody is left with a lock on no file
        os.close(descriptor)
        with contextlib.suppress(OSError):  # it is not empty
            for part in new_folders:
                part.rmdir()
