"""Conversations of any source to token bins: read, check, deduplicate, split, encode, shuffle.

Usage:
    python prepare.py --source=teknium/OpenHermes-2.5 --data_dir=data/openhermes
    python prepare.py --source=conversations.jsonl --data_dir=data/mine
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from nanosynth import UserError, settings, tokenizer
from nanosynth.data import sources, stats, troubles
from nanosynth.data.conversations import Reject, conversation, first_words
from nanosynth.settings import setting

BATCH_CHARACTERS = 1 << 18  # of text that is encoded together
BATCH_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(settings.Settings):
    """Write data_dir/{train,val}.bin, their masks, stats.png and meta.json from conversations."""

    source: settings.MANY = setting(
        (sources.OPENHERMES,),
        "a .json, .jsonl or .parquet file, .gz or .zst too, a folder, or a hub id",
        group="what is read",
        path=True,
    )
    revision: str = setting("", "hub revision; empty: the pinned one, or the newest, recorded")
    data_dir: str = setting("data/openhermes", "where the bins go", path=True)
    max_rows: int = setting(
        0, "a random sample of so many rows of the whole source; 0: all", at_least=0
    )
    val_fraction: float = setting(
        0.05, "share of first user turns that go to validation", above=0, below=1
    )
    seed: int = setting(42, "of the sample, the split and the documents' order", at_least=0)
    num_threads: int = setting(os.cpu_count() or 1, "threads of the tokenizer", at_least=1)
    drop_refusals: bool = setting(
        False, "leave out refusals and 'As an AI' answers", group="what is left out"
    )
    drop_non_english: bool = setting(False, "leave out conversations in other languages")
    drop_runs: bool = setting(False, "leave out conversations with 100 equal characters in a row")
    rejects: str = setting(
        "", "a JSON line here for each row that was left out; empty: none", path=True
    )
    leak_check: bool = setting(
        False, "count the 13-grams that train and validation share", group="what is told"
    )
    picture: bool = setting(True, "draw stats.png")

    def __post_init__(self):
        if isinstance(self.source, str):
            object.__setattr__(self, "source", (self.source,))
        super().__post_init__()


if __name__ == "__main__":
    arguments = settings.from_argv(PrepareConfig)  # before torch takes its time

import unicodedata

import numpy as np
import tiktoken
from tqdm import tqdm

from nanosynth.data import bins, ngrams, splits


@dataclass
class Batch:
    """Conversations that are encoded together, with what is told of them."""

    conversations: list[list[tokenizer.Turn]] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)  # source and category
    places: list[tuple[str, int]] = field(default_factory=list)  # file and row
    characters: int = 0

    def add(
        self, turns: list[tokenizer.Turn], names: tuple[str, str], place: tuple[str, int]
    ) -> None:
        self.conversations.append(turns)
        self.names.append(names)
        self.places.append(place)
        self.characters += sum(len(text) for _, text in turns)

    def is_full(self) -> bool:
        return self.characters >= BATCH_CHARACTERS or len(self.places) >= BATCH_ROWS

    def keep(self, is_kept: list[bool]) -> None:
        for name in ("conversations", "names", "places"):
            values = zip(getattr(self, name), is_kept, strict=True)
            setattr(self, name, [value for value, kept in values if kept])


class Rejects:
    """The rows that were left out: counted by reason, and a JSON line each where it is asked for.

    The lines stand in reading order but for those of one batch.
    """

    def __init__(self, path: str, tally: stats.Tally):
        self._tally = tally
        self._path, self._partial = path, f"{path}.partial"
        self._file = open(self._partial, "w", encoding="utf-8") if path else None

    def add(self, place: tuple[str, int], reason: str, row: object) -> None:
        self._tally.dropped[reason] += 1
        if self._file:
            file, number = place
            line = {"file": file, "row": number, "reason": reason, "text": first_words(row)}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Put the file in its place, after a failure too: it may tell why."""
        if self._file:
            self._file.close()
            os.replace(self._partial, self._path)


def selected_rows(source: sources.Source, config: PrepareConfig) -> Iterator[object]:
    """All rows, or a seeded random sample of max_rows of them in their order, in two passes."""
    if not config.max_rows:
        yield from source.rows()
        return
    is_counted = source.unit == "rows" and source.size is not None
    n_rows = source.size if is_counted else sum(1 for _ in source.rows())
    if config.max_rows >= n_rows:
        yield from source.rows()
        return
    chosen = np.zeros(n_rows, dtype=bool)
    chosen[np.random.default_rng(config.seed).choice(n_rows, config.max_rows, replace=False)] = True
    for row in source.rows():
        if source.n_rows <= n_rows and chosen[source.n_rows - 1]:
            yield row
    if source.n_rows != n_rows:
        found = f"{source.n_rows} rows where {n_rows} were counted"
        raise UserError(f"{', '.join(config.source)} gave {found}; prepare it again")


def batches(source: sources.Source, config: PrepareConfig, rejects: Rejects, tally: stats.Tally):
    """The usable conversations, some together; all others are counted by reason."""
    seen = splits.DigestSet()
    batch = Batch()
    for row in selected_rows(source, config):
        tally.rows_read += 1
        place = (source.part.name, source.row)
        if isinstance(row, dict) and tally.rows_read <= 100_000:
            tally.columns.update(key for key, value in row.items() if value is not None)
        try:
            batch.add(conversation(row), stats.names_of(row), place)
        except Reject as reject:
            rejects.add(place, str(reject), row)
        if batch.is_full():
            yield unique(batch, seen, config, rejects, tally)
            batch = Batch()
    yield unique(batch, seen, config, rejects, tally)


def unique(
    batch: Batch,
    seen: splits.DigestSet,
    config: PrepareConfig,
    rejects: Rejects,
    tally: stats.Tally,
) -> Batch:
    """The batch without what was seen before, and without the troubles that are to be dropped."""
    dropped = {
        "refusal or AI boilerplate": config.drop_refusals,
        "not English": config.drop_non_english,
        "run of one character": config.drop_runs,
    }
    digests = [splits.digest_of(turns) for turns in batch.conversations]
    is_kept = []
    for turns, place, is_new in zip(
        batch.conversations, batch.places, seen.add(digests), strict=True
    ):
        reasons = [] if is_new else ["exact duplicate"]
        if is_new:
            found = [name for name, has in troubles.TROUBLES.items() if has(turns)]
            tally.troubles.update(found)
            reasons = [name for name in found if dropped[name]]
        if reasons:
            rejects.add(place, reasons[0], turns[0][1])
        is_kept.append(not reasons)
    batch.keep(is_kept)
    return batch


def encoded(
    found: Iterable[Batch], num_threads: int
) -> Iterator[tuple[Batch, list[tuple[np.ndarray, np.ndarray]]]]:
    """Each batch with its documents, in order, encoded by threads while the next are read."""
    waiting: deque[tuple[Batch, Future]] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        for batch in found:
            waiting.append((batch, threads.submit(tokenizer.encode_documents, batch.conversations)))
            if len(waiting) > 2 * num_threads:
                batch, documents = waiting.popleft()
                yield batch, documents.result()
        while waiting:
            batch, documents = waiting.popleft()
            yield batch, documents.result()


def convert(
    source: sources.Source, config: PrepareConfig, writer: bins.BinWriter, tally: stats.Tally
) -> None:
    """Read the source to its end into the writer."""
    rejects = Rejects(config.rejects, tally)
    started = time.monotonic()
    try:
        with tqdm(total=source.size, unit=source.unit, unit_scale=True, desc="prepare") as bar:
            found = batches(source, config, rejects, tally)
            for batch, documents in encoded(found, config.num_threads):
                for turns, names, (ids, mask) in zip(
                    batch.conversations, batch.names, documents, strict=True
                ):
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
    finally:
        rejects.close()


def check_usable(tally: stats.Tally, config: PrepareConfig) -> None:
    if not sum(counts["documents"] for counts in tally.splits.values()):
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


# What the bins depend on, beside the source.
RECIPE = "seed val_fraction max_rows drop_refusals drop_non_english drop_runs".split()


def description(source: sources.Source, config: PrepareConfig) -> dict:
    """All that is needed to make these very bins again."""
    return {
        **source.identity,
        **{key: asdict(config)[key] for key in RECIPE},
        "template": tokenizer.TEMPLATE,
        "special_ids": {
            "<|endoftext|>": tokenizer.END_OF_TEXT,
            "<|im_start|>": tokenizer.IM_START,
            "<|im_end|>": tokenizer.IM_END,
        },
        "tokenizer": {"ranks_sha256": tokenizer.RANKS_SHA256, "tiktoken": tiktoken.__version__},
        "versions": {"numpy": np.__version__, "unicode": unicodedata.unidata_version},
    }


def main(config: PrepareConfig) -> None:
    source = sources.open_sources(config.source, config.revision)
    tally = stats.Tally()
    try:
        writer = bins.BinWriter(config.data_dir)
        try:
            convert(source, config, writer, tally)
            check_usable(tally, config)
            writer.shuffle(config.seed)
            meta = {**description(source, config), **tally.figures()}
            if config.leak_check:
                train, val = writer.partial / "train.bin", writer.partial / "val.bin"
                meta["leak_check"] = ngrams.shared_grams(train, val)
            if config.picture:
                title = f"{meta['source'][:100]}: {meta['rows_kept']:,} conversations"
                stats.draw(tally, writer.partial / "stats.png", title)
            writer.publish(meta, bins.EXTRAS if config.picture else ())
        finally:
            writer.discard()
    except OSError as error:
        raise UserError(f"stopped while preparing {config.data_dir}: {error}") from error
    print(stats.table(meta))
    print(f"written to {config.data_dir}")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
