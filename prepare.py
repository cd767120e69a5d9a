"""Conversations of any source to token bins: read, check, deduplicate, split, encode, shuffle.

Usage:
    python prepare.py --source=teknium/OpenHermes-2.5 --data_dir=data/openhermes
    python prepare.py --source=conversations.jsonl --data_dir=data/mine
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from nanosynth import UserError, chat, settings, sources
from nanosynth.settings import setting

ROWS_PER_BATCH = 1000  # encoded together


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Write data_dir/{train,val}.bin, their masks and meta.json from conversations."""

    source: str = setting(
        sources.OPENHERMES, "'sample', a .json, .jsonl or .parquet file, or a hub id"
    )
    revision: str = setting("", "hub revision; empty: the pinned one, or the newest, recorded")
    data_dir: str = setting("data/openhermes", "where the bins go")
    max_rows: int = setting(0, "a random sample of so many rows of the whole source; 0: all")
    val_fraction: float = setting(0.05, "share of first user turns that go to validation")
    seed: int = setting(42, "of the sample, the split and the documents' order")
    num_threads: int = setting(os.cpu_count() or 1, "threads of the tokenizer")

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction={self.val_fraction}; wanted between 0 and 1, as 0.05")
        if min(self.max_rows, self.seed) < 0 or self.num_threads < 1:
            raise UserError("wanted --max_rows and --seed of 0 or more, --num_threads of 1 or more")


if __name__ == "__main__":
    arguments = settings.from_argv(PrepareConfig)  # before torch takes its time

import numpy as np
import tiktoken
from tqdm import tqdm

from nanosynth import dataset


class Tally:
    """What was read, kept and dropped, and how long the documents are."""

    def __init__(self):
        self.rows_read = 0
        self.dropped: Counter[str] = Counter()
        self.columns: Counter[str] = Counter()
        self.splits = {
            split: {"documents": 0, "tokens": 0, "assistant_tokens": 0, "text_bytes": 0}
            for split in dataset.SPLITS
        }
        self.seen: set[bytes] = set()

    def count(self, split: str, turns: list[chat.Turn], mask: list[int]) -> None:
        counts = self.splits[split]
        counts["documents"] += 1
        counts["tokens"] += len(mask)
        counts["assistant_tokens"] += sum(mask)
        counts["text_bytes"] += sum(len(text.encode()) for _, text in turns)


def split_of(first_user_turn: str, val_fraction: float, seed: int) -> str:
    """'val' or 'train' by a hash of the turn, so it depends neither on row order nor on other rows.

    Case, spaces and Unicode form do not matter: variants of one prompt stay on one side.
    """
    normal = " ".join(unicodedata.normalize("NFKC", first_user_turn).casefold().split())
    digest = hashlib.sha256(f"{seed}\n{normal}".encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def selected_rows(source: sources.Source, config: PrepareConfig) -> Iterator[object]:
    """All rows, or a seeded random sample of max_rows of them in their order, in two passes."""
    if not config.max_rows:
        yield from source.rows()
        return
    n_rows = source.size if source.unit == "rows" else sum(1 for _ in source.rows())
    if config.max_rows >= n_rows:
        yield from source.rows()
        return
    chosen = np.zeros(n_rows, dtype=bool)
    chosen[np.random.default_rng(config.seed).choice(n_rows, config.max_rows, replace=False)] = True
    yield from (row for row, keep in zip(source.rows(), chosen, strict=True) if keep)


def usable(rows: list[object], tally: Tally) -> list[list[chat.Turn]]:
    """The rows' conversations; rejects and exact duplicates are counted and left out."""
    conversations = []
    for row in rows:
        tally.rows_read += 1
        if isinstance(row, dict):
            tally.columns.update(key for key, value in row.items() if value is not None)
        try:
            turns = sources.conversation(row)
        except sources.Reject as reject:
            tally.dropped[str(reject)] += 1
            continue
        digest = hashlib.blake2b(repr(turns).encode(), digest_size=16).digest()
        if digest in tally.seen:
            tally.dropped["exact duplicate"] += 1
            continue
        tally.seen.add(digest)
        conversations.append(turns)
    return conversations


def convert(source: sources.Source, config: PrepareConfig, writer: dataset.BinWriter) -> Tally:
    """Read the source to its end into the writer."""
    tally = Tally()
    rows = selected_rows(source, config)
    with tqdm(total=source.size, unit=source.unit, unit_scale=True, desc="prepare") as bar:
        while batch := list(islice(rows, ROWS_PER_BATCH)):
            conversations = usable(batch, tally)
            documents = chat.encode_conversations(conversations, config.num_threads)
            for turns, (ids, mask) in zip(conversations, documents, strict=True):
                first_user_turn = next(text for role, text in turns if role == "user")
                split = split_of(first_user_turn, config.val_fraction, config.seed)
                writer.add(split, ids, mask)
                tally.count(split, turns, mask)
            tokens = sum(counts["tokens"] for counts in tally.splits.values())
            bar.set_postfix_str(f"{tally.rows_read:,} rows, {tokens:,} tokens", refresh=False)
            bar.update(source.position - bar.n)
    return tally


def check_usable(tally: Tally, source: sources.Source, config: PrepareConfig) -> None:
    if not sum(counts["documents"] for counts in tally.splits.values()):
        columns = ", ".join(name for name, _ in tally.columns.most_common(20)) or "none"
        reasons = ", ".join(f"{reason}: {n}" for reason, n in tally.dropped.most_common())
        raise UserError(
            f"no usable row in {config.source} ({tally.rows_read} read; {reasons or 'empty'})"
            f"\n  Columns found: {columns}\n  Wanted: conversations (from/value), messages "
            "(role/content), or instruction, input and output"
        )
    for split, counts in tally.splits.items():
        if not counts["documents"]:
            raise UserError(
                f"no document fell to {split} of {tally.splits}; another --val_fraction or --seed "
                f"than {config.val_fraction} and {config.seed} will mend it"
            )


def description(
    tally: Tally, source: sources.Source, config: PrepareConfig, writer: dataset.BinWriter
) -> dict:
    """meta.json, but for what the writer adds: versions of the format, and the files' hashes."""
    lengths = np.concatenate([np.array(writer.lengths[split]) for split in dataset.SPLITS])
    quantiles = {f"p{q}": int(np.percentile(lengths, q)) for q in (1, 10, 50, 90, 99, 100)}
    return {
        **source.identity,
        **{key: asdict(config)[key] for key in ("seed", "val_fraction", "max_rows")},
        "template": chat.TEMPLATE,
        "special_ids": {
            "<|endoftext|>": chat.END_OF_TEXT,
            "<|im_start|>": chat.IM_START,
            "<|im_end|>": chat.IM_END,
        },
        "tokenizer": {"ranks_sha256": chat.RANKS_SHA256, "tiktoken": tiktoken.__version__},
        "rows_read": tally.rows_read,
        "rows_kept": tally.rows_read - tally.dropped.total(),
        "rows_dropped": dict(tally.dropped.most_common()),
        "splits": tally.splits,
        "document_tokens": quantiles,
    }


def table(meta: dict) -> str:
    """The counts of meta.json for a reader."""
    lines = [
        f"{'rows read':<48}{meta['rows_read']:>14,}",
        f"{'rows kept':<48}{meta['rows_kept']:>14,}",
    ]
    for reason, count in meta["rows_dropped"].items():
        lines.append(f"{'  dropped: ' + reason:<48}{count:>14,}")
    lines.append(f"{'':<34}" + "".join(f"{split:>14}" for split in dataset.SPLITS))
    splits = [meta["splits"][split] for split in dataset.SPLITS]
    for key in ("documents", "tokens", "assistant_tokens", "text_bytes"):
        lines.append(f"{key.replace('_', ' '):<34}" + "".join(f"{s[key]:>14,}" for s in splits))
    per_token = [f"{s['text_bytes'] / s['tokens']:>14.2f}" for s in splits]
    lines.append(f"{'bytes of text a token':<34}" + "".join(per_token))
    quantiles = "  ".join(f"{name} {value:,}" for name, value in meta["document_tokens"].items())
    lines.append(f"tokens a document: {quantiles}")
    return "\n".join(lines)


def main(config: PrepareConfig, origins: dict[str, str]) -> None:
    source = sources.open_source(config.source, config.revision)
    try:
        writer = dataset.BinWriter(config.data_dir)
        try:
            tally = convert(source, config, writer)
            check_usable(tally, source, config)
            meta = description(tally, source, config, writer)
            writer.finish(meta, config.seed)
        finally:
            writer.discard()
    except OSError as error:
        raise UserError(f"stopped while preparing {config.data_dir}: {error}") from error
    print(table(meta))
    print(f"written to {config.data_dir}")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(*arguments)
