import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed.run import get_args_parser

import train
from nanosynth import UserError, checkpoint, settings
from nanosynth.training import distributed
from tiny import ALONE, REPO, RUN, command, flags, losses, read_metrics, torchrun, train_run


def test_a_world_of_one_needs_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.start("cpu") as world:
        assert world == ALONE and world.is_main
        assert world.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert world.any(True) and not world.any(False)


ALL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


def test_a_place_in_the_world():
    assert distributed.place_in_world({}) == (0, 1, 0)
    assert distributed.place_in_world({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1, 0)
    assert distributed.place_in_world(ALL) == (1, 2, 1)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in ALL),
        *({name: "abc"} for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
        *({"WORLD_SIZE": "0"}, {"RANK": "-1"}, {"RANK": "2"}, {"LOCAL_RANK": "-1"}),
        *({"MASTER_ADDR": ""}, {"WORLD_SIZE": "1"}, {"RANK": ""}, {"WORLD_SIZE": "1" * 5000}),
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_an_incomplete_or_absurd_world_is_refused(changes, monkeypatch):
    for name, value in (ALL | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the environment has .*; unset them, or start by torchrun"):
        distributed.start("cpu").__enter__()


def test_an_error_of_rank_0_is_raised_on_every_rank():
    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        ALONE.on_main(refuse)
    assert ALONE.on_main(lambda: 7) == 7


def one_node(*arguments: str) -> list[subprocess.CompletedProcess]:
    return [torchrun(2, *arguments)]


def two_nodes(*arguments: str) -> list[subprocess.CompletedProcess]:
    """Two launchers, as on two machines that meet at an address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launch = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test")
    launch += ("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}")
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda _: command(*launch, *arguments), range(2)))


@pytest.mark.parametrize(("optimizer", "launch"), [("adamw", one_node), ("muon", two_nodes)])
def test_two_processes_equal_one(tiny_bins, tmp_path, optimizer, launch):
    """Also with dropout and uneven masks, and when the two go on from the one's checkpoint."""
    settings = {
        "optimizer": optimizer,
        "dropout": 0.1,
        "loss_on": "assistant",
        "save_interval": 3,
        "log_interval": 1,
    }
    settings |= {"rows_per_step": 12, "micro_batch_size": 3}
    wanted = train_run(tiny_bins, tmp_path / "one", **settings)
    flag_list = flags(**{**RUN, **settings, "data_dir": tiny_bins, "out_dir": tmp_path / "two"})
    nodes = launch("train.py", *flag_list)
    assert not any(node.returncode for node in nodes), [node.stderr for node in nodes]
    found = read_metrics(tmp_path / "two")
    for split in ("train", "val"):
        assert losses(found, split) == pytest.approx(losses(wanted, split), rel=1e-5)
    norms = [[r["grad_norm"] for r in records if "grad_norm" in r] for records in (found, wanted)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    models = [
        checkpoint.read_model(path, checkpoint.verify(path))
        for path in (tmp_path / "one/step_000006", tmp_path / "two/step_000006")
    ]
    assert set(models[0]) == set(models[1])
    said = "".join(node.stdout for node in nodes)
    assert said.count("parameters, 6 steps") == 1  # rank 0 alone speaks


def test_uneven_accumulation_is_refused_by_all_ranks(tiny_bins, tmp_path):
    settings = {**RUN, "rows_per_step": 6, "data_dir": tiny_bins, "out_dir": tmp_path}
    done = torchrun(2, "train.py", *flags(**settings))
    assert done.returncode != 0
    assert "6 rows a step do not divide over 2 GPUs" in done.stderr
    assert "--rows_per_step=4 or --rows_per_step=8" in done.stderr
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("torch/distributed")[0]


def torchrun_lines(path) -> list[list[str]]:
    """What follows torchrun in each command of a file."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line for line in text.splitlines() if "torchrun " in line and "--nproc_per" in line]
    return [shlex.split(line.split("torchrun ", 1)[1], comments=True) for line in lines]


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md", "config/slurm.sh"])
def test_torchrun_takes_the_commands_that_we_print(name):
    lines, parser = torchrun_lines(REPO / name), get_args_parser()
    assert lines
    if "--shutdown-timeout" not in parser.format_help():  # torch 2.11's: left out, as is said there
        lines = [[part for part in line if "--shutdown-timeout" not in part] for line in lines]
    for line in lines:
        found = parser.parse_args([part.replace("$SLURM_NNODES", "2") for part in line])
        assert found.training_script.endswith(".py") and found.nproc_per_node == "8"


def test_the_job_for_slurm_is_sound():
    path = REPO / "config/slurm.sh"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    n_nodes, n_gpus = (
        int(re.search(rf"--{name}=(\d+)", text)[1]) for name in ("nodes", "gpus-per-node")
    )
    (line,) = torchrun_lines(path)
    own = line[line.index("train.py") + 1 :]
    argv = [str(REPO / "config/1b.py"), *own[1:]]
    assert own[0] == "$@" and f"--nproc_per_node={n_gpus}" in line
    config = settings.load(train.TrainConfig, argv, "train.py", config_file=True)
    train.check_divides(config, n_nodes * n_gpus)


def test_a_signal_sent_twice_at_once_is_one_request():
    handlers = [signal.getsignal(number) for number in distributed.StopSignal.SIGNALS]
    try:
        stop = distributed.StopSignal()
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert stop.requested
    finally:
        for number, handler in zip(distributed.StopSignal.SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = [signal.getsignal(number) for number in distributed.StopSignal.SIGNALS]
    try:
        stop = distributed.StopSignal()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert not stop.requested
    finally:
        for number, handler in zip(distributed.StopSignal.SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        signal.signal(signal.SIGHUP, before)


def test_a_hang_ends_the_process():
    code = (
        "import time; from nanosynth.training import distributed as d; d.expect_progress(60); "
        "d.expect_progress(0.2); time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode != 0 and "Timeout" in done.stderr
