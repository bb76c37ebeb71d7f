"""Curves of training: charts with hover and zoom for the page, and the same curves as SVG and CSV to take away.

    loss          raw losses faint, their moving average on top, for every run
    validation    loss on fixed noise; a diamond for the loss as exported, so that the merge gap is a height
    gap           what exporting would have cost at each step, of runs that generate samples; a diamond for what it did

`panels` is the one home of what a chart shows. Altair draws it for the page and matplotlib as SVG, since Altair's own
export needs a JavaScript engine. Runs differ by colour and by dash, and the charts have one x axis.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import altair
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .foreign import text_cell
from .runs import Points, RunFolder, thinned

COLOURS = ("#0d9488", "#ea580c", "#8b5cf6", "#0284c7", "#db2777", "#65a30d", "#b45309", "#64748b")
DASHES = ("", "6 2", "2 2", "8 2 2 2")
TICKS = ".3~g"  # d3's: 0.34, and 3e-8 where decimals would fill the chart
ROUNDING = 1e-6  # a merge gap below this is of float32
SIZE = (4.8, 3.0)  # inches of a panel of the SVG
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reslora",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.25,
}

INK = "currentColor"  # the theme's, light or dark
LOOKS = {
    "background": "transparent",
    "padding": {"top": 48, "left": 8, "right": 14, "bottom": 8},  # the title is the page's, at times in two lines
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "tickColor": INK,
        "domainColor": INK,
        "gridColor": INK,
        "gridOpacity": 0.12,
    },
    "view": {"stroke": None},
}
EMBEDDED = {"renderer": "svg", "actions": False}


def colour_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def dash_of(number: int) -> str:
    """The dash pattern of a run's line, as SVG writes it; it is the same in all charts and in the legend."""
    return DASHES[number % len(DASHES)]


def dashes(number: int) -> list[float]:
    return [float(length) for length in dash_of(number).split()]


@dataclass(frozen=True)
class Line:
    """One run in one chart."""

    run: str
    number: int  # of the run, for its colour and dash
    curve: Points
    faint: Points = ()  # drawn beneath
    exported: Points = ()  # a diamond


@dataclass(frozen=True)
class Panel:
    """One chart."""

    name: str
    title: str
    note: str
    lines: list[Line]

    @property
    def has_log_scale(self) -> bool:
        values = [value for line in self.lines for _, value in (*line.curve, *line.faint, *line.exported)]
        return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def panels(runs: Sequence[RunFolder], keep: float) -> list[Panel]:
    """Charts with something to show. `keep` is the share of the moving average that stays at each step."""
    numbered = list(enumerate(runs))
    end = {n: (run.merged_at, run.merge) for n, run in numbered if run.merge}
    losses = [Line(run.label, n, run.smoothed(keep), run.losses) for n, run in numbered if run.losses]
    fixed = [
        Line(run.label, n, run.validation, exported=[(end[n][0], end[n][1].exported)] if n in end else [])
        for n, run in numbered
        if run.validation or n in end
    ]
    gaps = [
        Line(run.label, n, run.gaps, exported=[(end[n][0], end[n][1].gap)] if n in end else [])
        for n, run in numbered
        if run.gaps and any(run.estimates for run in runs)
    ]
    if all(abs(gap) < ROUNDING for line in gaps for _, gap in line.curve):
        gaps = []  # a chart of rounding would look like one of a loss
    found = (
        Panel("loss", "Training loss", "faint: every step, bold: smoothed", losses),
        Panel("validation_loss", "Fixed-noise validation loss", "◇ as exported", fixed),
        Panel("merge_gap", "Merge gap", "◇ as exported", gaps),
    )
    return [panel for panel in found if panel.lines]


# ------------------------------------------------------------------------------------------------ for the page


def chart(panel: Panel) -> altair.LayerChart:
    """Hover says the values; drag moves, the wheel with Shift zooms, and a double click shows all again."""

    def rows(name: str) -> altair.InlineData:
        return altair.InlineData(
            values=[
                {"run": line.run, "step": step, panel.name: value, "alone": len(points) == 1}
                for line in panel.lines
                for points in [thinned(getattr(line, name))]
                for step, value in points
            ]
        )

    scale = altair.Scale(type="log") if panel.has_log_scale else altair.Scale(zero=False)
    names = [line.run for line in panel.lines]
    colours = altair.Scale(domain=names, range=[colour_of(line.number) for line in panel.lines])
    patterns = altair.Scale(domain=names, range=[dashes(line.number) or [1, 0] for line in panel.lines])
    place = {
        "x": altair.X("step:Q", title="step", axis=altair.Axis(tickMinStep=1, tickCount=5, format="d")),
        "y": altair.Y(f"{panel.name}:Q", title=None, scale=scale, axis=altair.Axis(format=TICKS)),
        "color": altair.Color("run:N", scale=colours, legend=None),
    }
    words = [altair.Tooltip("run:N"), altair.Tooltip("step:Q"), altair.Tooltip(f"{panel.name}:Q", format=".5~g")]
    wheel = "wheel![event.shiftKey]"
    zoom = altair.selection_interval(bind="scales", zoom=wheel)
    faint = altair.Chart(rows("faint")).mark_line(opacity=0.25, strokeWidth=0.7).encode(**place)
    bold = (
        altair.Chart(rows("curve"))
        .mark_line(strokeWidth=2)
        .encode(**place, strokeDash=altair.StrokeDash("run:N", scale=patterns, legend=None))
    )
    near = altair.selection_point(nearest=True, on="pointerover", empty=False)
    always = {"test": "datum.alone", "value": 1}  # a line of one point is none
    shown = altair.OpacityValue(0, condition=[{"param": near.name, "empty": False, "value": 1}, always])
    dots = altair.Chart(rows("curve")).mark_circle(size=60).encode(**place, tooltip=words, opacity=shown)
    ends = altair.Chart(rows("exported")).mark_point(shape="diamond", size=90).encode(**place, tooltip=words)
    layers = altair.layer(faint, bold, dots.add_params(near), ends).add_params(zoom)
    return layers.configure(**LOOKS).properties(width="container", height=210, usermeta={"embedOptions": EMBEDDED})


# ------------------------------------------------------------------------------------------------ to take away


def curves_svg(runs: Sequence[RunFolder], keep: float) -> str:
    """All charts side by side, with a legend; text stays text."""
    shown = panels(runs, keep)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0] * max(1, len(shown)), SIZE[1]), layout="constrained")
        for number, panel in enumerate(shown, start=1):
            axes = figure.add_subplot(1, len(shown), number)
            for line in panel.lines:
                colour, pattern = colour_of(line.number), dashes(line.number)
                style = {"color": colour, "linestyle": (0, pattern) if pattern else "solid"}
                if line.faint:
                    axes.plot(*columns(thinned(line.faint)), color=colour, alpha=0.25, linewidth=0.7)
                if line.curve:
                    alone = "o" if len(line.curve) == 1 else None
                    axes.plot(*columns(thinned(line.curve)), **style, linewidth=1.6, marker=alone, label=line.run)
                if line.exported:
                    axes.plot(*columns(line.exported), "D", color=colour, markersize=6, fillstyle="none")
            axes.set(title=panel.title, xlabel="step", yscale="log" if panel.has_log_scale else "linear")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=True))
            if number == 1:
                axes.legend(fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def columns(curve: Points) -> tuple[tuple[float, ...], ...]:
    return tuple(zip(*curve, strict=True))


def curves_csv(runs: Sequence[RunFolder], keep: float) -> str:
    """A line for each point of each curve, none left out: run, curve, step, value."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("run", "curve", "step", "value"))
    for panel in panels(runs, keep):
        for line in panel.lines:
            smoothed = f"{panel.name}, smoothed" if line.faint else panel.name
            curves = {panel.name: line.faint} if line.faint else {}
            for name, curve in {**curves, smoothed: line.curve, f"{panel.name}, as exported": line.exported}.items():
                writer.writerows((text_cell(line.run), name, step, value) for step, value in curve)
    return buffer.getvalue()
