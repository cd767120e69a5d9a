"""What prepare.py read, kept and dropped, and what the kept conversations are like.

Counted document by document in little memory; told as meta.json's figures, a table and a picture.
"""

import warnings
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from nanosynth.tokenizer import Turn

SPLITS = ("train", "val")
MOST_NAMES = 1000  # of sources, and of categories, that are told apart; further ones count as one
UNNAMED, OTHERS = "(not given)", "(others)"


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
        tokens, turns = np.array(self.tokens), Counter(self.turns)
        figures = {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_read - self.dropped.total(),
            "rows_dropped": dict(self.dropped.most_common()),
            "troubles": dict(self.troubles),
            "splits": self.splits,
            "document_tokens": quantiles(tokens),
            "document_turns": quantiles(np.array(self.turns)),
            "documents_by_turns": {str(number): turns[number] for number in sorted(turns)},
            "assistant_share": quantiles(np.array(self.assistant_tokens) / tokens),
        }
        for name, shares in self.shares.items():
            ordered = sorted(shares.items(), key=lambda item: (-item[1][1], item[0]))
            figures[f"by_{name}"] = {
                key: {"documents": documents, "tokens": n} for key, (documents, n) in ordered
            }
        return figures


def names_of(row: object) -> tuple[str, str]:
    """A row's source and category."""
    named = row if isinstance(row, dict) else {}
    values = (named.get("source"), named.get("category"))
    return tuple(
        value[:80].encode("utf-8", "replace").decode()
        if isinstance(value, str) and value.strip()
        else UNNAMED
        for value in values
    )


def quantiles(values: np.ndarray) -> dict[str, int | float]:
    found = {f"p{q}": np.percentile(values, q) for q in (1, 10, 50, 90, 99, 100)}
    is_whole = np.issubdtype(values.dtype, np.integer)
    return {name: int(v) if is_whole else round(float(v), 4) for name, v in found.items()}


def table(meta: dict) -> str:
    """The figures of meta.json for a reader."""
    lines = [
        _row("rows read", f"{meta['rows_read']:,}"),
        _row("rows kept", f"{meta['rows_kept']:,}"),
    ]
    lines += [_row(f"  dropped: {name}", f"{n:,}") for name, n in meta["rows_dropped"].items()]
    lines += [_row(f"  seen: {name}", f"{n:,}") for name, n in meta["troubles"].items()]
    lines.append(f"{'':<34}" + "".join(f"{split:>14}" for split in SPLITS))
    splits = [meta["splits"][split] for split in SPLITS]
    for key in ("documents", "tokens", "assistant_tokens", "text_bytes"):
        lines.append(f"{key.replace('_', ' '):<34}" + "".join(f"{s[key]:>14,}" for s in splits))
    per_token = [f"{s['text_bytes'] / s['tokens']:>14.2f}" for s in splits]
    lines.append(f"{'bytes of text a token':<34}" + "".join(per_token))
    lines.append("tokens a document: " + _listed(meta["document_tokens"]))
    lines.append("turns a document: " + _listed(meta["document_turns"]))
    share = {name: f"{value:.0%}" for name, value in meta["assistant_share"].items()}
    lines.append("assistant's share of a document's tokens: " + _listed(share))
    n_tokens = sum(s["tokens"] for s in splits)
    for name in ("source", "category"):
        found = list(meta[f"by_{name}"].items())
        shares = [f"{key} {counts['tokens'] / n_tokens:.1%}" for key, counts in found[:6]]
        more = [f"{len(found) - 6} more"] if len(found) > 6 else []
        lines.append(f"tokens by {name}: " + ", ".join(shares + more))
    if leaks := meta.get("leak_check"):
        sampled = f" (one in {leaks['one_in']} looked at)" if leaks["one_in"] > 1 else ""
        lines += [
            f"{leaks['tokens']}-grams of validation that are in training: "
            f"{_of(leaks['val_grams_in_train'], leaks['val_grams'])}{sampled}",
            f"  validation documents with one: "
            f"{_of(leaks['val_documents_with_any'], leaks['val_documents'])}; with half or more: "
            f"{_of(leaks['val_documents_with_half'], leaks['val_documents'])}",
        ]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"{name:<48}{value:>14}"


def _listed(values: dict) -> str:
    return "  ".join(
        f"{name} {value if isinstance(value, str) else f'{value:,}'}"
        for name, value in values.items()
    )


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({count / max(1, total):.1%})"


def draw(tally: Tally, path: Path, title: str) -> None:
    """The picture: lengths, turns, assistant's share, sources and categories."""
    import matplotlib  # slow to import, and needed here alone

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, places = pyplot.subplot_mosaic(
        [["tokens", "turns", "share"], ["source", "source", "category"]],
        figsize=(15, 9),
        layout="constrained",
    )
    figure.suptitle(title)
    tokens = np.array(tally.tokens)
    edges = np.geomspace(tokens.min(), tokens.max() + 1, 60)
    places["tokens"].hist(tokens, bins=edges)
    places["tokens"].set(xscale="log", xlabel="tokens of a conversation", ylabel="conversations")
    ticks = [n * 10**power for power in range(9) for n in (1, 2, 5)]
    ticks = [tick for tick in ticks if edges[0] <= tick <= edges[-1]]
    places["tokens"].set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
    places["tokens"].set_xticks([], minor=True)
    for q, style in ((50, "-"), (90, "--"), (99, ":")):
        value = np.percentile(tokens, q)
        label = f"{'median' if q == 50 else f'{q} of 100 below'} {value:,.0f}"
        places["tokens"].axvline(value, color="black", linestyle=style, linewidth=1, label=label)
    places["tokens"].legend(frameon=False)
    turns = np.minimum(np.array(tally.turns), 12)
    places["turns"].hist(turns, bins=np.arange(0.5, 13), rwidth=0.9)
    places["turns"].set(yscale="log", xlabel="turns (12: or more)", ylabel="conversations (log)")
    places["turns"].set(ylim=(0.5, None), xlim=(0.5, 12.5))
    places["turns"].xaxis.set_major_locator(MaxNLocator(integer=True))
    places["share"].hist(np.array(tally.assistant_tokens) / tokens, bins=np.linspace(0, 1, 51))
    places["share"].set(xlabel="assistant's share of the tokens", ylabel="conversations")
    for name in ("tokens", "share"):
        places[name].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for name, shares in tally.shares.items():
        _draw_shares(places[name], name, shares)
    with warnings.catch_warnings():  # a name in a script that the font lacks shows as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def _draw_shares(place: object, name: str, shares: dict[str, list[int]], most: int = 20) -> None:
    """Bars of the largest shares of all tokens; the rest is one bar."""
    total = sum(tokens for _, tokens in shares.values())
    ordered = sorted(shares.items(), key=lambda item: (-item[1][1], item[0]))
    bars = [(key, tokens / total) for key, (_, tokens) in ordered[:most]]
    if rest := ordered[most:]:
        bars.append((f"{len(rest)} more", sum(tokens for _, (_, tokens) in rest) / total))
    labels = [key if len(key) <= 32 else f"{key[:31]}…" for key, _ in bars]
    drawn = place.barh(range(len(bars)), [share for _, share in bars])
    place.bar_label(drawn, [f" {share:.1%}" for _, share in bars])
    # A label is the data's own text: '$' would begin a formula.
    place.set_yticks(range(len(bars)), [label.replace("$", r"\$") for label in labels])
    place.set(xlabel=f"share of all tokens, by {name}")
    place.set_ylim(max(len(bars), 8) - 0.5, -0.5)
    place.set_xlim(0, 1.2 * max(share for _, share in bars))
