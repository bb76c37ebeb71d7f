"""Looking at a comparison: the grid of all images, or two of one row by slider, flip or heat map."""

from dataclasses import dataclass

import gradio as gr
from gradio.events import Dependency

from .. import views
from ..output import enlarged, heat_map
from ..saved import VIEWS, View
from ..sessions import Session
from ..studio import LIGHT, PRIVATE, Studio

PAIR_SIDE = 512
NOT_GENERATED = "Not both of these images are generated."
GRID_CLICKS = """element.addEventListener('click', (event) => {
  const cell = event.target.closest('[data-row]');
  if (cell) trigger('click', {row: Number(cell.dataset.row), column: Number(cell.dataset.column)});
});"""
FLIP_CLICKS = """element.addEventListener('click', (event) => {
  if (event.target.closest('.turn, .flip')) element.querySelector('.flip').classList.toggle('turned');
});"""


@dataclass(frozen=True)
class Looking:
    """The controls of the views, as other events fill them."""

    studio: Studio
    view: gr.Radio
    pickers: list[gr.Dropdown]  # row, left, right
    grid: gr.HTML
    shown: list

    @property
    def controls(self) -> list:
        return [self.view, *self.pickers]

    def values(self, session: Session, view: View) -> list:
        """Values of `controls`, for a view of the session's comparison."""
        rows, columns = views.pair_choices(session.request)
        row = gr.Dropdown(choices=rows, value=view.row)
        return [view.name, row, *(gr.Dropdown(choices=columns, value=side) for side in (view.left, view.right))]

    def follow(self, event: Dependency) -> None:
        """Once something was generated: fill the pickers, and look at what opened settings had looked at."""
        event.then(self.generated, None, self.controls, **LIGHT, **PRIVATE)

    def generated(self, request: gr.Request) -> list:
        session = self.studio.sessions.of(request.session_hash)
        if session.request is None:
            return [gr.skip()] * len(self.controls)
        if session.resume and session.resume[0] == session.request:
            return self.values(session, session.resume[1])
        _, *pickers = self.values(session, View.of(session.request))
        return [gr.skip(), *pickers]

    def refresh(self, event: Dependency) -> None:
        """Fill the chosen view anew, also where no control has changed."""
        event.then(self.show, self.controls, self.shown, **LIGHT, **PRIVATE)

    def show(self, chosen: str, i: int | None, a: int | None, b: int | None, request: gr.Request) -> list:
        """Fill the chosen view and hide the others."""
        session = self.studio.sessions.of(request.session_hash)
        single = chosen != "Grid"
        shown = [gr.update(visible=single), gr.update(visible=not single)]
        shown += [gr.update(visible=False)] * 3 + [""]
        if session.request is None or None in (i, a, b):
            return shown
        rows, columns = session.request.rows, session.request.columns
        if i >= len(rows) or max(a, b) >= len(columns):  # of the comparison before
            return shown
        session.view = View(chosen, i, a, b)
        if not single:
            return shown
        generated = {(c.row, c.column): c for c in session.cells}
        line = rows[i]
        first, second = (generated.get((line, columns[j])) for j in (a, b))
        if first is None or second is None:
            shown[5] = views.message(NOT_GENERATED, "warn")
        elif chosen == "Slider":
            images = tuple(enlarged(c.image, PAIR_SIDE) for c in (first, second))
            label = f"{first.column.label}  |  {second.column.label}"
            shown[2] = gr.ImageSlider(value=images, label=label, visible=True)
        elif chosen == "Flip":
            shown[3] = gr.HTML(value=views.flip(session, first, second), visible=True)
        else:
            heat = enlarged(heat_map(first.image, second.image), PAIR_SIDE)
            shown[4] = gr.Image(value=heat, visible=True)
            shown[5] = views.difference_note(first, second)
        return shown

    def look_closer(self, event: gr.EventData, request: gr.Request) -> tuple:
        """A cell of the grid was chosen: hold it against the first column, or the first against the last."""
        columns = len(self.studio.sessions.of(request.session_hash).request.columns)
        chosen = event.column
        return "Slider", event.row, 0, chosen if chosen else columns - 1


def looking(studio: Studio) -> Looking:
    """The views, where the page stands now."""
    view = gr.Radio(VIEWS, value="Grid", label="View", elem_id="view", elem_classes="views")
    with gr.Row(visible=False) as row_of_pickers:
        pickers = [
            gr.Dropdown(label="Prompt and seed", choices=[], scale=2, min_width=160, elem_id="pair_row"),
            gr.Dropdown(label="Left", choices=[], min_width=120, elem_id="pair_left"),
            gr.Dropdown(label="Right", choices=[], min_width=120, elem_id="pair_right"),
        ]
    note = gr.HTML(padding=False, elem_id="pair_note")
    grid = gr.HTML(js_on_load=GRID_CLICKS, elem_id="grid", padding=False)
    slider = gr.ImageSlider(
        label="Drag to compare", type="pil", format="png", visible=False, elem_id="slider", max_height=560
    )
    flip = gr.HTML(js_on_load=FLIP_CLICKS, visible=False, elem_id="flip", padding=False)
    heat = gr.Image(
        label="Difference",
        format="png",
        interactive=False,
        visible=False,
        height=460,
        buttons=["download", "fullscreen"],
        elem_id="difference",
    )
    shown = [row_of_pickers, grid, slider, flip, heat, note]
    it = Looking(studio, view, pickers, grid, shown)
    changes = [view.change, *(picker.change for picker in pickers)]
    gr.on(changes, it.show, it.controls, shown, trigger_mode="always_last", **LIGHT, **PRIVATE)
    grid.click(it.look_closer, None, it.controls, **LIGHT, **PRIVATE)
    return it
