"""Training speed beside nanoGPT and Hugging Face's Trainer: same shape, data, batch and device.

Each side runs as it comes: our train.py, nanoGPT's train.py, and a Trainer with its defaults.

Usage:
    python -m benchmarks.compare_training --nanogpt=PATH
    python -m benchmarks.compare_training --nanogpt=PATH --device=cuda --config=config/1b.py
"""

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks import alternate
from benchmarks.alternate import Contender
from benchmarks.step import random_bins
from nanosynth import UserError, settings
from nanosynth.settings import setting

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
SIZES = (*SHAPE, "rows_per_step", "micro_batch_size")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(settings.Settings):
    """Tokens/s of training, ours against nanoGPT's and the Trainer's."""

    nanogpt: str = setting("", "a checkout of github.com/karpathy/nanoGPT; empty: without it")
    trainer: bool = setting(True, "Hugging Face's Trainer too")
    config: str = setting("", "take the shape and batch of this config file of ours")
    n_layer: int = setting(4, "blocks")
    n_head: int = setting(4, "attention heads")
    n_embd: int = setting(256, "channels")
    block_size: int = setting(256, "context, in tokens")
    rows_per_step: int = setting(16, "rows of a step")
    micro_batch_size: int = setting(16, "rows at once")
    device: str = setting("cpu", "cpu or cuda")
    compile: bool = setting(True, "compile ours and nanoGPT; the Trainer runs as it comes")
    pairs: int = setting(3, "turns of each side")
    steps: int = setting(3, "timed steps a turn; the turn counts by their median")
    json: str = setting("", "file for the figures")


def contenders(config: CompareConfig, sizes: dict[str, int], folder: Path) -> list[Contender]:
    n_tokens = sizes["rows_per_step"] * sizes["block_size"]
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    where = [f"--data_dir={folder / 'data'}", f"--device={config.device}"]
    half = "float16" if config.device.startswith("cuda") else "bfloat16"
    found = []
    for dtype in (half, "bfloat16" if half == "float16" else "float32"):
        endless = "--max_steps=1000000 --eval_interval=1000000 --save_interval=1000000"
        command = ["train.py", *flags, *where, f"--dtype={dtype}", f"--compile={config.compile}"]
        command += [*endless.split(), "--log_interval=1", "--hang_seconds=1e6"]
        command += ["--keep_last=2", "--eval_rows=16", f"--out_dir={folder / dtype}"]
        name = f"nanosynth, {dtype}"
        found.append(Contender(name=name, command=command, line=r"^step +\d+/", n_tokens=n_tokens))
    if config.nanogpt:
        dtype = half if half == "float16" else "float32"  # on a CPU it has no other
        found.append(nanogpt(config, sizes, folder, dtype, n_tokens))
    # On a GPU float32 is nobody's choice, and the 1B would not fit.
    trainers = (half,) if half == "float16" else ("float32", half)
    for dtype in trainers if config.trainer else ():
        out_dir = folder / f"trainer-{dtype}"
        command = ["-m", "benchmarks.hf_trainer", *flags, *where, f"--dtype={dtype}"]
        found.append(
            Contender(
                name=f"Trainer, {dtype}",
                command=[*command, f"--out_dir={out_dir}"],
                line=r"'loss'",
                n_tokens=n_tokens,
            )
        )
    return found


def nanogpt(
    config: CompareConfig, sizes: dict[str, int], folder: Path, dtype: str, n_tokens: int
) -> Contender:
    """Its train.py, with our bins as its data set."""
    checkout = Path(config.nanogpt).resolve()
    if not (checkout / "configurator.py").is_file():
        raise UserError(f"--nanogpt={config.nanogpt}: no nanoGPT there; git clone it first")
    flags = [f"--{name}={sizes[name]}" for name in SHAPE]
    n_steps = sizes["rows_per_step"] // sizes["micro_batch_size"]
    return Contender(
        name=f"nanoGPT, {dtype}",
        command=[
            *("train.py", *flags, f"--batch_size={sizes['micro_batch_size']}", "--bias=True"),
            f"--gradient_accumulation_steps={n_steps}",
            *(f"--dataset={folder / 'data'}", f"--out_dir={folder / 'nanogpt'}"),
            *(f"--device={config.device}", f"--dtype={dtype}", f"--compile={config.compile}"),
            *("--eval_iters=1", "--eval_interval=1000000", "--max_iters=1000000"),
            *("--learning_rate=2e-4", "--weight_decay=1e-2"),
        ],
        line=r"^iter \d+: loss",
        n_tokens=n_tokens,
        folder=checkout,
    )


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """(ours, peer): our fastest against each peer, and each peer's dtype against ours of it."""
    ours = [name for name in names if name.startswith("nanosynth")]
    peers = [name for name in names if not name.startswith("nanosynth")]
    dtype = {name: name.split(", ")[1] for name in names}
    found = [(ours[0], peer) for peer in peers]
    found += [(a, peer) for a in ours[1:] for peer in peers if dtype[a] == dtype[peer]]
    return [*found, (ours[0], ours[1])]


def main(config: CompareConfig) -> None:
    sizes = {name: getattr(config, name) for name in SIZES}
    if config.config:
        given = settings.read_config(config.config)
        sizes |= {name: given[name] for name in SIZES if name in given}
    sizes |= {
        name: getattr(config, name) for name in SIZES if config.origins.get(name) == "command line"
    }
    with tempfile.TemporaryDirectory() as folder:
        random_bins(str(Path(folder) / "data"), sizes["block_size"])
        speeds, lines = alternate.alternate(
            contenders(config, sizes, Path(folder)),
            n_pairs=config.pairs,
            n_units=config.steps,
            n_untimed=1,
            n_first=4,
            fresh=config.device.startswith("cuda"),  # together they would not fit
        )
    versions = {"transformers": version("transformers")} if config.trainer else {}
    facts = alternate.circumstances(config.device, **versions)
    ratios = alternate.pair_up(speeds, pairs(list(speeds)))
    alternate.report(ratios, {**facts, **sizes}, "tokens", config.json, last_lines=lines)


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(CompareConfig))
