"""How long things take on a device: marks, a profiled step, a plain matrix product.

What is timed is handed in: nothing here knows the model or the training step.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

STEP = "timing: one step"  # the profiled range
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}


class Interval(NamedTuple):
    name: str
    host: float  # seconds
    device: float  # seconds of the GPU's own timeline; on a CPU, the host's


class Clock:
    """Times between marks. On CUDA a mark is an event in the stream, so that it waits for nothing
    and the steps overlap as they do in training.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []

    def mark(self, name: str = "") -> None:
        """End the interval before, and begin one with this name."""
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((name, time.perf_counter(), event))

    def intervals(self) -> list[Interval]:
        """What passed between each mark and the next; waits for the device."""
        found = []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for (name, began, first), (_, ended, second) in zip(
            self._marks, self._marks[1:], strict=False
        ):
            host = ended - began
            found.append(Interval(name, host, first.elapsed_time(second) / 1e3 if first else host))
        return found


def by_name(intervals: list[Interval]) -> dict[str, Interval]:
    """Intervals of one name added up."""
    return {
        name: Interval(
            name,
            sum(interval.host for interval in intervals if interval.name == name),
            sum(interval.device for interval in intervals if interval.name == name),
        )
        for name in {interval.name for interval in intervals}
    }


def profile(take_step: Callable[[], None], device: torch.device, trace: Path | None) -> dict:
    """One step's attention backend, waits of the host for the device, and dearest kernels.

    `trace` is a file for the whole timeline.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        torch.profiler.profile(activities=activities) as profiler,
        torch.profiler.record_function(STEP),
    ):
        take_step()
    if trace:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    on_host = [event for event in profiler.events() if event.device_type.name == "CPU"]
    (span,) = (event.time_range for event in on_host if event.name == STEP)
    # The profiler itself waits for the device, behind the step.
    waits = [
        event.time_range.elapsed_us() / 1e6
        for event in on_host
        if event.name in WAITS and span.start <= event.time_range.start <= span.end
    ]
    rows = [row for row in profiler.key_averages() if row.key != STEP]
    kernels = {
        row.key: row.self_device_time_total / 1e6
        for row in rows
        if row.device_type.name == "CUDA" and not row.is_user_annotation
    }
    operators = {
        row.key: row.self_cpu_time_total / 1e6 for row in rows if row.device_type.name == "CPU"
    }
    spent = kernels if device.type == "cuda" else operators
    return {
        "attention": attention_backend({event.name for event in on_host}),
        "host_waits": len(waits),
        "host_wait_seconds": sum(waits),
        "kernel_seconds": sum(kernels.values()) if device.type == "cuda" else None,
        "dearest": sorted(map(list, spent.items()), key=lambda row: -row[1])[:10],
    }


def attention_backend(operators: set[str]) -> str:
    """The attention that ran, told by the operators that a step dispatched.

    >>> attention_backend({"aten::_scaled_dot_product_cudnn_attention"})
    'cudnn_attention'
    """
    pattern = re.compile(r"aten::_scaled_dot_product_(\w+?)(?:_backward)?")
    found = {match[1] for match in map(pattern.fullmatch, operators) if match}
    return ", ".join(sorted(found)) or "none: plain matrix products"


def matmul_seconds(device: torch.device, dtype: torch.dtype, size: int, count: int) -> list[float]:
    """Seconds of each of `count` plain matrix products of `size` x `size`, after a warm-up."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    clock = Clock(device)
    clock.mark()
    for _ in range(count):
        a @ b
        clock.mark()
    return [interval.device for interval in clock.intervals()]
