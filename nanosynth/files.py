"""Files that others read: written under a temporary name, synced, and renamed into place."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nanosynth import UserError


class HashedFile:
    """A new binary file that counts and hashes what is written, and syncs it when closed."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=1 << 20)
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


def write_atomically(path: Path, content: str) -> None:
    """Replace `path` by `content`: a crash leaves the old content or the new, never a part."""
    temporary = path.with_name(f".tmp-{path.name}")
    with HashedFile(temporary) as file:
        file.write(content.encode())
    os.replace(temporary, path)
    sync(path.parent)


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
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to write into; it becomes `path` if nothing fails.

    `path` must not exist, or be an empty folder.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"{path} is there and is no empty folder; give the name of a new one")
    temporary = path.with_name(f".tmp-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            sync(part)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)
