"""Taking a comparison away, and bringing it back. A file is written when it is asked for, so that it says what is
looked at then."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from .. import measure_views, views
from ..compare import Cell
from ..figure import KINDS as FIGURES
from ..figure import figure
from ..forms import unwritable
from ..output import png, report, sheet
from ..request import Column, CompareRequest, digests_in, joined, problems
from ..saved import open_saved, saved_cells, saved_view, settings_json, write_zip
from ..sessions import Session
from ..studio import LIGHT, PRIVATE, Studio
from ..tabs import refusal

KINDS = {
    "sheet": ("Sheet .png", "comparison.png"),
    "zip": ("All .zip", "comparison.zip"),
    "report": ("Report .html", "comparison.html"),
    "settings": ("Settings .json", "settings.json"),
}
SAVE = """(file) => {
  const link = document.createElement('a');
  link.href = file.url; link.download = file.orig_name;
  document.body.append(link); link.click(); link.remove();
}"""


def takeaway(studio: Studio) -> None:
    """A button for each kind of file, where the page stands now; each is an endpoint of the API too."""
    with gr.Row(elem_classes="tools"):
        for kind, (name, _) in KINDS.items():
            button = gr.Button(name, size="sm", min_width=110, elem_id=f"download_{kind}")
            saves(button, writer(studio, kind), [], api_name=kind)
    with gr.Accordion("Figure for a paper", open=False) as accordion:
        rows = gr.Dropdown(label="Rows", choices=[], multiselect=True, elem_id="figure_rows")
        columns = gr.Dropdown(label="Columns", choices=[], multiselect=True, elem_id="figure_columns")
        with gr.Row(elem_classes="tools"):
            for kind in FIGURES:
                button = gr.Button(f"Figure .{kind}", size="sm", min_width=100, elem_id=f"figure_{kind}")
                saves(button, drawer(studio, kind), [rows, columns], **PRIVATE)
    accordion.expand(chosen_for_figure(studio), None, [rows, columns], **LIGHT, **PRIVATE)


def saves(button: gr.Button, write: Callable[..., str], inputs: list, **options: Any) -> None:
    """Let a button save the file that `write` writes. Each has its own place for it: two may be written at once."""
    taken = gr.File(visible="hidden", label=f"To take away: {button.value}", elem_classes="taken")
    click = button.click(write, inputs, taken, **LIGHT, **options)
    click.success(None, taken, None, js=SAVE, **PRIVATE)


def chosen_for_figure(studio: Studio) -> Callable[[gr.Request], list]:
    """Rows and columns of the comparison that is shown, all of them chosen."""

    def choose(request: gr.Request) -> list:
        asked = studio.sessions.of(request.session_hash).request
        sides = (asked.rows, asked.columns) if asked else ((), ())
        choices = [[(part.label, number) for number, part in enumerate(side)] for side in sides]
        return [gr.Dropdown(choices=parts, value=[number for _, number in parts]) for parts in choices]

    return choose


def drawer(studio: Studio, kind: str) -> Callable[[list[int], list[int], gr.Request], str]:
    def draw(rows: list[int], columns: list[int], request: gr.Request) -> str:
        session = studio.sessions.of(request.session_hash)
        if session.request is None or not session.cells:
            raise refusal("There are no images to take away: compare something first.")
        sides = ((rows, session.request.rows), (columns, session.request.columns))
        if any(number >= len(side) for numbers, side in sides for number in numbers):
            raise refusal("Fold and unfold this section: its rows and columns are of an earlier comparison.")
        try:
            chosen = [[side[number] for number in sorted(numbers)] for numbers, side in sides]
            content = figure(session.request, list(session.cells), *chosen, studio.base_of(session), kind)
        except ValueError as problem:
            raise refusal(problem) from None
        path = session.folder / "out" / f"figure.{kind}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return str(path)

    return draw


def writer(studio: Studio, kind: str) -> Callable[[gr.Request], str]:
    def write(request: gr.Request) -> str:
        session = studio.sessions.of(request.session_hash)
        if session.request is None or not (session.cells or kind == "settings"):
            raise refusal("There are no images to take away: compare something first.")
        evidence = measure_views.evidence(session, studio.findings(session))
        return str(written(session, kind, studio.base_of(session), evidence))

    return write


def written(session: Session, kind: str, base: str, evidence: str = "") -> Path:
    asked, cells = session.request, list(session.cells)
    path = session.folder / "out" / KINDS[kind][1]
    path.parent.mkdir(exist_ok=True)
    if kind == "sheet":
        path.write_bytes(png(sheet(asked, cells, base)))
    elif kind == "zip":
        write_zip(path, asked, cells, session.view, base, evidence)
    elif kind == "report":
        path.write_text(report(asked, cells, base, evidence), encoding="utf-8")
    else:
        path.write_text(settings_json(asked, cells, session.view, base), encoding="utf-8")
    return path


def opened(studio: Studio, session: Session, paths: list[Path]) -> tuple[CompareRequest, object]:
    """Bring a comparison back into a session: its adapters, its images, what was looked at; and name its base.

    Raises:
        ValueError: nothing was changed, and why.
    """
    saved = open_saved(paths)
    data, limits = saved.data, studio.comparer.limits
    wanted = digests_in(data)
    at_hand = {a.sha256: a.path for a in studio.adapters_by_content(wanted)} | session.paths
    asked = CompareRequest.from_dict(data, dict.fromkeys(wanted, "") | at_hand)  # images need no adapters
    if found := problems(asked, limits):
        raise ValueError(joined("Nothing was opened", found))
    if found := unwritable(asked):
        raise ValueError(joined("Nothing was opened: the page's fields cannot hold all values of", found))
    cells = saved_cells(data, asked, saved.read)
    if absent := [adapter.label for adapter in asked.adapters if not adapter.path and not cells]:
        raise ValueError(joined("Add the files of these adapters first, then open the settings again", absent))
    own = tuple(session.add_adapter(adapter) if adapter.path else adapter for adapter in asked.adapters)
    renamed = replace(asked, adapters=own)
    columns = dict(zip(asked.columns, renamed.columns, strict=True))
    session.abandon()
    session.show(renamed, [in_column(cell, columns[cell.column]) for cell in cells])
    session.view = saved_view(data, renamed)
    return renamed, data.get("base")


def in_column(cell: Cell, column: Column) -> Cell:
    """The cell in a column that has the name its adapter goes by here; what its layers held has that name too."""
    right = cell.generated_with == cell.column.held
    return replace(cell, column=column, generated_with=column.held if right else cell.generated_with)


def said(session: Session, base: object, base_here: str) -> str:
    """Say what was opened, and what is missing."""
    count, generated = len(session.request.rows) * len(session.request.columns), len(session.cells)
    if generated == count:
        head, kind = f"Opened with {count} images, generated before; Generate again makes them anew.", "good"
    else:
        head, kind = f"Opened with {generated} of {count} images; Generate again makes them all.", "note"
    notes = []
    if isinstance(base, str) and base != base_here:
        notes.append(f"they were generated with the base {base}; {base_here} is loaded here")
    notes += [
        f"{a.label} is not here: add its file to generate with it" for a in session.request.adapters if not a.path
    ]
    return views.message("\n".join([head, *notes]), "warn" if notes else kind)
