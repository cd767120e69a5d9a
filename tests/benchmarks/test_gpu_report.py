"""`make gpu` end to end on the CPU: its processes run within this one."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import train
from benchmarks import gpu, step
from nanosynth import UserError, settings
from tiny import RUN, train_run

CONFIG = {key: RUN[key] for key in ("n_layer", "n_head", "n_embd", "micro_batch_size", "dtype")}
CONFIG |= {"block_size": 32, "rows_per_step": 4}


def run_here(command: list[str], seconds: float) -> str:
    assert seconds > 0
    if command[:2] == ["-m", "benchmarks.step"]:
        argv = command[2:]
        step.main(settings.load(step.StepConfig, argv, "-m benchmarks.step", config_file=True))
    elif command[0] == "train.py":
        config = settings.load(train.TrainConfig, command[1:], "train.py", config_file=True)
        changes = {name: getattr(config, name) for name in config.origins}
        train_run(changes.pop("data_dir"), Path(changes.pop("out_dir")), **changes)
    elif command[:2] == ["-m", "benchmarks.compare_training"]:
        (file,) = (part[7:] for part in command if part.startswith("--json="))
        ratio = {"ours": "a", "peer": "b", "ours_per_second": 30.0, "peer_per_second": 20.0}
        Path(file).write_text(json.dumps({"ratios": [{**ratio, "median": 1.5}]}))
    else:
        assert command[1:] == ["pytest", "-q", "-o", "addopts=", gpu.GPU_TESTS]
        return "....\n4 passed in 3.0s\n"
    return ""


@pytest.fixture
def config(tmp_path, monkeypatch) -> gpu.GpuConfig:
    file = tmp_path / "tiny.py"
    file.write_text("".join(f"{name} = {value!r}\n" for name, value in CONFIG.items()))
    monkeypatch.setattr(gpu, "run", run_here)
    return gpu.GpuConfig(
        configs=(str(file),),
        device="cpu",
        timed_steps=2,
        new_tokens=10,
        report=str(tmp_path / "GPU.md"),
        nanogpt="checkout",
    )


def test_the_whole_report(config, monkeypatch):
    monkeypatch.setattr(gpu.plan, "step_bytes", lambda *_: (2 * 10**9, 10**9))
    monkeypatch.setattr(gpu, "VARIANTS", gpu.VARIANTS[::2])  # a bfloat16 of its own takes long
    gpu.main(config)
    text = Path(config.report).read_text()
    sections = {part.splitlines()[0]: part for part in text.split("\n## ")[1:]}
    assert list(sections) == list(gpu.SECTIONS)
    assert "4 passed" in sections["Tests that need a GPU"]
    rows = sections["Training"].splitlines()[4:]
    assert [row.split("|")[3].strip() for row in rows] == ["adamw", "muon"]
    assert all(" 2.0 GB |" in row and "flash_attention_for_cpu" in row for row in rows)
    assert "loss of steps (0, 14, 15, 29)" in sections["30 steps with a save and a resume"]
    assert [row.split("|")[1].strip() for row in sections["Sampling"].splitlines()[4:]] == [
        "1",
        "16",
    ]
    assert "1.50" in sections["Beside nanoGPT"]
    assert "none of its figures is a GPU's" in text


def test_what_fails_is_named_and_the_rest_measured(config, monkeypatch):
    def run(command, seconds):
        if "train.py" in command or "benchmarks.step" in command:
            raise gpu.Failed("it broke")
        return run_here(command, seconds)

    monkeypatch.setattr(gpu, "run", run)
    with pytest.raises(UserError, match="not measured: .*tiny.py: it broke; resume: it"):
        gpu.main(config)
    text = Path(config.report).read_text()
    assert "- resume: it broke" in text and "## Sampling" in text and "## Training" not in text


def test_no_more_time(config, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda *_: [gpu.Part("x", "Sampling", lambda seconds: [])])
    late = gpu.GpuConfig(**{**vars(config), "minutes": 1e-12})
    with pytest.raises(UserError, match="not measured: x: out of time"):
        gpu.main(late)


def test_a_process_is_ended_in_time_and_its_error_told():
    with pytest.raises(gpu.Failed, match="out of time"):
        gpu.run(["-c", "import time; time.sleep(60)"], 0.2)
    with pytest.raises(gpu.Failed, match="^ValueError: why$"):
        gpu.run(["-c", "raise ValueError('why')"], 60)
    assert gpu.run(["-c", "print('so')"], 60) == "so\n"


def test_what_is_missing_is_said(monkeypatch):
    if not torch.cuda.is_available():
        assert "no GPU that torch" in gpu.missing(gpu.GpuConfig())
    tried = gpu.GpuConfig(device="cpu")
    assert gpu.missing(tried) == ""
    assert "no nanoGPT in --nanogpt=x" in gpu.missing(gpu.GpuConfig(device="cpu", nanogpt="x"))
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu130")
    assert gpu.missing(tried) == "torch 2.10.1+cu130: wanted 2.11 or newer"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "tiktoken")
    assert gpu.missing(tried).startswith("no tiktoken in ")
