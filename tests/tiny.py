"""The tiny model, batches, bins and runs that several test files share."""

import faulthandler
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import train
from model import GPT, GPTConfig
from nanosynth import checkpoint, tokenizer
from nanosynth.data import bins
from nanosynth.training import distributed, optim

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "prepare", "sample", "eval_ppl")
CPU = torch.device("cpu")
ALONE = distributed.World(rank=0, size=1, device=CPU)

RUN = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "micro_batch_size": 2,
    "rows_per_step": 4,
    "max_steps": 6,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "min_learning_rate": 1e-3,
    "dtype": "float32",
    "device": "cpu",
    "eval_interval": 6,
    "eval_rows": 5,
    "save_interval": 6,
    "log_interval": 2,
}


def tiny_model(seed: int = 0, **changes) -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64}
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**shape, **changes}))


def run_of(model: GPT, optimizer: torch.optim.Optimizer, n_micro_batches: int = 1, **parts):
    """A train.Run of this model without data; `parts` replace its own."""
    own = {
        "config": train.TrainConfig(),
        "world": ALONE,
        "train_split": None,
        "val_split": None,
        "order": bins.RowOrder(
            n_rows=1, micro_batch_size=1, micro_batches_per_step=n_micro_batches, seed=42
        ),
        "max_steps": 1,
        "raw_model": model,
        "model": model,
        "optimizer": optimizer,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "guard": optim.SpikeGuard(0.0, CPU),
        "dtype": torch.float32,
        "identity": {},
    }
    return train.Run(**(own | parts))


def random_ids(*shape: int, seed: int = 0, vocab_size: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab_size, shape))


def write_bins(data_dir: Path, documents: dict[str, list[tuple[list[int], list[int]]]]) -> str:
    """Bins of these (ids, mask) documents of each split."""
    with bins.BinWriter(str(data_dir)) as writer:
        for ids, mask in itertools.chain(*documents.values()):
            writer.add(ids, mask)
        counts = [len(documents.get(split, ())) for split in bins.SPLITS]
        writer.shuffle(0, np.repeat([0, 1], counts))
        writer.publish({"source": "test"})
    return str(data_dir)


def encoded(*conversations: list[tokenizer.Turn]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each conversation."""
    found = tokenizer.encode_conversations(conversations)
    return [(ids.tolist(), mask.tolist()) for ids, mask in found]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_row(question: str, answer: str = "Yes.") -> dict:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    }


def train_run(tiny_bins: str, out_dir: Path, **changes) -> list[dict]:
    """Train within this process; the records of metrics.jsonl."""
    config = train.TrainConfig(**{**RUN, "data_dir": tiny_bins, "out_dir": str(out_dir), **changes})
    numbers = distributed.StopSignal.SIGNALS
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        train.main(config)
    finally:
        faulthandler.cancel_dump_traceback_later()  # train.main watches over its process
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    return read_metrics(out_dir)


def load_run(run_dir: Path) -> GPT:
    path = checkpoint.find(str(run_dir))
    meta = checkpoint.read_meta(path)
    model = GPT(GPTConfig(**meta["identity"]["model"]))
    model.load_state_dict(checkpoint.read_model(path, meta))
    return model.eval()


def read_metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def losses(records: list[dict], split: str = "train") -> list[float]:
    return [record["loss"] for record in records if record["split"] == split]


def flags(**values) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def command(*arguments: object) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` in the repository's root."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def torchrun(n_processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """`--` because torchrun has a --run-path of its own, which --run would abbreviate."""
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}")
    return command(*launch, "--", *arguments)
