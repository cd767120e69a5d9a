"""Time of a CPU training step with and without `keep_freed_memory`, alternating, as paired ratios.

Usage: python benchmarks/keep_memory.py     (after prepare.py --source=sample --data_dir=data/demo)
"""

import statistics
import subprocess
import sys

STEP = """
import sys, time, torch
from model import GPT, GPTConfig
from nanosynth import device, tokenizer
from nanosynth.data import bins
if {keep}:
    device.keep_freed_memory()
split = bins.Split("data/demo", "train")
torch.manual_seed(0)
shape = dict(n_layer=4, n_head=4, n_embd=128, block_size=256)
model = GPT(GPTConfig(**shape, vocab_size=tokenizer.VOCAB_SIZE))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
times = []
for step in range(12):
    batch = bins.read_batch(split, list(range(16 * step, 16 * step + 16)), 256, "assistant")
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - start)
print(sorted(times[2:])[5])
"""


def median_step_seconds(keep: bool) -> float:
    command = [sys.executable, "-c", STEP.format(keep=keep)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    ratios = []
    for _ in range(5):
        plain, kept = median_step_seconds(False), median_step_seconds(True)
        ratios.append(plain / kept)
        print(f"plain {plain:.3f} s, kept {kept:.3f} s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
