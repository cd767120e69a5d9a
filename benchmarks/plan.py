"""What a run will take, computed before a GPU is paid for: memory, steps, device-hours, disk.

Memory is read from the graphs that torch.compile would run, traced without computing anything. It
leaves out what only a GPU knows: its context, its libraries' workspaces, fragments.

Usage:
    python -m benchmarks.plan config/1b.py
    python -m benchmarks.plan config/124m.py --gpu=T4 --memory_gb=16 --mfu=0.25 --n_devices=1
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from functorch.compile import (
    aot_function,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

import train
from model import GPT, GPTConfig
from nanosynth import device, settings
from nanosynth.settings import setting
from nanosynth.table import table
from nanosynth.training.micro_batch import MEMORY_SHARE

SIZES = (4, 8, 16)  # rows at once, beside the run's own
# What inductor calls a library for. All else it fuses into what comes before or after.
PRODUCTS = ("mm", "addmm", "bmm", "scaled_dot_product", "embedding_dense_backward", "index_put")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(train.TrainConfig):
    """What a run of train.py will take, by its settings and these assumptions."""

    gpu: str = setting("H100", "whose peak FLOP/s counts", group="The plan's assumptions")
    memory_gb: float = setting(80.0, "of a GPU", above=0)
    n_devices: int = setting(8, "GPUs", at_least=1)
    mfu: float = setting(0.4, "share of the peak that training reaches", above=0, at_most=1)
    rate: float = setting(0.0, "tokens/s of one GPU; 0: as mfu has it", at_least=0)
    start_seconds: float = setting(60.0, "of all GPUs until the first step", at_least=0)
    tokens: int = setting(412_000_000, "of training, where data_dir is not there", at_least=1)


class Pass(NamedTuple):
    """Bytes that a part of the model takes in a training step, its parameters not counted."""

    forward: int  # at most, its input included
    saved: int  # left for the backward pass
    backward: int  # at most, what was saved included


def trace(module: nn.Module, *inputs: torch.Tensor, dtype: torch.dtype) -> Pass:
    """Of the graphs that torch.compile would make of `module`. Call under FakeTensorMode."""
    graphs: list[Graph] = []

    def keep(traced: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(traced.graph)
        return make_boxed_func(traced.forward)

    parameters = dict(module.named_parameters())
    compiled = aot_function(
        lambda parameters, *inputs: functional_call(module, parameters, inputs),
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with device.autocast(torch.device("cpu"), dtype):
        compiled(parameters, *inputs).sum().backward()
    forward, backward = graphs
    # Parameters are the first inputs, and have the same names in both graphs.
    static = {node.name for node in forward.find_nodes(op="placeholder")[: len(parameters)]}
    _, *saved = forward.output_node().args[0]
    kept: dict[int, int] = {}
    for node in saved:
        kept |= storages(node) if node.name not in static else {}
    return Pass(peak_bytes(forward, static), sum(kept.values()), peak_bytes(backward, static))


def storages(node: Node) -> dict[int, int]:
    """Bytes of each piece of memory that a node's tensors lie in; a view has its base's."""
    found = (leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor))
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in found}


def peak_bytes(graph: Graph, static: set[str]) -> int:
    """The most bytes that a graph has in memory at once, without the inputs named in `static`.

    What is fused is never written: a result is, where a library makes or takes it, or the graph
    returns it.
    """
    nodes = list(graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    memory = {node: storages(node) for node in nodes}
    calls = {node for node in nodes if node.op in ("placeholder", "output") or is_product(node)}
    written: dict[int, int] = {}
    for node in calls:
        for taken in (node, *node.all_input_nodes):
            written |= memory[taken]
    for node in calls:
        if node.name in static:
            written = {key: size for key, size in written.items() if key not in memory[node]}
    # Where a node's result is read last, be it by what is fused with its readers.
    last: dict[Node, int] = {}
    for node in reversed(nodes):
        last[node] = place[node]
        for user in node.users:
            is_read = user in calls or written.keys() & (memory[user].keys() - memory[node].keys())
            last[node] = max(last[node], place[user] if is_read else last[user])
    spans: dict[int, tuple[int, int]] = {}
    for node in nodes:
        for key in memory[node].keys() & written.keys():
            began, ended = spans.get(key, (place[node], 0))
            spans[key] = (began, max(ended, last[node]))
    return max(
        sum(written[key] for key, (began, ended) in spans.items() if began <= now <= ended)
        for now in range(len(nodes))
    )


def is_product(node: Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.lstrip("_").startswith(PRODUCTS)


def state_bytes(shape: GPTConfig, optimizer: str) -> int:
    """Of weights, gradients and moments, all in float32: AdamW has two, Muon one for a matrix."""
    model = new_model(shape)
    matrices = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    return 16 * model.n_parameters() - 4 * matrices * (optimizer == "muon")


def step_bytes(shape: GPTConfig, n_rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Peak bytes of a training step of `n_rows` full rows beside `state_bytes`: compiled, and with
    gradient_checkpointing too.
    """
    with FakeTensorMode():
        model = GPT(replace(shape, n_layer=1))
        ends = GPT(replace(shape, n_layer=0))  # embedding and head
        ids = torch.zeros(n_rows, shape.block_size, dtype=torch.long)
        x = torch.empty(n_rows, shape.block_size, shape.n_embd, requires_grad=True)
        block = trace(model.transformer.h[0], x, dtype=dtype)
        head = trace(ends, ids, ids.flatten(), dtype=dtype)
    peaks = []
    for kept in (block.saved, 4 * x.numel()):  # of each block until its backward pass
        inside = shape.n_layer * kept + max(head.forward, head.backward)
        within = (shape.n_layer - 1) * kept + max(block.forward, block.backward)
        peaks.append(max(inside, within))
    return peaks[0], peaks[1]


def new_model(shape: GPTConfig) -> GPT:
    """Without memory for its weights."""
    with torch.device("meta"):
        return GPT(shape)


def memory(config: PlanConfig) -> str:
    """A table of gigabytes by rows at once."""
    dtype = device.choose_dtype(config.dtype, torch.device("cuda"))
    shape, limit = train.model_config(config), MEMORY_SHARE * 1e9 * config.memory_gb
    rows = [["rows at once", "GPUs at most", "compiled", "with gradient_checkpointing"]]
    sizes = {*SIZES} if config.micro_batch_size == "auto" else {*SIZES, config.micro_batch_size}
    for n_rows in sorted(n for n in sizes if config.step_rows % n == 0):
        state = state_bytes(shape, config.optimizer)
        peaks = [state + peak for peak in step_bytes(shape, n_rows, dtype)]
        cells = [f"{peak / 1e9:.1f} GB" + " (too much)" * (peak > limit) for peak in peaks]
        rows.append([str(n_rows), str(config.step_rows // n_rows), *cells])
    return table(rows, left=(), markdown=True)


@dataclass(frozen=True, kw_only=True)
class Hours:
    """Device-hours of a run, by what they go to."""

    starting: float
    training: float
    evaluating: float

    @property
    def whole(self) -> float:
        return self.starting + self.training + self.evaluating


def hours(config: PlanConfig, n_steps: int, rate: float) -> Hours:
    """At `rate` tokens/s of one device."""
    row_hours = config.block_size / rate / 3600
    # A forward pass alone is a third of a step's work.
    evaluations = n_steps // config.eval_interval * config.eval_rows / 3
    return Hours(
        starting=config.start_seconds * config.n_devices / 3600,
        training=n_steps * config.step_rows * row_hours,
        evaluating=evaluations * row_hours,
    )


def report(config: PlanConfig) -> str:
    peak = device.peak_flops(config.gpu, torch.float16)
    if not peak:
        known = ", ".join(device.PEAK_FLOPS_16BIT)
        config.refuse("gpu", f"wanted one whose peak is known: {known}")
    train.check_divides(config, config.n_devices)
    model = new_model(train.model_config(config))
    n_parameters = model.n_parameters()
    rate = config.rate or config.mfu * peak / model.flops(1, 1)
    whose = "assumed" if config.rate else f"assumed: {config.mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s"
    n_tokens, source = config.tokens, "assumed: no bins in data_dir"
    if (Path(config.data_dir) / "meta.json").exists():
        split, _ = train.open_splits(config)
        n_tokens, source = split.n_rows(config.block_size) * config.block_size, config.data_dir
    step_tokens = config.step_rows * config.block_size
    n_steps = config.max_steps or math.ceil(config.epochs * n_tokens / step_tokens)
    spent = hours(config, n_steps, rate)
    parts = f"{spent.training:.2f} training, {spent.evaluating:.2f} evaluating"
    n_fitting = int(
        n_steps * (config.budget_hours - spent.starting) / (spent.whole - spent.starting)
    )
    verdict = f"within the budget of {config.budget_hours:g}"
    if n_fitting < n_steps:
        what = f"in which fit --max_steps={n_fitting}"
        if n_fitting < 1:
            what = "which starting alone takes; use fewer GPUs"
        verdict = f"over the budget of {config.budget_hours:g}, {what}"
    n_kept = config.keep_last + 2  # the best, and the one that is being written
    facts = [
        ["parameters", f"{n_parameters:,}"],
        ["steps", f"{n_steps:,} of {step_tokens:,} tokens, of {n_tokens:,} ({source})"],
        ["tokens/s", f"{rate:,.0f} a GPU ({whose})"],
        ["device-hours", f"{spent.whole:.2f}: {parts}, {spent.starting:.2f} starting"],
        ["", verdict],
        ["disk", f"{12e-9 * n_parameters * n_kept:.0f} GB for {n_kept} checkpoints"],
    ]
    title = f"computed for {config.n_devices} x {config.gpu}, not measured"
    return f"{title}\n\n{table(facts, left=(0, 1))}\n\npeak memory of a GPU\n\n{memory(config)}"


def main(config: PlanConfig) -> None:
    print(report(config))


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(PlanConfig, config_file=True))
