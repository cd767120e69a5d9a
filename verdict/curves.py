"""curves.png: a run's losses, learning rate, loss scale, gradient norm and speed over its steps."""

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.lib.stride_tricks import sliding_window_view

from nanosynth.files import write_atomically
from verdict.criteria import Events
from verdict.figures import GAP_STEPS
from verdict.runs import Run

MARKS = {  # of Events: marker, height in the panel, what it says
    "not_finite": ("X", 0.96, "NaN"),
    "spikes": ("v", 0.90, "spike"),
    "skipped": ("|", 0.03, "skipped step"),
}
PANELS = {
    "lr": ("learning rate", "linear"),
    "grad_norm": ("gradient norm, before clipping", "log"),
    "loss_scale": ("loss scale", "log"),
    "tokens_per_second": ("tokens a second", "linear"),
}


def draw(found: list[Run], events: dict[str, Events], path: Path) -> None:
    """Draw the runs over one another, and replace `path` by the picture."""
    figure = Figure(figsize=(12, 11), layout="constrained")
    axes = figure.subplot_mosaic(
        [["loss", "loss"], ["lr", "grad_norm"], ["loss_scale", "tokens_per_second"]],
        height_ratios=[2.2, 1, 1],
    )
    for number, run in enumerate(found):
        colour = f"C{number % 10}"
        _draw_losses(axes["loss"], run, colour)
        for name in PANELS:
            axes[name].plot(*_series(run.train, name), color=colour, linewidth=1, alpha=0.7)
        for kind, (marker, height, label) in MARKS.items():
            if steps := getattr(events[run.path], kind):
                # At the panel's edge, however far a value flew.
                across = {"transform": axes["loss"].get_xaxis_transform(), "markersize": 9}
                heights = [height] * len(steps)
                axes["loss"].plot(steps, heights, marker, color=colour, label=label, **across)
    for name, (title, scale) in {**PANELS, "loss": ("loss in nats a token", "log")}.items():
        axes[name].set_title(title, loc="left", fontsize=10)
        axes[name].set_xlabel("step")
        axes[name].set_yscale(scale, **({"base": 2} if name == "loss_scale" else {}))
        axes[name].yaxis.set_major_formatter("{x:,g}")
        if scale == "log":  # ticks between the powers get labels too where there are few powers
            axes[name].yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            axes[name].yaxis.set_minor_formatter("{x:,g}")
        axes[name].grid(alpha=0.3, which="both")
    axes["tokens_per_second"].set_ylim(bottom=0)
    handles, labels = axes["loss"].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # a mark that several runs have
    figure.legend(once.values(), once.keys(), fontsize=9, loc="outside upper left", ncols=2)
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    write_atomically(path, png.getvalue())


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
