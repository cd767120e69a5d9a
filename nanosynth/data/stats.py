"""What prepare.py read, kept and dropped, and what the kept conversations are like.

Counted document by document in little memory; told as meta.json's figures, a table and a picture.
"""

import json
import struct
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from nanosynth.data.bins import OUR_MARK, SPLITS
from nanosynth.data.conversations import Reject, first_words
from nanosynth.data.sources import REJECT_KEYS
from nanosynth.table import table
from nanosynth.tokenizer import Turn

MOST_NAMES = 1000  # of sources, and of categories, that are told apart; further ones count as one
MOST_REASONS = 100  # to leave a row out that are told apart by the name of what is at fault
OTHERS = "(others)"
COLUMNS = 80  # of the terminal
# What is known of each document. The letters of the types are struct's and numpy's alike.
FIELDS = {
    **{"split": "b", "first_turn": "Q", "all_turns": "Q"},  # the keys that splits.py assigns it by
    **{"tokens": "i", "assistant_tokens": "i", "turns": "i", "text_bytes": "q"},
    **{"source": "H", "category": "H"},  # their numbers in Tally.names
    **{"part": "i", "row": "q"},  # where it was read
}
RECORD = struct.Struct(f"={''.join(FIELDS.values())}")


class Tally:
    """What was read, kept and dropped, and what the documents are like, in some bytes for each."""

    def __init__(self, rejects: TextIO | None):
        """`rejects` takes a JSON line for each row that is left out."""
        self.rows_read = self.n_tokens = 0
        self.dropped: Counter[str] = Counter()
        self.troubles: Counter[str] = Counter()  # of unique conversations, whether dropped or not
        self.columns: dict[str, None] = {}  # that hold something
        self.column_names: set[str] = set()  # of all
        self.unused: Counter[str] = Counter()  # columns that held text in vain, of usable rows
        self.names: dict[str, dict[str, int]] = {"source": {}, "category": {}}  # name -> number
        self._rejects = rejects
        self._records = bytearray()

    def see(self, row: object) -> None:
        """One row that was read, whatever it holds."""
        self.rows_read += 1
        if isinstance(row, dict):
            self.column_names.update(row)
            if not row.keys() <= self.columns.keys():
                self.columns |= {name: None for name, value in row.items() if value is not None}

    def drop(self, reject: Reject, file: str, number: int, row: object) -> None:
        """One row that is left out, counted under its reason or, past many of those, its kind."""
        reason = str(reject)
        is_told = reason in self.dropped or len(self.dropped) < MOST_REASONS
        self.dropped[reason if is_told else reject.reason] += 1
        if self._rejects:
            values = (file, number, reason, first_words(row))
            line = dict(zip(REJECT_KEYS, values, strict=True))
            self._rejects.write(json.dumps(line, ensure_ascii=False) + "\n")

    def count(
        self, keys: tuple, turns: Sequence[Turn], names: tuple, place: tuple, mask: np.ndarray
    ) -> None:
        """One document; `names` are its row's source and category, `place` is its part and row."""
        numbers = []
        for known, name in zip(self.names.values(), names, strict=True):
            if name not in known and len(known) >= MOST_NAMES:
                name = OTHERS
            numbers.append(known.setdefault(name, len(known)))
        text_bytes = sum(len(text.encode()) for _, text in turns)
        sizes = (len(mask), int(np.count_nonzero(mask)), len(turns), text_bytes)
        self._records += RECORD.pack(0, *keys, *sizes, *numbers, *place)
        self.n_tokens += len(mask)

    def documents(self) -> np.ndarray:
        """(documents,) of the dtype FIELDS, as they were counted; 'split' is 0 until it is set."""
        return np.frombuffer(self._records, dtype=list(FIELDS.items()))

    def figures(self, kept: np.ndarray) -> dict:
        """Of meta.json; `kept` are the documents in the bins."""
        n_turns, n_documents = np.unique(kept["turns"], return_counts=True)
        return {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_read - self.dropped.total(),
            "rows_dropped": dict(self.dropped.most_common()),
            "troubles": dict(self.troubles),
            "unused_columns": dict(self.unused.most_common()),
            "splits": {name: sums(kept[kept["split"] == n]) for n, name in enumerate(SPLITS)},
            "document_tokens": quantiles(kept["tokens"]),
            "document_turns": quantiles(kept["turns"]),
            "documents_by_turns": dict(
                zip(map(str, n_turns.tolist()), n_documents.tolist(), strict=True)
            ),
            "assistant_share": quantiles(kept["assistant_tokens"] / kept["tokens"]),
            "label_names": {use: list(numbers) for use, numbers in self.names.items()},
            **{f"by_{use}": self._by(use, kept) for use in self.names},
        }

    def _by(self, use: str, kept: np.ndarray) -> dict[str, dict[str, int]]:
        """Documents and tokens by the name of a source or category, the most tokens first."""
        names = self.names[use]
        tokens = np.bincount(kept[use], kept["tokens"], len(names)).astype(int).tolist()
        documents = np.bincount(kept[use], minlength=len(names)).tolist()
        found = sorted(zip(tokens, names, documents, strict=True), key=lambda n: (-n[0], n[1]))
        return {name: {"documents": n, "tokens": total} for total, name, n in found if n}


def sums(documents: np.ndarray) -> dict[str, int]:
    counted = ("tokens", "assistant_tokens", "text_bytes")
    return {"documents": len(documents), **{key: int(documents[key].sum()) for key in counted}}


def quantiles(values: np.ndarray) -> dict[str, int | float]:
    percentiles = {f"p{q}": np.percentile(values, q) for q in (1, 10, 50, 90, 99, 100)}
    is_whole = np.issubdtype(values.dtype, np.integer)
    return {name: int(v) if is_whole else round(float(v), 4) for name, v in percentiles.items()}


def weighted_choice(
    documents: np.ndarray, group: np.ndarray, weights: Sequence[float], seed: int
) -> np.ndarray:
    """(documents,) bool: the most documents whose training tokens have these shares by group.

    Without replacement, in a seeded random order; of validation the same part of each group.
    """
    tokens, split = documents["tokens"], documents["split"]
    n_tokens = np.bincount(group, tokens * (split == 0), len(weights))
    parts = np.array(weights) * (n_tokens / weights).min() / np.maximum(n_tokens, 1)
    chosen = np.zeros(len(tokens), dtype=bool)
    for g, part in enumerate(parts.tolist()):
        for number in range(len(SPLITS)):
            places = np.flatnonzero((group == g) & (split == number))
            places = np.random.default_rng([seed, g, number]).permutation(places)
            ends = np.cumsum(tokens[places])
            chosen[places[ends <= part * ends[-1:] * (1 + 1e-9)]] = True  # all, where part is 1
    return chosen


def summary(meta: dict) -> str:
    """The figures of meta.json for a terminal."""
    rows = {"rows read": meta["rows_read"], "rows kept": meta["rows_kept"]}
    rows |= {f"  dropped: {reason}": n for reason, n in meta["rows_dropped"].items()}
    rows |= {f"  seen: {trouble}": n for trouble, n in meta["troubles"].items()}
    splits = [meta["splits"][split] for split in SPLITS]
    sizes = [[key.replace("_", " "), *(f"{s[key]:,}" for s in splits)] for key in splits[0]]
    ratios = [f"{s['text_bytes'] / s['tokens']:.2f}" for s in splits]
    spreads = (
        ("tokens a document", meta["document_tokens"], "{:,}"),
        ("turns a document", meta["document_turns"], "{:,}"),
        ("assistant's share of tokens", meta["assistant_share"], "{:.0%}"),
    )
    parts = [
        table([[name, f"{n:,}"] for name, n in rows.items()]),
        table([["", *SPLITS], *sizes, ["bytes of text a token", *ratios]]),
        table(
            [["percentile", *(name.removeprefix("p") for name in meta["document_tokens"])]]
            + [[name, *map(form.format, values.values())] for name, values, form in spreads]
        ),
    ]
    for title, values in _lists(meta).items():
        said = f"{title}: {', '.join(f'{name} {value}' for name, value in values.items())}"
        wrapped = textwrap.fill(said, COLUMNS, subsequent_indent="  ", break_long_words=False)
        parts += [wrapped] if values else []
    if leaks := meta.get("leak_check"):
        parts.append(_leaks(leaks))
    return "\n\n".join(parts)


def _lists(meta: dict) -> dict[str, dict[str, str]]:
    """What is told as 'NAME VALUE, NAME VALUE', by its title."""
    shown = {
        f"tokens by {use}": {name: f"{share:.1%}" for name, share in shares(meta, use, most=6)}
        for use in ("source", "category")
    }
    for key, title in {
        "unused_columns": "columns that held text and were not used, and their rows",
        "left_out": "left out of the folders",
    }.items():
        shown[title] = {name: f"{n:,}" for name, n in meta.get(key, {}).items()}
    shown["training tokens by --weights"] = {
        w["source"]: f"{w['share']:.1%} ({w['wanted']:.1%} wanted)"
        for w in meta.get("weighted", [])
    }
    return shown


def shares(meta: dict, use: str, most: int) -> list[tuple[str, float]]:
    """(name, share of all tokens) of the largest sources or categories; the others count as one."""
    tokens = {name: counts["tokens"] for name, counts in meta[f"by_{use}"].items()}
    found = [(name, n / sum(tokens.values())) for name, n in tokens.items()]
    if others := found[most:]:
        found[most:] = [(f"{len(others)} more", sum(share for _, share in others))]
    return found


def _leaks(leaks: dict) -> str:
    """What the leak check found, a line each."""
    sampled = f", one in {leaks['one_in']} looked at" if leaks["one_in"] > 1 else ""
    told = (
        (f"{leaks['tokens']}-grams of validation in training{sampled}", "grams_in_train", "grams"),
        ("validation documents with one", "documents_with_any", "documents"),
        ("validation documents with half of theirs", "documents_with_half", "documents"),
    )
    counts = [(name, leaks[f"val_{count}"], leaks[f"val_{total}"]) for name, count, total in told]
    return "\n".join(
        f"{name}: {n:,} of {total:,} ({n / max(1, total):.1%})" for name, n, total in counts
    )


def draw(meta: dict, kept: np.ndarray, path: Path) -> None:
    """The picture: lengths, turns, assistant's share, sources and categories."""
    import matplotlib  # slow to import, and needed here alone

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplot_mosaic(
        [["tokens", "turns", "share"], ["source", "source", "category"]],
        figsize=(15, 9),
        layout="constrained",
    )
    title = f"{meta['source'][:100]}: {meta['rows_kept']:,} documents"
    figure.suptitle(title, parse_math=False)
    tokens, turns = kept["tokens"], np.minimum(kept["turns"], 12)
    panel = axes["tokens"]  # lengths may span four orders of magnitude
    panel.hist(tokens, bins=np.geomspace(tokens.min(), tokens.max() + 1, 60))
    panel.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.tick_params(axis="x", labelsize="small")
    for q, style in ((50, "-"), (90, "--"), (99, ":")):
        value = meta["document_tokens"][f"p{q}"]
        label = f"median {value:,}" if q == 50 else f"{q} of 100 below {value:,}"
        panel.axvline(value, color="black", linestyle=style, linewidth=1, label=label)
    panel.legend(frameon=False)
    axes["turns"].hist(turns, bins=np.arange(0.5, 13), rwidth=0.9)
    axes["turns"].set(yscale="log", xlabel="turns", ylabel="documents (log)")
    axes["turns"].set(ylim=(0.5, 2 * np.bincount(turns).max()), xlim=(0.5, 12.5))
    axes["turns"].set_xticks(range(1, 13), [*map(str, range(1, 12)), "12+"])
    axes["share"].hist(kept["assistant_tokens"] / tokens, bins=np.linspace(0, 1, 51))
    axes["share"].set(xlabel="share of tokens that are answers, or plain text", ylabel="documents")
    for name in ("tokens", "share"):
        axes[name].yaxis.set_major_formatter("{x:,.0f}")
    for use in ("source", "category"):
        _draw_shares(axes[use], use, shares(meta, use, most=20))
    with warnings.catch_warnings():  # a name in a script that the font lacks shows as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=80, metadata={"Software": OUR_MARK})
    pyplot.close(figure)


def _draw_shares(axes: object, use: str, bars: list[tuple[str, float]]) -> None:
    drawn = axes.barh(range(len(bars)), [share for _, share in bars])
    axes.bar_label(drawn, [f" {share:.1%}" for _, share in bars])
    labels = [name if len(name) <= 32 else f"{name[:31]}…" for name, _ in bars]
    # A label is the data's own text, in which '$' begins no formula.
    axes.set_yticks(range(len(bars)), labels, parse_math=False)
    axes.set(xlabel=f"share of all tokens, by {use}", xticks=[])
    axes.set_ylim(max(len(bars), 8) - 0.5, -0.5)
    axes.set_xlim(0, 1.2 * max(share for _, share in bars))
