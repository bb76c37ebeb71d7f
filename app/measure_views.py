"""HTML of measures and of the verdict. Words from outside go through `views.escaped`."""

from collections.abc import Sequence

from .measures import DRIFT, Measure
from .request import Column, CompareRequest
from .run_views import said_gap
from .sessions import Session
from .verdict import Findings
from .views import clamped, escaped, message, table, vote_result


def measures(request: CompareRequest, found: Sequence[Measure]) -> str:
    """A line for each measure, a column for each column of the comparison; and the same less the base's, row by row."""
    columns = request.columns

    def said(measure: Measure, column: Column) -> str:
        if (figure := measure.figure(column)) is not None:
            return str(figure)
        return "–" if measure.name == DRIFT and column.adapter is None else measure.wanting

    def gained(measure: Measure, column: Column) -> str:
        figure = measure.paired(column, Column(setting=column.setting))
        return "–" if figure is None else f"{figure.mean:+.3f} {figure.interval}"

    lines = [(measure.name, *(said(measure, column) for column in columns)) for measure in found]
    whole = table(("measure", *(c.label for c in columns)), lines, "Measures: mean (95 % interval), n")
    adapted = [column for column in columns if column.adapter]
    if not found or not adapted or len(adapted) == len(columns):
        return whole
    lines = [(m.name, *(gained(m, column) for column in adapted)) for m in found if m.name != DRIFT]
    head = ("measure", *(column.label for column in adapted))
    return whole + table(head, lines, "Relative to the base: mean difference in the same row (95 % interval)")


def contact_sheet(session: Session, measure: Measure, least_first: bool = False) -> str:
    """Every image that a measure has a value of, sorted by it, so that the eye can check the number."""
    cells = [cell for cell in session.cells if cell.row in measure.values[cell.column]]
    cells.sort(key=lambda cell: measure.values[cell.column][cell.row], reverse=not least_first)
    items = "".join(
        f'<li><img src="{session.addresses[id(cell)]}" alt="{escaped(f"{cell.column.label}: {cell.row.label}")}">'
        f"<b>{measure.values[cell.column][cell.row]:.3f}</b> <span>{escaped(cell.column.label)}</span>"
        f"<small>{clamped(cell.row.label)}</small></li>"
        for cell in cells
    )
    return f'<ol class="sheet" aria-label="Images by {escaped(measure.name)}">{items}</ol>' if items else ""


def evidence(session: Session, found: Findings | None) -> str:
    """Verdict, votes and measures, for the report; votes as far as their result was looked at."""
    parts = [verdict(found), measures(session.request, session.measured) if session.measured else ""]
    if found and found.ballot:
        parts.append(vote_result(found.ballot))
    return "".join(parts)


def verdict(found: Findings | None) -> str:
    """Say what holds of two columns, and show the figures that it is said from."""
    if found is None:
        return ""
    lines = [
        (name, difference, "" if name in found.shown else "not shown") for name, difference in found.differences.items()
    ]
    differences = table(("measure", "difference (95 % interval), n", ""), lines, "Row by row") if lines else ""
    merges = "; ".join(f"{label} {said_gap(gap)}" for label, gap in found.gaps.items())
    gaps = message(f"Merge gap, as the files say: {merges}.") if merges else ""
    said = "\n".join([f"{found.first.label} against {found.second.label}", *found.sentences()])
    return f'<section aria-label="Verdict">{message(said)}{differences}{gaps}</section>'
