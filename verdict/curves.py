"""curves.png, and its panels one by one: a run's losses, learning rate, loss scale, gradient norm
and speed over its steps.
"""

import io
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.lib.stride_tricks import sliding_window_view

from nanosynth.files import write_atomically
from verdict.figures import GAP_STEPS
from verdict.runs import Run

INK = "#010203"  # a colour that no line has, to be replaced by the page's own
PLAIN = {"text.parse_math": False}  # a $ in a run's name is no formula
MARKS = {  # of Events: marker, height in the panel, what it says
    "not_finite": ("X", 0.96, "NaN"),
    "spikes": ("v", 0.90, "spike"),
    "skipped": ("|", 0.03, "skipped step"),
}
PANELS = {
    "loss": ("loss in nats a token", "log"),
    "lr": ("learning rate", "linear"),
    "grad_norm": ("gradient norm, before clipping", "log"),
    "loss_scale": ("loss scale", "log"),
    "tokens_per_second": ("tokens a second", "linear"),
}


def draw(found: list[Run], path: Path) -> None:
    """Draw the runs over one another, and replace `path` by the picture."""
    rows = [["loss", "loss"], ["lr", "grad_norm"], ["loss_scale", "tokens_per_second"]]
    with rc_context(PLAIN):
        _write(_figure(found, (12, 11), rows, height_ratios=[2.2, 1, 1]), path)


def _figure(found: list[Run], size: tuple, rows: list[list[str]], **ratios: list) -> Figure:
    """The panels that `rows` names; a legend above that of the losses."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplot_mosaic(rows, **ratios)
    for name, axis in axes.items():
        _draw_panel(axis, name, found)
    if "loss" in axes:
        handles, labels = axes["loss"].get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))  # a mark that several runs have
        n_across = len(rows[0])  # panels, and as many runs in a line of the legend
        place = {"loc": "outside upper left", "ncols": n_across}
        figure.legend(list(once.values()), list(once), fontsize=9, **place)
    return figure


def _write(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    write_atomically(path, png.getvalue())


def draw_labels(labels: dict[str, list[tuple]], path: Path) -> None:
    """Bars of the perplexity by source and category, with their intervals; replaces `path`.
    `labels` as of `figures.by_label`.
    """
    with rc_context(PLAIN):
        n_bars = max(map(len, labels.values()))
        size = (6 * len(labels) + 1, 1.2 + 0.28 * n_bars)
        figure = Figure(figsize=size, layout="constrained")
        for axis, (use, parts) in zip(
            figure.subplots(1, len(labels), squeeze=False)[0], labels.items(), strict=True
        ):
            names, values, intervals, *_ = zip(*parts, strict=True)
            axis.barh(range(len(parts)), values, color="C0", alpha=0.8)
            for place, interval in enumerate(intervals):
                axis.plot(interval, [place] * len(interval), color="black")
            axis.set_yticks(range(len(parts)), names)
            axis.set_ylim(n_bars - 0.5, -0.5)
            axis.set_xlim(left=0)
            axis.set_xlabel(f"perplexity by {use}, with its 95% interval")
        _write(figure, path)


def as_svg(found: list[Run]) -> list[str]:
    """Each panel as an <svg> of its own, drawn in the text colour of the page that has it."""
    pictures = []
    lines = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK)
    lines |= dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK)
    with rc_context({**PLAIN, **lines, "svg.fonttype": "none", "legend.framealpha": 0}):
        for name in PANELS:
            figure = _figure(found, (7, 5) if name == "loss" else (5, 3), [[name]])
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
            svg = text.getvalue()
            pictures.append(svg[svg.index("<svg") :].replace(INK, "currentColor"))
    return pictures


def _draw_panel(axis: Axes, name: str, found: list[Run]) -> None:
    for number, run in enumerate(found):
        colour = f"C{number % 10}"
        if name == "loss":
            _draw_losses(axis, run, colour)
        else:
            axis.plot(*_series(run.train, name), color=colour, linewidth=1, alpha=0.7)
    title, scale = PANELS[name]
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("step")
    axis.set_yscale(scale, **({"base": 2} if name == "loss_scale" else {}))
    axis.yaxis.set_major_formatter("{x:,g}")
    if scale == "log":  # ticks between the powers get labels too where there are few powers
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axis.yaxis.set_minor_formatter("{x:,g}")
    axis.grid(alpha=0.3, which="both")
    if name == "tokens_per_second":
        axis.set_ylim(bottom=0)


def _series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), NaN where there was no finite value: the line has a hole there."""
    steps = np.array([record["step"] for record in records])
    return steps, np.array([record[name] for record in records], dtype=float)


def _draw_losses(axis: Axes, run: Run, colour: str) -> None:
    steps, losses = _series(run.train, "loss")
    axis.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.6)
    steps, losses = steps[np.isfinite(losses)], losses[np.isfinite(losses)]
    window = max(1, min(GAP_STEPS, len(steps) // 30))
    if len(steps):
        medians = np.median(sliding_window_view(losses, window), axis=1)
        centres = steps[window // 2 :][: len(medians)]
        label = f"{run.path}: training, each step faint, median of {window}"
        axis.plot(centres, medians, color=colour, linewidth=1.6, label=label)
    marks = {"marker": "o", "markersize": 5, "markeredgecolor": "black"}
    label = f"{run.path}: validation" if run.val else None
    axis.plot(*_series(run.val, "loss"), "--", color=colour, linewidth=0.8, label=label, **marks)
    for kind, (marker, height, label) in MARKS.items():
        if steps := getattr(run.events, kind):
            # At the panel's edge, however far a value flew.
            across = {"transform": axis.get_xaxis_transform(), "markersize": 9}
            axis.plot(steps, [height] * len(steps), marker, color=colour, label=label, **across)
