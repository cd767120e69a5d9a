"""curves.png: a run's losses, learning rate, loss scale, gradient norm and speed over its steps."""

import itertools
import math
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nanosynth import criteria, runs

COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#17becf")
MARKS = {  # of Events: marker, colour, height in the panel, what it says
    "not_finite": ("X", "black", 0.96, "NaN"),
    "spikes": ("v", "red", 0.90, "spike"),
    "rises": ("^", "red", 0.84, "rise of the running mean"),
    "overflows": ("|", "#b8860b", 0.03, "float16 overflow, step skipped"),
}
PLAIN = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}")
PANELS = (
    ("lr", "learning rate", "linear"),
    ("grad_norm", "gradient norm, before clipping", "log"),
    ("loss_scale", "loss scale", "log"),
    ("tokens_per_second", "tokens a second", "linear"),
)


def draw(found: list[runs.Run], events: dict[str, criteria.Events], path: Path) -> None:
    """Draw the runs over one another, and replace `path` by the picture."""
    figure = Figure(figsize=(12, 11), layout="constrained")
    axes = figure.subplot_mosaic(
        [["loss", "loss"], ["lr", "grad_norm"], ["loss_scale", "tokens_per_second"]],
        height_ratios=[2.2, 1, 1],
    )
    colours = dict(zip((run.path for run in found), itertools.cycle(COLOURS)))
    for run in found:
        _draw_losses(axes["loss"], run, colours[run.path])
        for name, _, _ in PANELS:
            line = {"color": colours[run.path], "linewidth": 1, "alpha": 0.7}
            axes[name].plot(*_series(run.train, name), **line)
    for path_of_run, colour in colours.items():
        _mark(axes["loss"], events[path_of_run], colour, tuple(MARKS))
        _mark(axes["loss_scale"], events[path_of_run], colour, ("overflows",))
        _mark(axes["grad_norm"], events[path_of_run], colour, ("not_finite", "spikes"))
    for name, title, scale in PANELS:
        axes[name].set_title(title, loc="left", fontsize=10)
        axes[name].set_yscale(scale)
        axes[name].grid(alpha=0.3)
        axes[name].yaxis.set_major_formatter(PLAIN)
        axes[name].yaxis.set_minor_formatter(NullFormatter())
    axes["tokens_per_second"].set_ylim(bottom=0)
    for name in ("loss_scale", "tokens_per_second"):
        axes[name].set_xlabel("step")
    _finish_losses(axes["loss"], found)
    figure.suptitle(", ".join(run.path for run in found), x=0.01, ha="left", fontsize=12)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


def _series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), NaN where there was no finite value: the line has a hole there."""
    values = [math.nan if record[name] is None else record[name] for record in records]
    return np.array([record["step"] for record in records]), np.array(values, dtype=float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """At each place the mean of the finite ones among the `window` values around it."""
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    places = np.arange(len(values))
    starts = np.maximum(0, places - (window - 1) // 2)
    ends = np.minimum(len(values), places + window // 2 + 1)
    with np.errstate(invalid="ignore"):  # no finite value: NaN, and no line
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def _draw_losses(axis: Axes, run: runs.Run, colour: str) -> None:
    steps, losses = _series(run.train, "loss")
    window = max(1, min(runs.GAP_STEPS, len(steps) // 30))
    axis.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.6)
    label = f"{run.path}: training, mean of {window} steps"
    axis.plot(steps, smooth(losses, window), color=colour, linewidth=1.6, label=label)
    steps, losses = _series(run.val, "loss")
    axis.plot(
        *(steps, losses, "o--"),
        **{"color": colour, "markeredgecolor": "black", "markersize": 5, "linewidth": 0.8},
        label=f"{run.path}: validation",
    )


def _mark(axis: Axes, events: criteria.Events, edge: str, kinds: tuple[str, ...]) -> None:
    """Marks at the panel's edge, outlined in the run's colour, however far a value flew."""
    for kind in kinds:
        if steps := getattr(events, kind):
            marker, colour, height, label = MARKS[kind]
            axis.plot(
                *(steps, [height] * len(steps), marker),
                **{"color": colour, "markersize": 9, "transform": axis.get_xaxis_transform()},
                **({} if marker == "|" else {"markeredgecolor": edge, "markeredgewidth": 1.2}),
                label=label,
            )


def _finish_losses(axis: Axes, found: list[runs.Run]) -> None:
    axis.set_title("loss in nats a token; training faint", loc="left", fontsize=10)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(PLAIN)
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axis.tick_params(axis="y", which="minor", labelsize=8)
    axis.grid(alpha=0.3, which="both")
    if any(run.config and run.config["settings"]["loss_on"] == "all" for run in found):
        limit = math.log(criteria.MAX_PERPLEXITY)
        axis.axhline(limit, color="grey", linestyle=":", label="perplexity 20")
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        axis.legend(once.values(), once.keys(), fontsize=9, loc="upper right")
