"""Conversations of any source to token bins: read, check, deduplicate, split, encode, shuffle.

Usage:
    python prepare.py --source=teknium/OpenHermes-2.5 --data_dir=data/openhermes
    python prepare.py --source=conversations.jsonl --data_dir=data/mine

It streams: a row is read, checked and encoded while others are written, and memory stays flat
however large the source is. Every row is either in the bins or counted by the reason why not.
"""

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from nanosynth import UserError, settings, tokenizer
from nanosynth.data import conversations, sources
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(settings.Settings):
    """Write data_dir/{train,val}.bin, their masks, stats.png and meta.json from conversations."""

    source: settings.MANY = setting(
        (sources.OPENHERMES,),
        "a .json, .jsonl or .parquet file, .gz or .zst too, a folder, or a hub id",
        group="The source",
        path=True,
    )
    revision: str = setting("", "hub revision; empty: the pinned one, or the newest, recorded")
    max_rows: int = setting(
        0, "a random sample of so many rows of the whole source; 0: all", at_least=0
    )
    data_dir: str = setting("data/openhermes", "where they go", group="The bins", path=True)
    val_fraction: float = setting(
        0.05, "share of first user turns that go to validation", above=0, below=1
    )
    seed: int = setting(
        42,
        "of the sample, the split and the documents' order",
        at_least=0,
        at_most=settings.LARGEST_SEED,
    )
    num_threads: int = setting(os.cpu_count() or 1, "threads of the tokenizer", at_least=1)
    drop_refusals: bool = setting(
        False, "refusals and 'As an AI' answers", group="What to leave out"
    )
    drop_non_english: bool = setting(False, "conversations in other languages, by a rule of thumb")
    drop_runs: bool = setting(False, "conversations with 100 equal characters in a row")
    rejects: str = setting(
        "",
        "a JSON line here for each row that was left out; empty: none",
        group="What is told",
        path=True,
    )
    leak_check: bool = setting(False, "count the 13-grams that train and validation share")
    picture: bool = setting(True, "draw stats.png")


if __name__ == "__main__":
    arguments = settings.from_argv(PrepareConfig)  # before torch takes its time

import unicodedata

import numpy as np
import tiktoken
from tqdm import tqdm

from nanosynth.data import bins, ngrams, splits, stats

# Conversations are encoded together up to so many: one call of the tokenizer then takes some 20 ms,
# long beside what a call and a thread's turn cost, and the few batches that wait take some MB.
BATCH_CHARACTERS = 1 << 18
BATCH_ROWS = 1000

# The settings that the bins depend on, beside the source; meta.json keeps them.
RECIPE = "seed val_fraction max_rows drop_refusals drop_non_english drop_runs".split()


def main(config: PrepareConfig) -> None:
    source = sources.open_sources(config.source, config.revision)
    tally = stats.Tally()
    try:
        with bins.BinWriter(config.data_dir) as writer:
            write_documents(source, config, writer, tally)
            check_usable(tally, config)
            writer.shuffle(config.seed)
            meta = {**description(source, config), **tally.figures()}
            if config.leak_check:
                paths = (writer.partial / "train.bin", writer.partial / "val.bin")
                meta["leak_check"] = ngrams.shared_grams(*paths)
            if config.picture:
                title = f"{meta['source'][:100]}: {meta['rows_kept']:,} conversations"
                stats.draw(tally, writer.partial / "stats.png", title)
            writer.publish(meta)
    except OSError as error:
        raise UserError(f"stopped while preparing {config.data_dir}: {error}") from error
    print(f"{stats.summary(meta)}\n\nwritten to {config.data_dir}")


def write_documents(
    source: sources.Source, config: PrepareConfig, writer: bins.BinWriter, tally: stats.Tally
) -> None:
    """Read the source to its end into the writer: each usable conversation once, as a document."""
    started = time.monotonic()
    with (
        Rejects(config.rejects, tally) as rejects,
        tqdm(total=source.size, unit=source.unit, unit_scale=True, desc="prepare") as bar,
    ):
        usable = usable_conversations(source, config, rejects, tally)
        kept = unique_conversations(usable, config, rejects, tally)
        for batch, documents in encoded(kept, config.num_threads):
            for (turns, names, _), (ids, mask) in zip(batch, documents, strict=True):
                first_user_turn = next(text for role, text in turns if role == "user")
                split = splits.split_of(first_user_turn, config.val_fraction, config.seed)
                writer.add(split, ids, mask)
                tally.count(split, turns, names, mask)
            seconds = time.monotonic() - started
            speed = f"{tally.rows_read / seconds:,.0f} rows/s, "
            speed += f"{tally.n_tokens / seconds:,.0f} tokens/s"
            bar.set_postfix_str(speed, refresh=False)
            bar.update(source.position - bar.n)
        bar.update(source.position - bar.n)


class Conversation(NamedTuple):
    """What a row holds, and what is told of it."""

    turns: list[tokenizer.Turn]
    names: tuple[str, str]  # source and category
    place: tuple[str, int]  # file and row


class Rejects:
    """The rows that are left out: counted by reason, and a JSON line each where it is asked for.

    The file is put in its place after a failure, too: it may tell why.
    """

    def __init__(self, path: str, tally: stats.Tally):
        self._tally = tally
        self._path, self._partial = path, f"{path}.partial"
        self._file = open(self._partial, "w", encoding="utf-8") if path else None

    def add(self, place: tuple[str, int], reason: str, row: object) -> None:
        self._tally.dropped[reason] += 1
        if self._file:
            (file, number), words = place, conversations.first_words(row)
            line = {"file": file, "row": number, "reason": reason, "text": words}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __enter__(self) -> "Rejects":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()
            os.replace(self._partial, self._path)


def usable_conversations(
    source: sources.Source, config: PrepareConfig, rejects: Rejects, tally: stats.Tally
) -> Iterator[Conversation]:
    """What the selected rows hold; a row that holds no conversation is counted, and left out."""
    for row in selected_rows(source, config):
        tally.see(row)
        place = (source.part.name, source.row)
        try:
            turns = conversations.conversation(row)
        except conversations.Reject as reject:
            rejects.add(place, str(reject), row)
        else:
            yield Conversation(turns, conversations.names_of(row), place)


def selected_rows(source: sources.Source, config: PrepareConfig) -> Iterator[object]:
    """All rows, or a seeded random sample of max_rows of them in their order, in two passes."""
    if not config.max_rows:
        yield from source.rows()
        return
    n_rows = source.stated_rows or sum(1 for _ in source.rows())
    if config.max_rows >= n_rows:
        yield from source.rows()
        return
    generator, count = np.random.default_rng(config.seed), config.max_rows
    is_chosen = np.zeros(n_rows, dtype=bool)
    is_chosen[generator.choice(n_rows, count, replace=False)] = True
    for row in source.rows():
        if source.n_rows <= n_rows and is_chosen[source.n_rows - 1]:
            yield row
    if source.n_rows != n_rows:
        counts = f"{source.n_rows} rows where {n_rows} were counted"
        raise UserError(f"{', '.join(config.source)} gave {counts}; prepare it again")


def unique_conversations(
    usable: Iterable[Conversation], config: PrepareConfig, rejects: Rejects, tally: stats.Tally
) -> Iterator[Conversation]:
    """Those not seen before, and without the troubles that are to be dropped."""
    seen: set[bytes] = set()  # of digests: 84 MB for a million
    switches = (config.drop_refusals, config.drop_non_english, config.drop_runs)
    dropped = set(itertools.compress(conversations.TROUBLES, switches))
    for conversation in usable:
        digest = splits.digest_of(conversation.turns)
        if digest in seen:
            reasons = ["exact duplicate"]
        else:
            seen.add(digest)
            troubles = conversations.troubles_of(conversation.turns)
            tally.troubles.update(troubles)
            reasons = [name for name in troubles if name in dropped]
        if reasons:
            rejects.add(conversation.place, reasons[0], conversation.turns[0][1])
        else:
            yield conversation


def batches(kept: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Conversations to be encoded together; the bins do not depend on where a batch ends."""
    batch, n_characters = [], 0
    for conversation in kept:
        batch.append(conversation)
        n_characters += sum(len(text) for _, text in conversation.turns)
        if n_characters >= BATCH_CHARACTERS or len(batch) >= BATCH_ROWS:
            yield batch
            batch, n_characters = [], 0
    yield batch


def encoded(
    kept: Iterable[Conversation], num_threads: int
) -> Iterator[tuple[list[Conversation], list[tuple[np.ndarray, np.ndarray]]]]:
    """Each batch with its documents, in order, encoded by threads while the next ones are read."""
    waiting: deque[tuple[list[Conversation], Future]] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        for batch in batches(kept):
            turns = [conversation.turns for conversation in batch]
            waiting.append((batch, threads.submit(tokenizer.encode_documents, turns)))
            if len(waiting) > 2 * num_threads:  # one is encoded by each thread, one waits for it
                batch, documents = waiting.popleft()
                yield batch, documents.result()
        for batch, documents in waiting:
            yield batch, documents.result()


def check_usable(tally: stats.Tally, config: PrepareConfig) -> None:
    """Refuse to write empty bins, and say what the rows are like where none was understood."""
    if not tally.n_tokens:
        columns = ", ".join(name for name, _ in tally.columns.most_common(20)) or "none"
        reasons = ", ".join(f"{reason}: {n}" for reason, n in tally.dropped.most_common())
        raise UserError(
            f"no usable row in {', '.join(config.source)} ({tally.rows_read} read; "
            f"{reasons or 'empty'})\n  Columns found: {columns}\n  Wanted: conversations "
            "(from/value), messages (role/content), or instruction, input and output"
        )
    for split, counts in tally.splits.items():
        if not counts["documents"]:
            raise UserError(
                f"no document fell to {split} of {tally.splits}; another --val_fraction or --seed "
                f"than {config.val_fraction} and {config.seed} will mend it"
            )


def description(source: sources.Source, config: PrepareConfig) -> dict:
    """All that is needed to make these very bins again."""
    return {
        **source.identity,
        **{name: getattr(config, name) for name in RECIPE},
        "template": tokenizer.TEMPLATE,
        "special_ids": tokenizer.SPECIAL_IDS,
        "tokenizer": {"ranks_sha256": tokenizer.RANKS_SHA256, "tiktoken": tiktoken.__version__},
        # numpy's generator orders the documents, Unicode's tables normalise what the split hashes.
        "versions": {"numpy": np.__version__, "unicode": unicodedata.unidata_version},
    }


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
