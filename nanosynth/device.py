"""Which device computes, in which dtype, how fast it could be, and how much memory it took."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

from nanosynth import UserError

# Dense 16-bit peak of one device in FLOP/s, from NVIDIA's data sheets; the first name found counts.
PEAK_FLOPS_16BIT = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}

NVIDIA_DRIVER = Path("/dev/nvidiactl")  # is there wherever the driver is loaded


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto', 'cpu', 'cuda' (the GPU of this rank) or 'cuda:N' as a device that exists."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and NVIDIA_DRIVER.exists():
            raise UserError(
                f"--device=auto: there is an NVIDIA driver ({NVIDIA_DRIVER}), but torch "
                f"{torch.__version__} finds no GPU that it can use; update the driver, install a "
                "torch built for it, or say --device=cpu"
            )
    if not re.fullmatch("cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise UserError(f"--device={name}; wanted auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device={name}: no GPU {index}, {torch.cuda.device_count()} found")
    return torch.device("cuda", index)


def set_up_gpu(n_ranks: int) -> None:
    """Torch's switches for a GPU, each unless the environment says otherwise; before the GPU is
    first used. `n_ranks` share this machine's CPUs.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Memory freed in pieces of any size serves for any other: logits, activations and an
        # evaluation's batches leave no fragments that end a run at nine tenths of the memory.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # Torch would start up to 32 compilers for each rank, and 8 ranks compile at once.
    n_compilers = max(1, min(32, (os.cpu_count() or 1) // n_ranks))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(n_compilers))
    # Parts of a product that is split over the GPU are summed in float32: in float16 a sum past
    # 65,504 overflows, and each of the parts would be rounded.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def make_deterministic() -> None:
    """Have the same program compute the same bits on the same GPU, or fail where it can't."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    # Sums without atomic additions, and no cuDNN attention, whose gradients differ.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # none is read before it's written
    torch._inductor.config.deterministic = True  # kernels are not chosen by timing them


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products; 'auto' takes the fastest that the device has."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def device_name(device: torch.device) -> str:
    """The model of the GPU, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision over float32 weights; nothing at float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of handing it back to the kernel.

    Large CPU tensors are otherwise mapped and faulted in anew at each step (what that costs:
    benchmarks/keep_memory.py). Does nothing where the C library is another one.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # malloc.h
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The device's dense peak in FLOP/s, or None where it is not known (a CPU, float32)."""
    alike = (name for name in PEAK_FLOPS_16BIT if re.search(rf"\b{name}\b", device_name))
    return None if dtype == torch.float32 else PEAK_FLOPS_16BIT.get(next(alike, ""))


def model_flops_utilisation(flops_per_second: float, n_devices: int, peak: float | None):
    """Achieved share of the devices' peak, or None where the peak is not known."""
    return flops_per_second / (n_devices * peak) if peak else None


def total_memory(device: torch.device) -> int:
    """Bytes that the GPU, or the machine, has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: the GPU's allocator, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
