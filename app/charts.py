"""Curves of training as SVG, drawn by matplotlib and coloured by the page: text and axes take the theme's ink.

    loss chart          raw losses faint, their moving average on top, for every run
    fixed-noise chart   validation loss; a diamond for the loss as exported, so that the merge gap is a height
    merge gap chart     what exporting would have cost at each step, of runs that generate samples; a diamond for what
                        it did cost

Runs differ by colour and by dash, and the charts have one x axis.
"""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .runs import Points, Run, thinned

COLOURS = ("#0d9488", "#ea580c", "#8b5cf6", "#0284c7", "#db2777", "#65a30d", "#b45309", "#64748b")
DASHES = ("", "6 2", "2 2", "8 2 2 2")
INK = "#010203"  # stands for the theme's ink until the drawing is done
SIZE = (4.8, 2.7)  # inches; narrow enough to be read on a telephone
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reslora",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
}


def colour_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def dash_of(number: int) -> str:
    """The dash pattern of a run's line, as SVG writes it; it is the same in both charts and in the legend."""
    return DASHES[number % len(DASHES)]


def loss_chart(runs: Sequence[Run], keep: float) -> str:
    """`keep` is the share of the moving average that stays at each step."""
    figure, axes = empty_chart()
    for number, run in enumerate(runs):
        if run.losses:
            axes.plot(*columns(thinned(run.losses)), color=colour_of(number), alpha=0.25, linewidth=0.7)
            axes.plot(*columns(thinned(run.smoothed(keep))), **line_of(number))
    return drawn(figure, axes, runs)


def validation_chart(runs: Sequence[Run]) -> str:
    figure, axes = empty_chart()
    for number, run in enumerate(runs):
        if run.validation:
            axes.plot(*columns(thinned(run.validation)), marker="o", markersize=3, **line_of(number))
        if run.merge:
            end, colour = run.merged_at, colour_of(number)
            axes.plot([end, end], [run.merge.trained, run.merge.exported], color=colour, linewidth=1)
            axes.plot(end, run.merge.exported, "D", color=colour, markersize=6, fillstyle="none")
    return drawn(figure, axes, runs)


def gap_chart(runs: Sequence[Run]) -> str:
    figure, axes = empty_chart()
    for number, run in enumerate(runs):
        if run.gaps:
            axes.plot(*columns(thinned(run.gaps)), marker="o", markersize=3, **line_of(number))
        if run.merge:
            axes.plot(run.merged_at, run.merge.gap, "D", color=colour_of(number), markersize=6, fillstyle="none")
    return drawn(figure, axes, runs)


def line_of(number: int) -> dict[str, Any]:
    dashes = [float(length) for length in dash_of(number).split()]
    return {"color": colour_of(number), "linestyle": (0, dashes) if dashes else "solid", "linewidth": 1.6}


def columns(curve: Points) -> tuple[tuple[float, ...], ...]:
    return tuple(zip(*curve, strict=True))


def empty_chart() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        return figure, figure.subplots()


def drawn(figure: Figure, axes: Axes, runs: Sequence[Run]) -> str:
    """The SVG element; nothing if there is no line."""
    if not axes.lines:
        return ""
    values = [value for line in axes.lines for value in line.get_ydata()]
    axes.set_xlim(0, max(1, *(run.last_step for run in runs)) * 1.03)
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_xlabel("step")
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    return drawing[drawing.index("<svg") :].replace(INK, "currentColor")
