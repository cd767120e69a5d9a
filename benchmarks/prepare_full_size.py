"""prepare.py on a file of OpenHermes-2.5's size and schema: memory, speed, and every row accounted.

Usage: python -m benchmarks.prepare_full_size --conversations=FILE.json --folder=DIR
Writes the file (1.9 GB) and the bins (2 GB, and as much again for a while) into DIR, from text of
the real conversations in FILE.json, an array in OpenHermes' schema. Prints a table for RESULTS.md.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import prepare_speed
from nanosynth import UserError, settings
from nanosynth.settings import setting

ROOT = Path(__file__).resolve().parent.parent

REAL_ROWS, REAL_BYTES = 1_001_551, 1_936_276_651
TEXT_BYTES = 1360  # of a row before the additions below: makes a file of the real size


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(settings.Settings):
    """Time and memory of prepare.py on a made file of OpenHermes-2.5's size."""

    conversations: str = setting(
        "", "JSON array of real conversations, whose text is rearranged", path=True
    )
    folder: str = setting(
        "out/full_size", "where the file and the bins go; emptied of them at last", path=True
    )
    rows: int = setting(REAL_ROWS, "of the file", at_least=1)
    part: int = setting(10, "memory is compared with a file of one in so many rows", at_least=1)
    keep: bool = setting(False, "leave the file and the bins there")
    flags: settings.MANY = setting((), "passed on to prepare.py, as --flags=--leak_check=True")

    def check(self) -> None:
        if not Path(self.conversations).is_file():
            self.refuse("conversations", "wanted a JSON array of real conversations")


class Writer:
    """Rows of rearranged text: bits of prose and code from the real turns, to a drawn length."""

    def __init__(self, path: str, seed: int = 0):
        self.chance = random.Random(seed)
        real = json.loads(Path(path).read_text())
        texts = [turn["value"] for row in real for turn in row["conversations"]]
        lines = (line for text in texts for line in text.split("\n"))
        self.bits = sorted({line for line in lines if len(line) > 2})
        self.systems = [self.text(n) for n in (60, 90, 120, 150, 200, 240, 300, 400, 500, 600)]
        self.planted: Counter[str] = Counter()  # what prepare.py is to count

    def text(self, n_characters: float) -> str:
        """Lines of the real texts, some joined to paragraphs, about so long."""
        bits, length = [], 0
        while length < n_characters:
            bit = self.bits[int(self.chance.random() * len(self.bits))]
            bits.append(bit[: int(n_characters) + 20])
            length += len(bits[-1]) + 1
        text = ("\n" if self.chance.random() < 0.6 else " ").join(bits)
        if self.chance.random() < 0.05:
            text += self.chance.choice(
                (" — café, naïve", " 你好，世界", " Привет", " 🙂👩‍🚀", " ∑ᵢ xᵢ²")
            )
        if self.chance.random() < 0.002:
            text += self.chance.choice("-= _.a#") * self.chance.randrange(100, 5000)
        return text

    def turns(self) -> list[dict]:
        """A conversation in the shares that are known: 61% are human and gpt alone."""
        chance = self.chance
        length = min(60_000.0, chance.lognormvariate(0, 1.0) * TEXT_BYTES / 1.65)
        question = 0.1 + 0.5 * chance.random()
        turns = [
            {"from": "human", "value": self.text(length * question)},
            {"from": "gpt", "value": self.text(length * (1 - question))},
        ]
        kind = chance.random()
        if kind < 0.34:
            turns.insert(0, {"from": "system", "value": chance.choice(self.systems)})
        elif kind < 0.37:
            turns.insert(0, {"from": "system", "value": ""})
        elif kind < 0.39:
            for _ in range(chance.randrange(1, 6)):
                turns.append({"from": "human", "value": self.text(80)})
                turns.append({"from": "gpt", "value": self.text(300)})
        if chance.random() < 0.3:
            for turn in turns:
                if turn["from"] != "system" or chance.random() < 0.5:
                    turn["weight"] = None if turn["from"] == "human" else 1.0
        return turns

    def row(self, number: int) -> dict:
        """A row with most columns missing, as they are, and now and then one to be left out."""
        chance = self.chance
        turns = self.turns()
        kind = chance.random()
        if kind < 0.0005:
            turns = turns[-1:]
            self.planted["does not begin with the user"] += 1
        elif kind < 0.0007:
            turns[-1]["from"] = "tool"
            self.planted["unknown role: tool"] += 1
        elif kind < 0.0009:
            turns[-1]["value"] = ""
            self.planted["empty turn: assistant"] += 1
        row: dict = {
            "conversations": turns,
            "source": SOURCES[number * len(SOURCES) // self.n_rows],
        }
        columns = {
            "category": lambda: chance.choice(("orca", "coding", "general", "math", "riddle")),
            "skip_prompt_formatting": lambda: chance.random() < 0.5,
            "custom_instruction": lambda: False,
            "system_prompt": lambda: turns[0]["value"][:100],
            "model": lambda: "gpt-4",
            "model_name": lambda: "GPT-4",
            "id": lambda: f"row-{number}",
            "idx": lambda: str(number),
            "title": lambda: turns[0]["value"][:40],
            "topic": lambda: "topic",
            "language": lambda: "English",
            "avatarUrl": lambda: "https://example.org/a.png",
            "views": lambda: chance.randrange(10**6),
            "hash": lambda: [chance.randrange(-(2**31), 2**31) for _ in range(4)],
        }
        likely = ("category", "id", "skip_prompt_formatting")
        for name, value in columns.items():
            if chance.random() < (0.3 if name in likely else 0.03):
                row[name] = value()
        return row

    def rows(self, n_rows: int) -> Iterator[dict]:
        self.n_rows = n_rows
        earlier: list[dict] = []  # some rows, for exact duplicates
        for number in range(n_rows):
            if earlier and self.chance.random() < 0.003:
                self.planted["exact duplicate"] += 1
                yield self.chance.choice(earlier)
                continue
            before = self.planted.total()
            row = self.row(number)
            if self.chance.random() < 0.01 and self.planted.total() == before:
                earlier = [*earlier[-999:], row]
            yield row


SOURCES = (
    ["slimorca"] * 11
    + "glaive metamath airoboros2.2 CamelAI EvolInstruct_70k cot_alpaca_gpt4 "
    "GPT4-LLM platypus UnnaturalInstructions lmsys1m".split()
)  # grouped, as they lie there; the first is over half


def write(path: Path, config: BenchmarkConfig, n_rows: int) -> Counter[str]:
    """The pretty-printed array; how many rows prepare.py is to leave out, by reason."""
    writer = Writer(config.conversations)
    encoder = json.JSONEncoder(ensure_ascii=False, indent=2)
    with open(path, "w", buffering=1 << 20) as file:
        for number, row in enumerate(writer.rows(n_rows)):
            lines = encoder.encode(row).replace("\n", "\n  ")
            file.write(("[\n  " if number == 0 else ",\n  ") + lines)
        file.write("\n]\n")
    return writer.planted


def resident_bytes(pid: int) -> int:
    """Of a process and its children, and theirs."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")), 0)
    return 1024 * int(own) + sum(resident_bytes(int(child)) for child in children)


def run(command: list[str]) -> tuple[float, int, str]:
    """(seconds, most resident bytes of all its processes, output)"""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.05)
    seconds = time.monotonic() - started
    output = process.stdout.read()
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return seconds, peak, output


def measure(config: BenchmarkConfig, n_rows: int) -> dict:
    """Write a file of so many rows, prepare it, and check that every row is accounted for."""
    folder = Path(config.folder)
    path, data_dir = folder / f"rows_{n_rows}.json", folder / f"bins_{n_rows}"
    started = time.monotonic()
    planted = write(path, config, n_rows)
    size = path.stat().st_size
    print(f"wrote {path}, {size:,} bytes, in {time.monotonic() - started:.0f} s", flush=True)
    command = [sys.executable, "prepare.py", f"--source={path}", f"--data_dir={data_dir}"]
    seconds, peak, output = run([*command, *config.flags])
    print(output, flush=True)
    meta = json.loads((data_dir / "meta.json").read_text())
    if (meta["rows_read"], meta["rows_dropped"]) != (n_rows, dict(planted)):
        raise UserError(f"planted {n_rows} rows, {dict(planted)}; counted {meta['rows_dropped']}")
    tokens = sum(counts["tokens"] for counts in meta["splits"].values())
    raw = prepare_speed.raw(str(path), "batch")
    if not config.keep:
        path.unlink()
        for file in data_dir.iterdir():
            file.unlink()
        data_dir.rmdir()
    return {"rows": n_rows, "bytes": size, "seconds": seconds, "peak": peak, "raw": raw} | {
        "tokens": tokens,
        "dropped": sum(planted.values()),
    }


def main(config: BenchmarkConfig) -> None:
    Path(config.folder).mkdir(parents=True, exist_ok=True)
    cases = [measure(config, n) for n in (config.rows // config.part, config.rows)]
    columns = (
        "rows, file, left out as planted, tokens, wall time, tokens/s, of raw tiktoken, memory"
    )
    print(f"| {columns.replace(', ', ' | ')} |\n{'|---' * 8}|")
    for case in cases:
        speed = case["tokens"] / case["seconds"]
        print(
            f"| {case['rows']:,} | {case['bytes']:,} bytes | {case['dropped']:,} "
            f"| {case['tokens']:,} | {case['seconds']:.1f} s | {speed:,.0f} "
            f"| {speed / case['raw']:.2f} | {case['peak'] / 1e6:,.0f} MB |"
        )
    print(f"\n{os.cpu_count()} cores; the real file has {REAL_ROWS:,} rows, {REAL_BYTES:,} bytes")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(settings.from_argv(BenchmarkConfig))
