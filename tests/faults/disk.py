"""Every write, fsync, rename and removal of a save: seen, failed on purpose, and replayed.

`watch` calls a function before each operation; that one may kill the process or raise. `PowerCut`
takes the operations and gives the folders that a power cut after them may leave: of what was not
synced, any part may be lost (OSDI 2014, All File Systems Are Not Created Equal).
"""

import contextlib
import io
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from nanosynth import files
from nanosynth.training import log


class Operation(NamedTuple):
    kind: str  # create, write, fsync, mkdir, rename, remove
    path: str
    target: str = ""  # of a rename
    data: bytes = b""  # of a write


class _Raw(io.FileIO):
    """A file whose writes and creation are told to `before`."""

    def __init__(self, path: object, mode: str, before: Callable):
        if mode == "w" or not os.path.exists(path):
            before(Operation("create", str(path)), None)
        self._before = before
        super().__init__(path, mode)

    def write(self, data: bytes) -> int:
        self._before(Operation("write", str(self.name), data=bytes(data)), super().write)
        return super().write(data)


@contextlib.contextmanager
def watch(before: Callable[[Operation, Callable | None], None]) -> Iterator[None]:
    """Call `before(operation, write)` ahead of each; `write` is the raw write where it is one."""

    def opened(path: object, mode: str, buffering: int = -1, opener: Callable | None = None):
        if "r" in mode:
            return open(path, mode, buffering, opener=opener)
        raw = _Raw(path, mode.replace("b", ""), before)
        return io.BufferedWriter(raw, buffering) if buffering else raw

    def told(kind: str, intact: Callable) -> Callable:
        def call(path: object, *arguments: object, **keywords: object) -> object:
            before(_operation(kind, path, arguments, keywords), None)
            return intact(path, *arguments, **keywords)

        return call

    kinds = {"fsync": "fsync", "rename": "rename", "replace": "rename", "mkdir": "mkdir"}
    kinds |= {"unlink": "remove", "rmdir": "remove"}
    with contextlib.ExitStack() as stack:
        for module in (files, log):
            stack.enter_context(mock.patch.object(module, "open", opened, create=True))
        for name, kind in kinds.items():
            intact = getattr(os, name)
            stack.enter_context(mock.patch.object(os, name, told(kind, intact)))
        yield


def _operation(kind: str, path: object, arguments: tuple, keywords: dict) -> Operation:
    if isinstance(path, int):
        return Operation(kind, os.readlink(f"/proc/self/fd/{path}"))
    if keywords.get("dir_fd") is not None:
        path = os.path.join(os.readlink(f"/proc/self/fd/{keywords['dir_fd']}"), path)
    return Operation(kind, str(path), str(arguments[0]) if kind == "rename" else "")


def record(action: Callable[[], object]) -> list[Operation]:
    operations: list[Operation] = []
    with watch(lambda operation, write: operations.append(operation)):
        action()
    return operations


class _File:
    def __init__(self, content: bytes = b""):
        self.content = self.synced = content


class _Folder:
    """Names by the order of their changes; those since the last fsync may be lost."""

    def __init__(self):
        self.names: dict[str, _File | _Folder] = {}
        self.synced: dict[str, _File | _Folder] = {}
        self.pending: list[tuple] = []  # (old name or None, new name or None, node)

    def change(self, old: str | None, new: str | None, node: object) -> None:
        self.pending.append((old, new, node))
        _apply(self.names, self.pending[-1])

    def sync(self) -> None:
        self.synced, self.pending = dict(self.names), []


def _apply(names: dict, change: tuple) -> None:
    old, new, node = change
    if old is not None and names.get(old) is not node:
        return  # what it renames or removes has not survived itself
    if old is not None:
        del names[old]
    if new is not None:
        names[new] = node


class PowerCut:
    """A folder's content and what of it is durable, through a list of operations."""

    def __init__(self, root: Path):
        self.root = root
        self._top = self._load(root)

    def _load(self, path: Path) -> "_File | _Folder":
        if path.is_file():
            return _File(path.read_bytes())
        node = _Folder()
        node.names = {entry.name: self._load(entry) for entry in path.iterdir()}
        node.sync()
        return node

    def _find(self, path: str) -> tuple:
        """(parent, name, node or None)"""
        parent, node, name = None, self._top, ""
        for name in Path(path).relative_to(self.root).parts:
            parent, node = node, node.names.get(name) if isinstance(node, _Folder) else None
        return parent, name, node

    def apply(self, operation: Operation) -> None:
        """Do it; one on a path that is not there (its cause was left out) does nothing."""
        parent, name, node = self._find(operation.path)
        match operation.kind:
            case "create" if isinstance(parent, _Folder) and node is None:
                parent.change(None, name, _File())
            case "create" if isinstance(node, _File):
                node.content = b""
            case "mkdir" if isinstance(parent, _Folder):
                parent.change(None, name, _Folder())
            case "write" if isinstance(node, _File):
                node.content += operation.data
            case "fsync" if isinstance(node, _File):
                node.synced = node.content
            case "fsync" if isinstance(node, _Folder):
                node.sync()
            case "rename" if node is not None:
                parent.change(name, Path(operation.target).name, node)
            case "remove" if node is not None:
                parent.change(name, None, node)

    def states(self, chance: random.Random, n_random: int) -> Iterator[Callable[[Path], None]]:
        """Functions that write one possible state each: the systematic ones, then random ones."""
        is_synced = all(file.content == file.synced for file in self._files(self._top))
        modes = ("kept",) if is_synced else ("lost", "kept", "half", "zeros")
        n_pending = len(self._pending(self._top))
        everything = set(range(n_pending))
        subsets = [set(), everything]
        subsets += [s for n in range(n_pending) for s in ({n}, everything - {n})]
        choices = list(itertools.product(subsets, modes))
        for _ in range(n_random):
            choices.append(({n for n in everything if chance.random() < 0.5}, chance.choice(modes)))
        for kept, mode in choices:
            yield lambda path, kept=kept, mode=mode: self._write(path, kept, mode)

    def _files(self, node: "_File | _Folder") -> Iterator[_File]:
        if isinstance(node, _File):
            yield node
        else:
            for child in {**node.synced, **node.names}.values():
                yield from self._files(child)

    def write_all(self, path: Path) -> None:
        """What is there without a power cut."""
        self._write(path, set(range(len(self._pending(self._top)))), "kept")

    def _pending(self, node: _Folder) -> list[tuple]:
        found = [(id(node), n) for n in range(len(node.pending))]
        reachable = {**node.synced, **node.names}
        folders = {id(n): n for n in reachable.values() if isinstance(n, _Folder)}
        return found + [entry for child in folders.values() for entry in self._pending(child)]

    def _write(self, path: Path, kept: set[int], mode: str) -> None:
        shutil.rmtree(path, ignore_errors=True)
        places = self._pending(self._top)
        self._write_folder(path, self._top, {places[n] for n in kept}, mode)

    def _write_folder(self, path: Path, node: _Folder, kept: set[tuple], mode: str) -> None:
        path.mkdir()
        names = dict(node.synced)
        for number, change in enumerate(node.pending):
            if (id(node), number) in kept:
                _apply(names, change)
        for name, child in names.items():
            if isinstance(child, _Folder):
                self._write_folder(path / name, child, kept, mode)
            else:
                (path / name).write_bytes(_survives(child, mode))


def _survives(file: _File, mode: str) -> bytes:
    """The content after the cut, where the unsynced part is lost, kept, cut in half or zeros."""
    if mode == "kept" or file.content == file.synced:
        return file.content
    n_synced = len(file.synced) if file.content.startswith(file.synced) else 0
    new = file.content[n_synced:]
    tail = {"lost": b"", "half": new[: len(new) // 2], "zeros": bytes(len(new))}[mode]
    return (file.synced if mode == "lost" else file.content[:n_synced]) + tail
