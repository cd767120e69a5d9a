"""What prepare.py read, kept and dropped, and what the kept conversations are like.

Counted document by document in little memory; told as meta.json's figures, a table and a picture.
"""

import textwrap
import warnings
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanosynth.data.bins import OUR_MARK, SPLITS
from nanosynth.table import table
from nanosynth.tokenizer import Turn

MOST_NAMES = 1000  # of sources, and of categories, that are told apart; further ones count as one
MOST_REASONS = 100  # to leave a row out that are told apart by the name of what is at fault
OTHERS = "(others)"
COLUMNS = 80  # of the terminal


class Tally:
    """What was read, kept and dropped, and what the documents are like, in some bytes for each."""

    def __init__(self):
        self.rows_read = 0
        self.dropped: Counter[str] = Counter()
        self.troubles: Counter[str] = Counter()  # of unique conversations, whether dropped or not
        self.columns: Counter[str] = Counter()  # that hold something, of the first rows
        self.column_names: set[str] = set()  # of all rows
        self.unused: Counter[str] = Counter()  # columns that held text in vain, of usable rows
        self.names: dict[str, dict[str, int]] = {"source": {}, "category": {}}  # name -> number
        # Of each document, in the order in which they were added.
        self._documents = {
            **{"split": array("b"), "tokens": array("i"), "assistant_tokens": array("i")},
            **{"turns": array("i"), "text_bytes": array("q")},
            **{"source": array("H"), "category": array("H")},
            **{"part": array("i"), "row": array("q")},  # where it was read
        }
        self.n_documents = self.n_tokens = 0
        self.begins_alike, self._beginning = True, ""  # of all documents, in their first user turn
        self.weighted: list[dict] = []  # of each source: its share of training tokens, and wanted
        self.chosen: np.ndarray | None = None  # (documents,) bool; None: all

    def see(self, row: object) -> None:
        """One row that was read, whatever it holds; the columns of many stand for those of all."""
        self.rows_read += 1
        if isinstance(row, dict):
            self.column_names.update(row)
            if self.rows_read <= 100_000:
                self.columns.update(key for key, value in row.items() if value is not None)

    def drop(self, reason: str, kind: str) -> None:
        """One row that was left out, counted under its reason or, past many of those, its kind."""
        is_told = reason in self.dropped or len(self.dropped) < MOST_REASONS
        self.dropped[reason if is_told else kind] += 1

    def count(
        self, split: str, turns: list[Turn], names: tuple, place: tuple, mask: np.ndarray
    ) -> None:
        """One document; `names` are its row's source and category, `place` is its part and row."""
        values = {
            "split": SPLITS.index(split),
            "tokens": len(mask),
            "assistant_tokens": int(np.count_nonzero(mask)),
            "turns": len(turns),
            "text_bytes": sum(len(text.encode()) for _, text in turns),
            **{"part": place[0], "row": place[1]},
        }
        for (use, numbers), name in zip(self.names.items(), names, strict=True):
            if name not in numbers and len(numbers) >= MOST_NAMES:
                name = OTHERS
            values[use] = numbers.setdefault(name, len(numbers))
        for key, value in values.items():
            self._documents[key].append(value)
        self.n_documents += 1
        self.n_tokens += len(mask)
        if self.begins_alike:
            beginning = next(text for role, text in turns if role != "system")
            self.begins_alike = beginning == (self._beginning or beginning)
            self._beginning = beginning

    def column(self, name: str) -> np.ndarray:
        """A value of each document that is kept."""
        values = np.array(self._documents[name])
        return values if self.chosen is None else values[self.chosen]

    def by_split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """A value of each document that was added, as the bins' writer has them."""
        splits = np.array(self._documents["split"])
        return {name: values[splits == number] for number, name in enumerate(SPLITS)}

    def labels(self) -> dict[str, np.ndarray]:
        """(documents, 2) of each split: the numbers of source and category."""
        return self.by_split(np.stack([self._documents[use] for use in self.names], axis=1))

    def splits(self) -> dict[str, dict[str, int]]:
        counted = ("tokens", "assistant_tokens", "text_bytes")
        found = {}
        for number, name in enumerate(SPLITS):
            inside = self.column("split") == number
            sums = {key: int(self.column(key)[inside].sum()) for key in counted}
            found[name] = {"documents": int(inside.sum()), **sums}
        return found

    def shares(self, use: str) -> dict[str, list[int]]:
        """[documents, tokens] by the name of a source or category, the largest first."""
        n_names = len(self.names[use])
        documents = np.bincount(self.column(use), minlength=n_names).tolist()
        tokens = np.bincount(self.column(use), self.column("tokens"), n_names).astype(int).tolist()
        found = zip(self.names[use], zip(documents, tokens, strict=True), strict=True)
        return dict(largest_first({name: [*share] for name, share in found if share[0]}))

    def figures(self) -> dict:
        """Of meta.json."""
        tokens, turns = self.column("tokens"), self.column("turns")
        by_turns = Counter(turns.tolist())
        figures = {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_read - self.dropped.total(),
            "rows_dropped": dict(self.dropped.most_common()),
            "troubles": dict(self.troubles),
            "unused_columns": dict(self.unused.most_common()),
            "splits": self.splits(),
            "document_tokens": quantiles(tokens),
            "document_turns": quantiles(turns),
            "documents_by_turns": {str(n): by_turns[n] for n in sorted(by_turns)},
            "assistant_share": quantiles(self.column("assistant_tokens") / tokens),
            "label_names": {use: list(numbers) for use, numbers in self.names.items()},
        }
        if self.weighted:
            figures["weighted"] = self.weighted
        for use in self.names:
            figures[f"by_{use}"] = {
                name: {"documents": documents, "tokens": n}
                for name, (documents, n) in self.shares(use).items()
            }
        return figures


def weighted_choice(
    weights: Sequence[float], group: np.ndarray, tokens: np.ndarray, split: np.ndarray, seed: int
) -> np.ndarray:
    """(documents,) bool: the most documents whose training tokens have these shares by group.

    Without replacement, in a seeded random order; of validation the same part of each group.
    """
    n_tokens = np.array([tokens[(group == g) & (split == 0)].sum() for g in range(len(weights))])
    parts = np.array(weights) * (n_tokens / weights).min() / np.maximum(n_tokens, 1)
    chosen = np.zeros(len(tokens), dtype=bool)
    for g, part in enumerate(parts.tolist()):
        for number in range(len(SPLITS)):
            places = np.flatnonzero((group == g) & (split == number))
            places = np.random.default_rng([seed, g, number]).permutation(places)
            ends = np.cumsum(tokens[places])
            chosen[places[ends <= part * ends[-1:] * (1 + 1e-9)]] = True  # all, where part is 1
    return chosen


def largest_first(shares: dict[str, list[int]]) -> list[tuple[str, list[int]]]:
    """[name, [documents, tokens]] by tokens, equal ones by name."""
    return sorted(shares.items(), key=lambda item: (-item[1][1], item[0]))


def quantiles(values: np.ndarray) -> dict[str, int | float]:
    percentiles = {f"p{q}": np.percentile(values, q) for q in (1, 10, 50, 90, 99, 100)}
    is_whole = np.issubdtype(values.dtype, np.integer)
    return {name: int(v) if is_whole else round(float(v), 4) for name, v in percentiles.items()}


def summary(meta: dict) -> str:
    """The figures of meta.json for a terminal."""
    rows = [("rows read", meta["rows_read"]), ("rows kept", meta["rows_kept"])]
    rows += [(f"  dropped: {reason}", n) for reason, n in meta["rows_dropped"].items()]
    rows += [(f"  seen: {trouble}", n) for trouble, n in meta["troubles"].items()]
    splits = [meta["splits"][split] for split in SPLITS]
    sizes = [[key.replace("_", " "), *(f"{s[key]:,}" for s in splits)] for key in splits[0]]
    ratios = [f"{s['text_bytes'] / s['tokens']:.2f}" for s in splits]
    spreads = (
        ("tokens a document", meta["document_tokens"], "{:,}"),
        ("turns a document", meta["document_turns"], "{:,}"),
        ("assistant's share of tokens", meta["assistant_share"], "{:.0%}"),
    )
    percentiles = [name.removeprefix("p") for name in meta["document_tokens"]]
    parts = [
        table([[name, f"{n:,}"] for name, n in rows]),
        table([["", *SPLITS], *sizes, ["bytes of text a token", *ratios]]),
        table(
            [["percentile", *percentiles]]
            + [[name, *map(form.format, values.values())] for name, values, form in spreads]
        ),
        "\n".join(_shares(meta, name) for name in ("source", "category")),
    ]
    parts += filter(None, [_listed(told, meta.get(name, {})) for name, told in LISTED.items()])
    if weighted := meta.get("weighted"):
        shares = (f"{w['source']} {w['share']:.1%} ({w['wanted']:.1%} wanted)" for w in weighted)
        parts.append(_filled(f"training tokens by --weights: {', '.join(shares)}"))
    if leaks := meta.get("leak_check"):
        parts.append(_leaks(leaks))
    return "\n\n".join(parts)


def _shares(meta: dict, name: str, most: int = 6) -> str:
    """The largest shares of all tokens, by source or category."""
    n_tokens = sum(counts["tokens"] for counts in meta["splits"].values())
    shares = [f"{key} {n['tokens'] / n_tokens:.1%}" for key, n in meta[f"by_{name}"].items()]
    more = [f"{len(shares) - most} more"] if len(shares) > most else []
    return _filled(f"tokens by {name}: {', '.join(shares[:most] + more)}")


LISTED = {  # of meta.json: counts by name
    "unused_columns": "columns that held text and were not used, and their rows",
    "left_out": "left out of the folders",
}


def _listed(told: str, counts: dict[str, int]) -> str:
    said = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    return said and _filled(f"{told}: {said}")


def _filled(text: str) -> str:
    return textwrap.fill(text, COLUMNS, subsequent_indent="  ", break_long_words=False)


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


def draw(tally: Tally, path: Path, title: str) -> None:
    """The picture: lengths, turns, assistant's share, sources and categories."""
    import matplotlib  # slow to import, and needed here alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic(
        [["tokens", "turns", "share"], ["source", "source", "category"]],
        figsize=(15, 9),
        layout="constrained",
    )
    figure.suptitle(title, parse_math=False)
    tokens = tally.column("tokens")
    _draw_tokens(axes["tokens"], tokens)
    turns = np.minimum(tally.column("turns"), 12)
    axes["turns"].hist(turns, bins=np.arange(0.5, 13), rwidth=0.9)
    axes["turns"].set(yscale="log", xlabel="turns", ylabel="documents (log)")
    axes["turns"].set(ylim=(0.5, 2 * np.bincount(turns).max()), xlim=(0.5, 12.5))
    axes["turns"].set_xticks(range(1, 13), [*map(str, range(1, 12)), "12+"])
    axes["share"].hist(tally.column("assistant_tokens") / tokens, bins=np.linspace(0, 1, 51))
    axes["share"].set(xlabel="share of tokens that are answers, or plain text", ylabel="documents")
    for name in ("tokens", "share"):
        axes[name].yaxis.set_major_formatter("{x:,.0f}")
    for name in tally.names:
        _draw_shares(axes[name], name, tally.shares(name))
    with warnings.catch_warnings():  # a name in a script that the font lacks shows as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=80, metadata={"Software": OUR_MARK})
    pyplot.close(figure)


def _draw_tokens(axes: object, tokens: np.ndarray) -> None:
    """Lengths may span four orders of magnitude: a logarithmic axis, with plain numbers on it."""
    edges = np.geomspace(tokens.min(), tokens.max() + 1, 60)
    axes.hist(tokens, bins=edges)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    ticks = [n * 10**power for power in range(9) for n in (1, 2, 5)]
    ticks = [tick for tick in ticks if edges[0] <= tick <= edges[-1]]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
    axes.set_xticks([], minor=True)
    names = {50: "median", 90: "90 of 100 below", 99: "99 of 100 below"}
    for (q, name), style in zip(names.items(), ("-", "--", ":"), strict=True):
        value = np.percentile(tokens, q)
        label = f"{name} {value:,.0f}"
        axes.axvline(value, color="black", linestyle=style, linewidth=1, label=label)
    axes.legend(frameon=False)


def _draw_shares(axes: object, name: str, shares: dict[str, list[int]], most: int = 20) -> None:
    """Bars of the largest shares of all tokens; the rest is one bar."""
    total = sum(tokens for _, tokens in shares.values())
    ordered = [(key, tokens / total) for key, (_, tokens) in shares.items()]
    bars, rest = ordered[:most], ordered[most:]
    if rest:
        bars.append((f"{len(rest)} more", sum(share for _, share in rest)))
    drawn = axes.barh(range(len(bars)), [share for _, share in bars])
    axes.bar_label(drawn, [f" {share:.1%}" for _, share in bars])
    labels = [key if len(key) <= 32 else f"{key[:31]}…" for key, _ in bars]
    # A label is the data's own text, in which '$' begins no formula.
    axes.set_yticks(range(len(bars)), labels, parse_math=False)
    axes.set(xlabel=f"share of all tokens, by {name}", xticks=[])
    axes.set_ylim(max(len(bars), 8) - 0.5, -0.5)
    axes.set_xlim(0, 1.2 * max(share for _, share in bars))
