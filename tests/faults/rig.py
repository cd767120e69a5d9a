"""Tiny runs of train.main in warm forks, under torchrun, and the comparison of their ends.

Children are forked by a server that has imported torch and train, so a trial costs tenths of a
second. They run train.py as it is, but with an embedding of VOCABULARY rows: the 50,304 of GPT-2
would make a step ten times slower and no promise here depends on their number.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # noqa: F401  AdamW imports it when it is built: 2 s, here paid once

import tiny
import train
from faults import plant
from nanosynth import checkpoint, settings

STEPS = 24
FLAGS = {
    **tiny.RUN,
    "n_layer": 1,
    "dropout": 0.1,
    "dtype": "float16",
    "loss_on": "assistant",
    "max_steps": STEPS,
    "eval_interval": 8,
    "eval_rows": 4,
    "save_interval": 4,
    "keep_last": 2,
    "log_interval": 1,
    "hang_seconds": 120.0,
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(tiny.REPO), str(tiny.REPO / "tests")]),
}
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
CONTEXT = multiprocessing.get_context("forkserver")


def write_bins(data_dir: Path) -> str:
    """Random documents; every other token is an assistant's, so each row has targets."""
    random = np.random.default_rng(0)
    ids = random.integers(0, plant.VOCABULARY, (120, 40)).tolist()
    documents = [(row, [0, 1] * 20) for row in ids]
    return tiny.write_bins(data_dir, {"train": documents[:100], "val": documents[100:]})


def fork(target: Callable, *arguments: object) -> multiprocessing.Process:
    """Start `target` in a fork of the warm server."""
    with mock.patch.dict(os.environ, ENVIRONMENT):
        CONTEXT.set_forkserver_preload(["faults.rig"])
        multiprocessing.forkserver.ensure_running()
    process = CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def end(process: multiprocessing.Process, seconds: float = 60.0) -> int:
    """The exit code of a process that ends by itself."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"a run did not end within {seconds} s")
    return process.exitcode


def _train(flags: dict, fault: str, log: str, environment: dict, path: str) -> None:
    """In the child: train.main with its output in `log`."""
    os.environ.update(environment)
    sys.path.insert(0, path)
    sys.argv[0] = "train.py"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    torch.set_num_threads(1)
    plant.plant(fault)
    with settings.one_line_errors():
        train.main(train.TrainConfig(**flags))


class Run:
    """A run's folder and the processes that work on it."""

    def __init__(self, tiny_bins: str, out_dir: Path, *, n_ranks: int = 1, **changes):
        self.out_dir, self.n_ranks = out_dir, n_ranks
        self.flags = {**FLAGS, "data_dir": tiny_bins, "out_dir": str(out_dir), **changes}
        self.log_path = out_dir.with_name(out_dir.name + ".log")
        self.seconds = 0.0  # that `finish` took

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def start(self, fault: str = "", path: str = "", **environment: str) -> list:
        """Fork the ranks; the caller ends them."""
        world = {"WORLD_SIZE": str(self.n_ranks), "MASTER_ADDR": "127.0.0.1"}
        world["MASTER_PORT"] = str(free_port())
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.n_ranks))
        return [
            fork(_train, self.flags, fault, str(self.log_path), world | rank | environment, path)
            for rank in ranks
        ]

    def finish(self, fault: str = "", codes: tuple = (0,), **keywords: str) -> "Run":
        """Run, or go on, to the end; every rank exits with one of `codes`."""
        started = time.monotonic()
        processes = self.start(fault, **keywords)
        try:
            found = [end(process) for process in processes]
        finally:
            for process in processes:
                process.kill()
        self.seconds = time.monotonic() - started
        assert set(found) <= set(codes), f"exit codes {found}: {self.log[-2000:]}"
        return self

    def torchrun(self, fault: str, *options: str, port: int = 0) -> subprocess.Popen:
        """Launch the ranks by torchrun, with a fault planted; with a port, one node of a rank."""
        node = [f"--nnodes={self.n_ranks}", "--rdzv_backend=c10d", "--nproc_per_node=1"]
        node += [f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=faults"]
        ranks = node if port else ["--standalone", f"--nproc_per_node={self.n_ranks}"]
        command = [sys.executable, "-m", "torch.distributed.run", *ranks, *options]
        command += [f"--signals-to-handle={SIGNALS}", "--"]
        command += [str(Path(plant.__file__)), fault, *tiny.flags(**self.flags)]
        with open(self.log_path, "ab") as log:
            environment = {**os.environ, **ENVIRONMENT}
            return subprocess.Popen(
                command, cwd=tiny.REPO, env=environment, stdout=log, stderr=log, process_group=0
            )

    def wait_for(self, step: int, seconds: float = 60.0) -> None:
        """Until metrics.jsonl has this step."""
        wanted = f'"step": {step},'
        wait(lambda: wanted in read(self.out_dir / "metrics.jsonl"), seconds, self.log_path)

    def complaints(self, reference: "Run") -> list[str]:
        """Where the end state differs from the uninterrupted run's."""
        try:
            found, wanted = end_state(self.out_dir), end_state(reference.out_dir)
        except Exception as error:
            return [f"no end state: {error!r}"]
        return [f"{key} differ" for key in wanted if not same(found[key], wanted[key])]

    def remove(self) -> None:
        shutil.rmtree(self.out_dir, ignore_errors=True)
        self.log_path.unlink(missing_ok=True)


def read(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    return ""


def wait(condition: Callable[[], object], seconds: float, log: Path | None = None) -> None:
    """Until `condition` holds; AssertionError after `seconds`."""
    limit = time.monotonic() + seconds
    while not condition():
        said = read(log)[-1500:] if log else ""
        assert time.monotonic() < limit, f"nothing came of it within {seconds} s: {said}"
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def is_open(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


def end_state(run_dir: Path, step: int = STEPS) -> dict:
    """All that must be equal: weights, moments, scaler, guard and the losses, in order."""
    path = checkpoint.folder(run_dir, step)
    meta = checkpoint.verify(path)
    state = checkpoint.read_train_state(path)
    del state["metrics_bytes"]  # the lines also hold times
    return {
        "weights": meta["files"][checkpoint.MODEL]["sha256"],
        **state,
        "losses": progress(tiny.read_metrics(run_dir)),
        "steps": [r["step"] for r in tiny.read_metrics(run_dir) if r["split"] == "train"]
        == list(range(step)),
    }


def progress(records: list[dict]) -> list[tuple]:
    """The records without their times."""
    keys = ("step", "split", "loss", "grad_norm", "loss_scale", "skipped", "lr", "rows")
    return [tuple(record.get(key) for key in keys) for record in records]


def same(left: object, right: object) -> bool:
    """Equal bit for bit, in nested dicts and lists of tensors and plain values."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def verified(run_dir: Path) -> list[int]:
    """The steps whose folders verify."""
    good = []
    for step in checkpoint.steps(run_dir):
        with contextlib.suppress(checkpoint.Damaged):
            checkpoint.verify(checkpoint.folder(run_dir, step))
            good.append(step)
    return good


def workers(launcher: int) -> dict[int, int]:
    """rank -> pid of a torchrun's workers that live."""
    found = {}
    for pid in read(Path(f"/proc/{launcher}/task/{launcher}/children")).split():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks = [int(entry[5:]) for entry in variables if entry.startswith(b"RANK=")]
            found.update(dict.fromkeys(ranks, int(pid)))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    status = read(Path(f"/proc/{pid}/stat"))
    return bool(status) and status.rpartition(")")[2].split()[0] != "Z"


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """End a launcher and its workers, whatever the test found."""
    try:
        yield process
    finally:
        pids = [*workers(process.pid).values(), process.pid]
        for pid in pids if process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


_metrics_bytes: dict[str, int] = {}  # by the hash of train_state.pt


def metrics_bytes(path: Path) -> int:
    """What a verified step folder knows of metrics.jsonl."""
    key = checkpoint.read_meta(path)["files"][checkpoint.TRAIN_STATE]["sha256"]
    if key not in _metrics_bytes:
        _metrics_bytes[key] = checkpoint.read_train_state(path)["metrics_bytes"]
    return _metrics_bytes[key]


def saver(run_dir: Path) -> Callable[..., list[str]]:
    """`save(step, val_loss)`: train.save of a tiny state without training; what the log said."""
    config = train.TrainConfig(**{**FLAGS, "out_dir": str(run_dir)})
    run_dir.mkdir(parents=True, exist_ok=True)
    model = tiny.tiny_model(n_layer=1)
    optimizer = train.optim.build_optimizer(
        "adamw", model, weight_decay=0.1, betas=(0.9, 0.95), world=tiny.ALONE
    )
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    run = tiny.run_of(
        model,
        optimizer,
        config=config,
        scaler=torch.amp.GradScaler("cpu"),
        guard=train.optim.SpikeGuard(8.0, tiny.CPU),
        identity={"seed": 1},
    )
    said: list[str] = []
    saver = ThreadPoolExecutor(max_workers=1)
    path = run_dir / "metrics.jsonl"
    file = train.MetricsFile(path, path.stat().st_size if path.exists() else 0)
    console = mock.Mock(say=said.append)
    log = train.RunLog(file, console, world=tiny.ALONE, peak=None)

    def save(step: int, val_loss: float | None = None) -> list[str]:
        with torch.no_grad():
            model.lm_head.weight += 1.0
        file.write({"step": step, "note": "x" * 100})
        said.clear()
        train.save(run, step, log, val_loss, saver).result()
        return list(said)

    return save
