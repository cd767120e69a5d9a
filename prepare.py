"""Conversations and texts of any source to bins: read, check, deduplicate, split, encode, shuffle.

Usage:
    python prepare.py --source=teknium/OpenHermes-2.5 --data_dir=data/openhermes
    python prepare.py --source=conversations.jsonl --data_dir=data/mine
    python prepare.py --source=A.jsonl --source=B.txt --weights=0.7,0.3 --data_dir=data/both

It streams: a row is read, checked and encoded while others are written, and memory stays flat
however large the source is. Every row is either in the bins or counted by the reason why not.
"""

import contextlib
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from nanosynth import UserError, settings, terminal, tokenizer
from nanosynth.data import PICTURE, conversations, formats, sources
from nanosynth.files import temporary
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(settings.Settings):
    """Write data_dir/{train,val}.bin, their masks, stats.png and meta.json from conversations and
    plain texts."""

    source: settings.MANY = setting(
        (sources.OPENHERMES,),
        "a .json, .jsonl, .parquet, .arrow or .txt file, compressed or not, a folder, or a hub id",
        group="The source",
        path=True,
    )
    revision: str = setting("", "hub revision; empty: the pinned one, or the newest, recorded")
    split: str = setting("", "of a data set that has several; empty: train")
    columns: str = setting(
        "", "what they are used for, as user=question,assistant=reply,system=persona (docs/data.md)"
    )
    document_separator: str = setting(
        "<|endoftext|>",
        "of .txt files: a line of its own or, with a newline (\\n) in it, what stands between",
    )
    weights: str = setting(
        "", "shares of the training tokens, one for each source: 0.7,0.3; empty: all there is"
    )
    max_rows: int = setting(
        0, "a random sample of so many rows of the whole source; 0: all", at_least=0
    )
    max_bytes: int = setting(
        0, "read from the start until so much text is kept, and no further; 0: all", at_least=0
    )
    data_dir: str = setting("data/openhermes", "where they go", group="The bins", path=True)
    val_fraction: float = setting(
        0.05, "share of first user turns that go to validation", above=0, below=1
    )
    seed: int = setting(42, "of the sample, the split and the documents' order", **settings.SEED)
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

    def check(self) -> None:
        if not self.document_separator.strip(" "):
            self.refuse("document_separator", "wanted some text, or \\n")
        if self.weights and len(self.shares()) != len(self.source):
            self.refuse("weights", f"wanted one for each --source: {len(self.source)}")

    def shares(self) -> list[float]:
        """The weights, scaled to a sum of 1."""
        try:
            shares = [float(part) for part in self.weights.split(",")]
        except ValueError:
            shares = [0.0]
        if not all(0 < share < math.inf for share in (*shares, sum(shares))):
            self.refuse("weights", "wanted numbers above 0, as 0.7,0.3")
        return [share / sum(shares) for share in shares]


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
RECIPE = (
    "seed val_fraction max_rows max_bytes drop_refusals drop_non_english drop_runs "
    "split columns document_separator weights"
).split()


def main(config: PrepareConfig) -> None:
    try:
        meta = prepare(config)
    except OSError as error:
        raise UserError(f"stopped while preparing {config.data_dir}: {error}") from error
    terminal.say(f"{stats.summary(meta)}\n\nwritten to {config.data_dir}")


def prepare(config: PrepareConfig) -> dict:
    """The bins of the sources, published; their meta.json."""
    columns = conversations.named_columns(config.columns)
    reading = formats.Reading(columns, config.split, config.document_separator)
    with bins.BinWriter(config.data_dir, has_picture=config.picture) as writer:
        source = sources.open_sources(config.source, config.revision, reading)
        with rejects_file(config.rejects, source) as rejects:
            tally = stats.Tally(rejects)
            write_documents(source, config, writer, tally)
            documents = tally.documents()
            split_by = splits.assign(documents, config.val_fraction)
            chosen, weighted = choose(documents, config, source, tally)
        kept = documents[chosen] if config.weights else documents  # not a copy of them all
        check_usable(source, kept, tally, config)
        labels = np.stack([documents[use] for use in tally.names], axis=1)
        writer.shuffle(config.seed, documents["split"], chosen, labels)
        meta = {**description(source, config), "split_by": split_by, **tally.figures(kept)}
        if weighted:
            meta["weighted"] = weighted
        if config.leak_check:
            paths = (writer.partial / "train.bin", writer.partial / "val.bin")
            meta["leak_check"] = ngrams.shared_grams(*paths)
        if config.picture:
            stats.draw(meta, kept, writer.partial / PICTURE)
        writer.publish(meta)
    return meta


@contextlib.contextmanager
def rejects_file(path: str, source: sources.Source) -> Iterator[TextIO | None]:
    """The file of --rejects, which replaces none but an earlier one of its kind. It is put in its
    place after a failure, too: it may tell why.
    """
    if not path:
        yield None
        return
    if os.path.lexists(path):
        if not sources.is_rejects(Path(path)):
            raise UserError(f"--rejects={path} is there, and is no file of rejects; name a new one")
        if any(part.path and part.size and part.path.samefile(path) for part in source.parts):
            raise UserError(f"--rejects={path} is among the sources; name another file")
    partial = temporary(Path(path), "rejects")
    try:
        # What UTF-8 cannot hold, of a role or a file's name, becomes an escape of JSON.
        file = open(partial, "x", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--rejects={path} cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
    finally:
        os.replace(partial, path)


def write_documents(
    source: sources.Source, config: PrepareConfig, writer: bins.BinWriter, tally: stats.Tally
) -> None:
    """Read the source to its end, and put each conversation that is kept into writer and tally."""
    started = time.monotonic()
    kept = kept_conversations(source, config, tally)
    with tqdm(total=source.size, unit=source.unit, unit_scale=True, desc="prepare") as bar:
        for batch in encoded(kept, config.num_threads):
            for (turns, names, place), (ids, mask) in batch:
                writer.add(ids, mask)
                tally.count(splits.keys_of(turns, config.seed), turns, names, place, mask)
            seconds = time.monotonic() - started
            speed = f"{tally.rows_read / seconds:,.0f} rows/s, "
            speed += f"{tally.n_tokens / seconds:,.0f} tokens/s"
            bar.set_postfix_str(speed, refresh=False)
            bar.update(source.position - bar.n)
    tally.unused += source.unread


class Conversation(NamedTuple):
    """What a row holds, and what is told of it."""

    turns: list[tokenizer.Turn]
    names: tuple[str, str]  # source and category
    place: tuple[int, int]  # the part's number, and the row's in it


def kept_conversations(
    source: sources.Source, config: PrepareConfig, tally: stats.Tally
) -> Iterator[Conversation]:
    """What the selected rows hold, each conversation once, up to max_bytes of text; a row that is
    left out is counted.
    """
    columns = source.reading.columns
    seen: set[bytes] = set()  # of digests: 84 MB for a million
    n_bytes = 0
    switches = (config.drop_refusals, config.drop_non_english, config.drop_runs)
    dropped = set(itertools.compress(conversations.TROUBLES, switches))
    for row in selected_rows(source, config):
        tally.see(row)
        part, number, unused = source.part, source.row, set()
        try:
            turns = conversations.conversation(row, columns, unused)
            tally.unused.update(unused)
            digest = splits.digest_of(turns)
            if digest in seen:
                raise conversations.Reject("exact duplicate")
            seen.add(digest)
            troubles = conversations.troubles_of(turns)
            tally.troubles.update(troubles)
            if reasons := [name for name in troubles if name in dropped]:
                raise conversations.Reject(reasons[0])
        except conversations.Reject as reject:
            tally.drop(reject, part.name, number, row)
        else:
            names = conversations.names_of(row, part.name, columns)
            yield Conversation(turns, names, (part.number, number))
            n_bytes += sum(len(text.encode()) for _, text in turns)
            if config.max_bytes and n_bytes >= config.max_bytes:
                return


def selected_rows(source: sources.Source, config: PrepareConfig) -> Iterator[object]:
    """All rows, or a seeded random sample of max_rows of them in their order, in two passes."""
    stated = source.size if source.unit == "rows" else None
    n_rows = config.max_rows and (stated or sum(1 for _ in source.rows()))
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
) -> Iterator[Iterable[tuple[Conversation, tuple[np.ndarray, np.ndarray]]]]:
    """Each batch with its documents, in order, encoded by threads while the next ones are read."""

    def encode(batch: list[Conversation]) -> Iterable:
        documents = tokenizer.encode_conversations([conversation.turns for conversation in batch])
        return zip(batch, documents, strict=True)

    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        for batch in batches(kept):
            waiting.append(threads.submit(encode, batch))
            if len(waiting) > 2 * num_threads:  # one is encoded by each thread, one waits for it
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def choose(
    documents: np.ndarray, config: PrepareConfig, source: sources.Source, tally: stats.Tally
) -> tuple[np.ndarray, list[dict]]:
    """(documents,) bool: those that are kept, so that the sources' training tokens are as --weights
    says; and the share of each source.
    """
    if not config.weights:
        return np.ones(len(documents), dtype=bool), []
    group = np.array([part.source for part in source.parts])[documents["part"]]
    in_training = np.bincount(group[documents["split"] == 0], minlength=len(config.source))
    if len(documents) and not in_training.all():
        name = config.source[in_training.argmin()]
        config.refuse("weights", f"no document of {name} is in training; leave it out")
    chosen = stats.weighted_choice(documents, group, config.shares(), config.seed)
    left_out = conversations.Reject("left out by --weights")
    for part, row in documents[["part", "row"]][~chosen].tolist():
        tally.drop(left_out, source.parts[part].name, row, left_out)
    n_tokens = documents["tokens"] * chosen * (documents["split"] == 0)
    sums = np.bincount(group, n_tokens, len(config.source))
    return chosen, [
        {"source": name, "wanted": wanted, "share": n / max(1, sums.sum())}
        for name, wanted, n in zip(config.source, config.shares(), sums.tolist(), strict=True)
    ]


def check_usable(
    source: sources.Source, kept: np.ndarray, tally: stats.Tally, config: PrepareConfig
) -> None:
    """Refuse to write empty bins, and say what the rows are like where none was understood."""
    columns = [*{**tally.columns, **source.unread}]
    found = f"columns found: {', '.join(columns[:20]) or 'none'}"
    if missing := conversations.named(source.reading.columns) - {*columns} - tally.column_names:
        raise UserError(f"--columns={config.columns}: no row has {', '.join(missing)}; {found}")
    if config.split and not any(part.has_splits for part in source.parts):
        config.refuse("split", "no source has several")
    if not tally.n_tokens:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in tally.dropped.most_common())
        raise UserError(
            f"no usable row in {', '.join(config.source)} ({tally.rows_read} read; "
            f"{reasons or 'empty'}; {found}); other names than those of docs/data.md are said "
            "by --columns=user=QUESTION,assistant=REPLY or --columns=text=TEXT"
        )
    for number, split in enumerate(bins.SPLITS):
        if number not in kept["split"]:
            mend = f"another --val_fraction or --seed than {config.val_fraction} and {config.seed}"
            if (kept["all_turns"] == kept["all_turns"][:1]).all():
                mend = "more questions or, for a text, --document_separator='\\n\\n' (empty lines)"
            raise UserError(f"no document of {len(kept)} fell to {split}; {mend} will mend it")


def description(source: sources.Source, config: PrepareConfig) -> dict:
    """All that is needed to make these very bins again."""
    return {
        **source.identity,
        **{name: getattr(config, name) for name in RECIPE},
        "left_out": dict(source.left_out),
        "template": tokenizer.TEMPLATE,
        "special_ids": tokenizer.SPECIAL_IDS,
        "tokenizer": {"ranks_sha256": tokenizer.RANKS_SHA256, "tiktoken": tiktoken.__version__},
        # numpy's generator orders the documents, Unicode's tables normalise what the split hashes.
        "versions": {"numpy": np.__version__, "unicode": unicodedata.unidata_version},
    }


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
