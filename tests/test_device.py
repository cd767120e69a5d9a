import os

import pytest
import torch

from nanosynth import UserError, device
from nanosynth.device import PEAK_FLOPS_16BIT, memory_gb, model_flops_utilisation, peak_flops
from tiny import CPU


def test_auto_does_not_take_a_cpu_where_a_gpu_is_out_of_reach(tmp_path, monkeypatch):
    """As where the driver is older than the CUDA that torch was built for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path / "nvidiactl")
    assert device.choose_device("auto") == CPU
    (tmp_path / "nvidiactl").touch()
    with pytest.raises(UserError, match="finds no GPU that it can use; .* or say --device=cpu"):
        device.choose_device("auto")
    assert device.choose_device("cpu") == CPU


def set_up(monkeypatch, n_ranks: int, **environment: str) -> dict[str, str]:
    """The environment that a GPU is set up with."""
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    device.set_up_gpu(n_ranks)
    return environment


def test_a_gpu_is_set_up_unless_the_environment_says_otherwise(monkeypatch):
    products = torch.backends.cuda.matmul
    products.allow_fp16_reduced_precision_reduction = True  # torch's default
    found = set_up(monkeypatch, n_ranks=8)
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert found["TORCHINDUCTOR_COMPILE_THREADS"] == "8"  # of each rank, 64 in all
    assert not products.allow_fp16_reduced_precision_reduction
    assert not products.allow_bf16_reduced_precision_reduction
    assert set_up(monkeypatch, 100)["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    theirs = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    assert set_up(monkeypatch, 8, **theirs) == theirs


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cuda:99", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"--device={name}"):
        device.choose_device(name)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("cpu", None),
        ("NVIDIA H20", None),
        ("Quadro RTX 6000", None),
    ],
)
def test_peak_flops(name, tera):
    wanted = None if tera is None else tera * 1e12
    assert peak_flops(name, torch.float16) == wanted
    assert peak_flops(name, torch.bfloat16) == wanted
    assert peak_flops(name, torch.float32) is None


@pytest.mark.parametrize(
    ("name", "other"),
    [("NVIDIA L40", "L4"), ("NVIDIA RTX A1000", "A100"), ("NVIDIA T400 4GB", "T4")],
)
def test_a_device_does_not_take_anothers_peak(name, other):
    assert peak_flops(name, torch.float16) != PEAK_FLOPS_16BIT[other]


def test_mfu_by_hand():
    # 8 GPUs of 989 TFLOP/s at 3,956 TFLOP/s together are half used.
    assert model_flops_utilisation(3956e12, 8, 989e12) == pytest.approx(0.5)
    assert model_flops_utilisation(1e12, 1, None) is None


def test_memory_is_counted():
    assert 0.05 < memory_gb(CPU) < 100
