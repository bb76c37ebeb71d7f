"""The grid of images, whose cells open the viewer (static/viewer.js). What is looked at is stored."""

from dataclasses import replace

import gradio as gr

from .. import views
from ..pages import PageAxis
from ..request import Limits
from ..saved import VIEWS, View
from ..sessions import Session
from ..studio import Studio
from .latest import Latest

MOST_PAGES = Limits().images
ATTACH = "viewer.attach(element, trigger);"


def looking(studio: Studio) -> tuple[gr.HTML, gr.Dropdown]:
    """The grid, where the page stands now, and what it has a page for each of."""
    grid = gr.HTML(js_on_load=ATTACH, elem_id="grid", padding=False)
    with gr.Row(elem_classes="tools turning"):
        turned = gr.Button("Swap rows and columns", size="sm", scale=0, min_width=180, elem_id="transpose")
        pages = gr.Dropdown(
            [str(axis) for axis in PageAxis],
            value=str(PageAxis.NOTHING),
            label="A page for each",
            min_width=200,
            elem_id="pages",
        )

    def looked(session: Session, event: gr.EventData) -> None:
        view = view_of(event, session.view)
        if session.request is not None and view is not None:
            keep(session, view)

    def turn(session: Session) -> str:
        keep(session, replace(session.view, transposed=not session.view.transposed))
        return views.grid(session)

    def page(session: Session, axis: str) -> str:
        keep(session, replace(session.view, pages=PageAxis(axis), page=0))
        return views.grid(session)

    def keep(session: Session, view: View) -> None:
        session.view = view
        if session.visit:
            session.visit.write_view(view)

    latest = Latest(studio)
    latest.on([grid.click], looked, [], [], in_turn=True, says=True)
    latest.on([turned.click], turn, [], [grid], adds=True)
    latest.on([pages.input], page, [pages], [grid], in_turn=True)
    return grid, pages


def view_of(event: gr.EventData, now: View) -> View | None:
    """Read from the browser what is looked at, or the page that it turned to; None where neither is there."""
    said = {name: getattr(event, name, None) for name in ("name", "row", "left", "right")}
    numbers = [said[name] for name in ("row", "left", "right")]
    if type(page := getattr(event, "page", None)) is int and 0 <= page < MOST_PAGES:
        return replace(now, page=page)
    sound = said["name"] in VIEWS and all(type(number) is int and number >= 0 for number in numbers)
    return replace(now, **said) if sound else None
