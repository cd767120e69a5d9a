"""Damaged, foreign and hostile checkpoints: found before they are used, by name, in one line."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import rig
from faults.rig import STEPS, Run
from nanosynth import UserError, checkpoint

FILES = (checkpoint.MODEL, checkpoint.TRAIN_STATE, checkpoint.META)
NEWEST = f"step_{STEPS:06d}"


@pytest.fixture
def copy(alone, work) -> Path:
    return shutil.copytree(alone.out_dir, work / "run")


def edges(path: Path) -> Iterator[int]:
    """Where a write may stop: both ends, the header's, each 4 KiB block's, each tensor's."""
    size = path.stat().st_size
    yield from (0, 1, size // 2, size - 1)
    yield from range(4096, size, 4096)
    places = []
    if path.name == checkpoint.MODEL:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        places = [8, 8 + length]
        places += [8 + length + t["data_offsets"][0] for t in header.values() if "dtype" in t]
    elif path.name == checkpoint.TRAIN_STATE:
        places = [info.header_offset for info in zipfile.ZipFile(path).infolist()]
    yield from (place + shift for place in places for shift in (-1, 0, 1))


def damages(newest: Path, older: Path) -> Iterator[tuple[str, Path, Callable[[bytes], bytes]]]:
    """(kind, file, new content of the old) of every damage; a cut and a growth last."""
    for name in FILES:
        path = newest / name
        foreign = (older / name).read_bytes()
        yield "zeroed", path, lambda old: bytes(len(old))
        yield "zeroed block", path, lambda old: old[:64] + bytes(128) + old[192:]
        yield "of another step", path, lambda old, foreign=foreign: foreign
        yield "foreign", path, lambda old: b"hello, world"
        yield "grown", path, lambda old: old + b"\0"
        for place in sorted({p for p in edges(path) if 0 <= p < path.stat().st_size}):
            yield "cut", path, lambda old, place=place: old[:place]
    model, state = ((newest / name).read_bytes() for name in FILES[:2])
    yield "swapped", newest / checkpoint.MODEL, lambda old: state
    yield "swapped", newest / checkpoint.TRAIN_STATE, lambda old: model


def test_damage_is_found_and_an_older_one_used(copy, tally):
    row = tally("a file of the newest checkpoint cut, grown, zeroed, swapped or foreign")
    older, newest = (checkpoint.folder(copy, step) for step in checkpoint.steps(copy)[-2:])
    for kind, path, damage in list(damages(newest, older)):
        intact = path.read_bytes()
        path.write_bytes(damage(intact))
        assert path.read_bytes() != intact, f"{kind} at {path.name} changed nothing"
        said: list[str] = []
        found = checkpoint.newest_good(copy, said.append)
        is_said = len(said) == 1 and str(path) in said[0] and "\n" not in said[0]
        row.land(kind)
        row.trial([] if found == older and is_said else [f"{kind} {path}: {found}, {said}"])
        os.rename(f"{newest}.damaged", newest)
        path.write_bytes(intact)
    assert checkpoint.newest_good(copy) == newest
    row.check()


def test_bit_flips(copy, tally):
    row = tally("one bit flipped")
    chance = random.Random(5)
    newest = copy / NEWEST
    for _ in range(row.wanted):
        name = chance.choice(FILES)
        with open(newest / name, "r+b") as file:
            place = chance.randrange(os.fstat(file.fileno()).st_size)
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << chance.randrange(8)]), place)
            row.land(f"in {name}")
            try:
                checkpoint.verify(newest)
                row.trial([f"{name} byte {place} not found"])
            except UserError as error:
                row.trial([] if name in str(error) else [f"{name}: {error}"])
            os.pwrite(file.fileno(), byte, place)
    checkpoint.verify(newest)
    row.check()


def test_run_goes_on_from_the_older_one(work, fault_bins, alone, tally):
    """The newest checkpoint is damaged while the run is down: same end, and said aloud."""
    row = tally("newest checkpoint damaged, run resumed")
    for name in FILES:
        run = Run(fault_bins, work / name).finish("kill:0:14", codes=(-9,))
        with open(run.out_dir / "step_000012" / name, "r+b") as file:
            file.write(b"damage")
        run.finish()
        is_said = run.log.count("damaged checkpoint:") == 1 and name in run.log
        row.land(name)
        row.trial(run.complaints(alone) + ([] if is_said else [run.log]))
    row.check()


class Bomb:
    """Writes a canary when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def forge(path: Path, change: Callable[[dict], object] = lambda meta: None) -> None:
    """Give a step folder a meta.json whose hashes all match, as an attacker would."""
    meta = json.loads((path / checkpoint.META).read_text())
    del meta["meta_sha256"]
    for name in FILES[:2]:
        content = (path / name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        meta["files"][name] = {"bytes": len(content), "sha256": sha256}
    change(meta)
    (path / checkpoint.META).write_bytes(checkpoint._serialise(meta))


def pickled_bomb(path: Path, canary: Path) -> None:
    (path / checkpoint.TRAIN_STATE).write_bytes(pickle.dumps(Bomb(canary)))
    forge(path)


def zipped_bomb(path: Path, canary: Path) -> None:
    import torch

    torch.save({"optimizer": Bomb(canary)}, path / checkpoint.TRAIN_STATE)
    forge(path)


def huge_header(path: Path, canary: Path) -> None:
    (path / checkpoint.MODEL).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    forge(path)


def name_outside(path: Path, canary: Path) -> None:
    def change(meta: dict) -> None:
        meta["files"]["../../../etc/passwd"] = meta["files"].pop(checkpoint.MODEL)

    forge(path, change)


def link_to_file(path: Path, canary: Path) -> None:
    shutil.move(path / checkpoint.MODEL, path.parent / "elsewhere")
    (path / checkpoint.MODEL).symlink_to(path.parent / "elsewhere")


def link_to_folder(path: Path, canary: Path) -> None:
    shutil.move(path, path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def empty_meta(path: Path, canary: Path) -> None:
    (path / checkpoint.META).write_bytes(b"null")


def deep_meta(path: Path, canary: Path) -> None:
    (path / checkpoint.META).write_bytes(b"[" * 200_000)


def meta_without_files(path: Path, canary: Path) -> None:
    forge(path, lambda meta: meta.pop("files"))


def meta_without_identity(path: Path, canary: Path) -> None:
    forge(path, lambda meta: meta.pop("identity"))


def alias_to_nothing(path: Path, canary: Path) -> None:
    forge(path, lambda meta: meta["aliases"].update({"lm_head.weight": "nothing"}))


def empty_state(path: Path, canary: Path) -> None:
    import torch

    torch.save({}, path / checkpoint.TRAIN_STATE)
    forge(path)


FORGED = (deep_meta, meta_without_files, meta_without_identity, alias_to_nothing, empty_state)
HOSTILE = (pickled_bomb, zipped_bomb, huge_header, name_outside, link_to_file, link_to_folder)


@pytest.mark.parametrize(
    "attack", [*HOSTILE, *FORGED, empty_meta], ids=lambda attack: attack.__name__
)
def test_hostile_checkpoint(attack, copy, fault_bins, tally):
    """Refused, or set aside as damaged; always in one line, and nothing in it is run."""
    row = tally(f"hostile checkpoint: {attack.__name__.replace('_', ' ')}")
    canary = copy / "canary"
    attack(copy / NEWEST, canary)
    run = Run(fault_bins, copy)
    (process,) = run.start()
    code = rig.end(process)
    is_refused = code == 1 and run.log.count("error:") == 1 and len(run.log.splitlines()) == 1
    is_set_aside = code == 0 and run.log.count("damaged checkpoint:") == 1
    row.land("refused" if is_refused else "set aside")
    is_right = (is_refused or is_set_aside) and "Traceback" not in run.log and NEWEST in run.log
    row.trial([] if is_right and not canary.exists() else [run.log])
    row.check()


@pytest.mark.parametrize("wandb", ["disabled", "offline"])
def test_no_secret_is_written(wandb, work, fault_bins, tally):
    row = tally(f"a secret in the environment, wandb {wandb}: in no file")
    secret = "s3cr3t-0123456789"
    run = Run(fault_bins, work / "run", wandb=wandb)
    run.finish(WANDB_API_KEY=secret, HF_TOKEN=secret, AWS_SECRET_ACCESS_KEY=secret)
    written = list(run.out_dir.rglob("*"))
    assert any(path.suffix == ".wandb" for path in written) == (wandb == "offline"), run.log
    for path in [*written, run.log_path]:
        if path.is_file():
            row.land("files")
            row.trial([str(path)] if secret.encode() in path.read_bytes() else [])
    row.check()
