"""Files that others read: written under a temporary name, synced, and renamed into place."""

import hashlib
import os
from pathlib import Path


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
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
