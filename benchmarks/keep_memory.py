"""Time of a CPU training step with and without `keep_freed_memory`, alternating, as paired ratios.

Usage: python -m benchmarks.keep_memory
"""

import multiprocessing
import statistics
import time

import torch

from model import GPT, GPTConfig
from nanosynth import device, tokenizer

N_PAIRS = 5
ROWS, TOKENS = 16, 256
N_TARGETS = 512  # an eighth of the tokens: the share of answers in the demo's conversations


def median_step_seconds(keep: bool) -> float:
    if keep:
        device.keep_freed_memory()
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": TOKENS}
    model = GPT(GPTConfig(**shape, vocab_size=tokenizer.VOCAB_SIZE))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seconds = []
    for _ in range(12):
        ids = torch.randint(tokenizer.N_IDS, (ROWS, TOKENS))
        targets = torch.randint(tokenizer.N_IDS, (N_TARGETS,))
        places = torch.randperm(ROWS * TOKENS)[:N_TARGETS]
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, targets, places).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])  # the first two lay out memory


def main() -> None:
    ratios = []
    # A process for each: what the C library was told holds until its end.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(N_PAIRS):
            plain, kept = (pool.apply(median_step_seconds, (keep,)) for keep in (False, True))
            ratios.append(plain / kept)
            print(f"plain {plain:.3f} s, kept {kept:.3f} s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
