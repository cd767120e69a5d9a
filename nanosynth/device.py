"""Which device computes, in which dtype, and what makes a CPU faster at it."""

import ctypes
import sys

import torch
from torch import Tensor, nn

from nanosynth import UserError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto', 'cpu', 'cuda' (the GPU of this rank) or 'cuda:N' as a device that exists."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name}; wanted auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device={name}: no GPU {index}, {torch.cuda.device_count()} found")
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products; 'auto' takes the fastest that the device has."""
    if name != "auto":
        return DTYPES[name]
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


class PackedLinear(nn.Module):
    """A Linear for inference on a CPU, its weight laid out once as oneDNN reads it fastest.

    A plain Linear is laid out anew at each call; inductor packs by the same two operators.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def speed_up_inference(model: nn.Module, dtype: torch.dtype) -> None:
    """On a CPU, replace the model's Linears by packed ones that multiply in `dtype`, and keep freed
    memory (what each gains: benchmarks/RESULTS.md). Nothing elsewhere, or without oneDNN.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    keep_freed_memory()
    has_kernels = {
        torch.float32: torch.backends.mkldnn.is_available(),
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    if not has_kernels.get(dtype, False):
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, dtype))
