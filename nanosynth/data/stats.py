"""What prepare.py read, kept and dropped, and what the kept conversations are like.

Counted document by document in little memory; told as meta.json's figures, a table and a picture.
"""

import textwrap
import warnings
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from nanosynth.data.bins import SPLITS
from nanosynth.table import table
from nanosynth.tokenizer import Turn

MOST_NAMES = 1000  # of sources, and of categories, that are told apart; further ones count as one
OTHERS = "(others)"
COLUMNS = 80  # of the terminal


class Tally:
    """What was read, kept and dropped, and how long the documents are."""

    def __init__(self):
        self.rows_read = 0
        self.dropped: Counter[str] = Counter()
        self.troubles: Counter[str] = Counter()  # of unique conversations, whether dropped or not
        self.columns: Counter[str] = Counter()
        self.splits = {
            split: {"documents": 0, "tokens": 0, "assistant_tokens": 0, "text_bytes": 0}
            for split in SPLITS
        }
        self.shares: dict[str, dict[str, list[int]]] = {"source": {}, "category": {}}
        # Of each document:
        self.tokens, self.assistant_tokens, self.turns = array("i"), array("i"), array("i")

    @property
    def n_tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.splits.values())

    def see(self, row: object) -> None:
        """One row that was read, whatever it holds; the columns of many stand for those of all."""
        self.rows_read += 1
        if isinstance(row, dict) and self.rows_read <= 100_000:
            self.columns.update(key for key, value in row.items() if value is not None)

    def count(self, split: str, turns: list[Turn], names: tuple, mask: np.ndarray) -> None:
        """One document; `names` are its row's source and category."""
        n_assistant = int(np.count_nonzero(mask))
        counts = self.splits[split]
        counts["documents"] += 1
        counts["tokens"] += len(mask)
        counts["assistant_tokens"] += n_assistant
        counts["text_bytes"] += sum(len(text.encode()) for _, text in turns)
        self.tokens.append(len(mask))
        self.assistant_tokens.append(n_assistant)
        self.turns.append(len(turns))
        for shares, name in zip(self.shares.values(), names, strict=True):
            if name not in shares and len(shares) >= MOST_NAMES:
                name = OTHERS
            share = shares.setdefault(name, [0, 0])
            share[0] += 1
            share[1] += len(mask)

    def figures(self) -> dict:
        """Of meta.json."""
        tokens, by_turns = np.array(self.tokens), Counter(self.turns)
        figures = {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_read - self.dropped.total(),
            "rows_dropped": dict(self.dropped.most_common()),
            "troubles": dict(self.troubles),
            "splits": self.splits,
            "document_tokens": quantiles(tokens),
            "document_turns": quantiles(np.array(self.turns)),
            "documents_by_turns": {str(n): by_turns[n] for n in sorted(by_turns)},
            "assistant_share": quantiles(np.array(self.assistant_tokens) / tokens),
        }
        for name, shares in self.shares.items():
            figures[f"by_{name}"] = {
                key: {"documents": documents, "tokens": n}
                for key, (documents, n) in largest_first(shares)
            }
        return figures


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
    if leaks := meta.get("leak_check"):
        parts.append(_leaks(leaks))
    return "\n\n".join(parts)


def _shares(meta: dict, name: str, most: int = 6) -> str:
    """The largest shares of all tokens, by source or category."""
    n_tokens = sum(counts["tokens"] for counts in meta["splits"].values())
    shares = [f"{key} {n['tokens'] / n_tokens:.1%}" for key, n in meta[f"by_{name}"].items()]
    more = [f"{len(shares) - most} more"] if len(shares) > most else []
    text = f"tokens by {name}: {', '.join(shares[:most] + more)}"
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
    figure.suptitle(title)
    tokens = np.array(tally.tokens)
    _draw_tokens(axes["tokens"], tokens)
    turns = np.minimum(np.array(tally.turns), 12)
    axes["turns"].hist(turns, bins=np.arange(0.5, 13), rwidth=0.9)
    axes["turns"].set(yscale="log", xlabel="turns", ylabel="conversations (log)")
    axes["turns"].set(ylim=(0.5, 2 * np.bincount(turns).max()), xlim=(0.5, 12.5))
    axes["turns"].set_xticks(range(1, 13), [*map(str, range(1, 12)), "12+"])
    axes["share"].hist(np.array(tally.assistant_tokens) / tokens, bins=np.linspace(0, 1, 51))
    axes["share"].set(xlabel="assistant's share of the tokens", ylabel="conversations")
    for name in ("tokens", "share"):
        axes[name].yaxis.set_major_formatter("{x:,.0f}")
    for name, shares in tally.shares.items():
        _draw_shares(axes[name], name, shares)
    with warnings.catch_warnings():  # a name in a script that the font lacks shows as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def _draw_tokens(axes: object, tokens: np.ndarray) -> None:
    """Lengths may span four orders of magnitude: a logarithmic axis, with plain numbers on it."""
    edges = np.geomspace(tokens.min(), tokens.max() + 1, 60)
    axes.hist(tokens, bins=edges)
    axes.set(xscale="log", xlabel="tokens of a conversation", ylabel="conversations")
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
    ordered = [(key, tokens / total) for key, (_, tokens) in largest_first(shares)]
    bars, rest = ordered[:most], ordered[most:]
    if rest:
        bars.append((f"{len(rest)} more", sum(share for _, share in rest)))
    drawn = axes.barh(range(len(bars)), [share for _, share in bars])
    axes.bar_label(drawn, [f" {share:.1%}" for _, share in bars])
    # A label is the data's own text: '$' would begin a formula.
    labels = [(key if len(key) <= 32 else f"{key[:31]}…").replace("$", r"\$") for key, _ in bars]
    axes.set_yticks(range(len(bars)), labels)
    axes.set(xlabel=f"share of all tokens, by {name}", xticks=[])
    axes.set_ylim(max(len(bars), 8) - 0.5, -0.5)
    axes.set_xlim(0, 1.2 * max(share for _, share in bars))
