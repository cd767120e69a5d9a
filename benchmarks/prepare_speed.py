"""Tokens/s of prepare.py, the whole command, beside raw tiktoken on the same texts, in alternation.

Usage: python -m benchmarks.prepare_speed --file=FILE.json
FILE is what prepare.py reads, best of 100,000 rows or more: the command's start counts.
Ratios are paired; their median is the result. Raw is encode_ordinary_batch on all cores, its calls
alone; 'loop' is one encode_ordinary after the other, on one core.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanosynth import settings
from nanosynth.settings import setting

ROOT = Path(__file__).resolve().parent.parent

RAW = """
import os, sys, time
from itertools import islice
from nanosynth import tokenizer
from nanosynth.data import sources
from nanosynth.data.conversations import Reject, conversation
def texts(row):
    try:
        return [text for _, text in conversation(row)]
    except Reject:
        return []
rows = sources.open_sources([sys.argv[1]]).rows()
encoding = tokenizer.encoding()
seconds = tokens = 0
while batch := list(islice(rows, 1000)):
    said = [text for row in batch for text in texts(row)]
    started = time.perf_counter()
    if sys.argv[2] == "batch":
        ids = encoding.encode_ordinary_batch(said, num_threads=os.cpu_count())
    else:
        ids = [encoding.encode_ordinary(text) for text in said]
    seconds += time.perf_counter() - started
    tokens += sum(map(len, ids))
print(tokens / seconds)
"""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(settings.Settings):
    """Paired ratios of prepare.py's tokens/s and raw tiktoken's."""

    file: str = setting("", "what prepare.py reads", path=True)
    pairs: int = setting(5, "alternations", at_least=1)
    num_threads: int = setting(os.cpu_count() or 1, "prepare.py's", at_least=1)

    def check(self) -> None:
        if not Path(self.file).is_file():
            self.refuse("file", "wanted a file that prepare.py reads")


def raw(path: str, way: str) -> float:
    """Tokens/s of tiktoken alone: 'batch' or 'loop'."""
    command = [sys.executable, "-c", RAW, path, way]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


def prepared(config: BenchmarkConfig, path: str) -> float:
    """Tokens/s of the whole command, from its start to its end."""
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as data_dir:
        command = [sys.executable, "prepare.py", f"--source={path}", f"--data_dir={data_dir}"]
        command.append(f"--num_threads={config.num_threads}")
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        seconds = time.perf_counter() - started
        meta = json.loads((Path(data_dir) / "meta.json").read_text())
    return sum(counts["tokens"] for counts in meta["splits"].values()) / seconds


def main(config: BenchmarkConfig) -> None:
    path = str(Path(config.file).resolve())
    ratios = []
    for _ in range(config.pairs):
        ours, batch, loop = prepared(config, path), raw(path, "batch"), raw(path, "loop")
        ratios.append(ours / batch)
        said = (
            f"prepare.py {ours:,.0f} tokens/s, encode_ordinary_batch {batch:,.0f}, loop {loop:,.0f}"
        )
        print(f"{said}; ratio to batch {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} of {config.pairs}, {os.cpu_count()} cores")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(BenchmarkConfig))
