"""Time from the start of the process to the first training step: config/demo.py beside nanoGPT.

Both on the same random tokens, without compilation, after two evaluation batches each.

Usage:
    python -m benchmarks.compare_startup --nanogpt=PATH
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import alternate
from benchmarks.alternate import Contender
from benchmarks.step import random_bins
from nanosynth import settings
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class StartConfig(settings.Settings):
    """Seconds to the first step, ours against nanoGPT's."""

    nanogpt: str = setting("", "a checkout of github.com/karpathy/nanoGPT")
    config: str = setting("config/demo.py", "the run of ours; nanoGPT takes its shape")
    device: str = setting("cpu", "cpu or cuda")
    pairs: int = setting(7, "starts of each side")
    json: str = setting("", "file for the figures")


def main(config: StartConfig) -> None:
    ours = settings.read_config(config.config)
    with tempfile.TemporaryDirectory() as folder:
        data = random_bins(str(Path(folder) / "data"), ours["block_size"])
        shape = ("n_layer", "n_head", "n_embd", "block_size")
        n_steps = ours["rows_per_step"] // ours["micro_batch_size"]
        where = (f"--device={config.device}", "--compile=False")
        contenders = [
            Contender(
                name="nanosynth",
                command=[
                    *("train.py", config.config, *where, f"--data_dir={data}"),
                    *(f"--out_dir={folder}/out", "--log_interval=1"),
                ],
                line=r"^step +0/",
                n_tokens=1,
            ),
            Contender(
                name="nanoGPT",
                command=[
                    *("train.py", *where, *(f"--{name}={ours[name]}" for name in shape)),
                    *(f"--batch_size={ours['micro_batch_size']}", "--bias=True"),
                    f"--gradient_accumulation_steps={n_steps}",
                    *(f"--dataset={data}", f"--out_dir={folder}/nanogpt", "--eval_iters=1"),
                ],
                line=r"^iter 0: loss",
                n_tokens=1,
                folder=Path(config.nanogpt).resolve(),
            ),
        ]
        speeds = alternate.starts(contenders, config.pairs)
    ratios = alternate.pair_up(speeds, [("nanosynth", "nanoGPT")])
    alternate.report(ratios, alternate.circumstances(config.device), "starts", config.json)


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(StartConfig))
