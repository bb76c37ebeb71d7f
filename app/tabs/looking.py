"""The grid of images, whose cells open the viewer (static/viewer.js). What is looked at is stored."""

import gradio as gr

from ..saved import VIEWS, View
from ..studio import LIGHT, PRIVATE, Studio

ATTACH = "viewer.attach(element, trigger);"


def looking(studio: Studio) -> gr.HTML:
    """The grid, where the page stands now."""
    grid = gr.HTML(js_on_load=ATTACH, elem_id="grid", padding=False)

    def looked(event: gr.EventData, request: gr.Request) -> None:
        session = studio.sessions.of(request.session_hash)
        view = view_of(event)
        if session.request is None or view is None:
            return
        session.view = view
        if session.visit:
            session.visit.write_view(view)

    grid.click(looked, None, None, trigger_mode="multiple", **LIGHT, **PRIVATE)
    return grid


def view_of(event: gr.EventData) -> View | None:
    """What the browser says is looked at; None where it says nothing that can be."""
    said = {name: getattr(event, name, None) for name in View.__dataclass_fields__}
    numbers = [said[name] for name in ("row", "left", "right")]
    sound = said["name"] in VIEWS and all(type(number) is int and number >= 0 for number in numbers)
    return View(**said) if sound else None
