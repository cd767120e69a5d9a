"""The process group, and the signals that stop a run. The only reader of torchrun's environment.

A plain `python train.py` is a world of one and has no process group. What must agree between ranks
travels as CPU tensors over gloo; gradients travel over nccl on CUDA.
"""

import contextlib
import ctypes
import datetime
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record as record  # for scripts

from nanosynth import UserError, files
from nanosynth.device import choose_device, set_up_gpu


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the ranks, in place. Call on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors, all of one shape, joined along the first. Call on every rank."""
        if self.size == 1:
            return tensor
        joined = tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(joined, tensor.contiguous())
        return joined

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. Call on every rank."""
        return bool(self.sum(torch.tensor(int(flag))))

    def on_main(self, action: Callable[[], object]) -> object:
        """What `action` gives on rank 0, which alone calls it; a UserError there is raised on all.
        Call on every rank.
        """
        result = [None, None]  # what it gives, or its error's text
        if self.is_main:
            try:
                result[0] = action()
            except UserError as why:
                result[1] = str(why)
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        value, error = result
        if error:
            raise UserError(error)
        return value

    @contextlib.contextmanager
    def own_folder(self, folder: Path) -> Iterator[None]:
        """Make --out_dir's folder and hold it against other processes. Call on every rank."""

        def lock() -> None:
            try:
                held.enter_context(files.lock(folder))
            except OSError as error:
                wanted = f"wanted a folder that can be written: {error}"
                raise UserError(f"--out_dir={folder}; {wanted}") from None

        with contextlib.ExitStack() as held:
            self.on_main(lock)
            yield


def place_in_world(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, size, local rank) as torchrun tells them; (0, 1, 0) where it tells nothing."""
    needed = ["RANK", "WORLD_SIZE"]
    if not any(name in environment for name in needed):
        return 0, 1, 0
    if environment.get("WORLD_SIZE") != "1":
        needed += ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    said = {name: environment.get(name, "") for name in needed}
    try:
        rank, size, local_rank = (
            int(said.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        if not all(said.values()) or not 0 <= rank < size or local_rank < 0:
            raise ValueError
    except ValueError:
        found = ", ".join(f"{name}={value!r}" for name, value in said.items())
        raise UserError(
            f"the environment has {found}; unset them, or start by torchrun, which sets them all"
        ) from None
    return rank, size, local_rank


@contextlib.contextmanager
def start(device: str, timeout_seconds: float = 600.0) -> Iterator[World]:
    """The world that torchrun describes, on `device` ('auto', 'cpu', 'cuda' or 'cuda:N').

    A collective that takes longer than the timeout raises. After an error the process is to end.
    """
    rank, size, local_rank = place_in_world(os.environ)
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        set_up_gpu(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        torch.cuda.set_device(chosen)
    if size > 1:
        _die_with_parent()
        timeout = datetime.timedelta(seconds=timeout_seconds)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        except (dist.DistError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"rank {rank} found no other at {address}: {error}") from error
        # Ranks of a restarted group must not read what the dead one left (pytorch issue 135712).
        store = dist.PrefixStore(f"try{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    yield World(rank=rank, size=size, device=chosen)
    # Only after success. On an error NCCL's shutdown waits for the other ranks, which wait for this
    # one's gradients (pytorch issue 196968): the process ends at once instead, with the watchdog
    # armed, and torchrun ends the others.
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def _die_with_parent() -> None:
    """Have the kernel end this worker when torchrun dies, even by SIGKILL (Linux, prctl(2))."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it died before the call
            os._exit(1)


def expect_progress(seconds: float) -> None:
    """End the process with all its threads' stacks unless this is called again within `seconds`."""
    faulthandler.dump_traceback_later(seconds, exit=True)


class StopSignal:
    """Set by the first SIGTERM, SIGINT, SIGHUP (a lost terminal) or SIGUSR1 (Slurm's warning); a
    later one ends the process.

    A handler does not run inside a collective, so the ranks agree on the flag at a step boundary.
    One request may come twice at once, from Slurm and through torchrun: that counts as one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    GRACE_SECONDS = 1.0

    def __init__(self):
        self.requested = False
        self._since = 0.0
        for number in self.SIGNALS:
            # nohup has SIGHUP ignored, so that a run outlives its terminal: it stays ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > self.GRACE_SECONDS:
            os._exit(128 + number)
