"""Files: what each adapter says about itself, and whether it fits the loaded base."""

from pathlib import Path

import gradio as gr

from .. import views
from ..sessions import Session
from ..studio import Studio
from .latest import Latest

NONE = "No adapter is here yet: look at a file, train one, or start the page with --runs and the folder of your runs."


def files_tab(studio: Studio, tab: gr.Tab) -> None:
    with gr.Row():
        chosen = gr.Dropdown(label="Adapter", choices=[], scale=3, min_width=200, elem_id="card_adapter")
        other = gr.UploadButton(
            "Look at a file (.safetensors)", size="sm", scale=1, elem_id="card_file", elem_classes="beside"
        )
    card = gr.HTML(views.message(NONE), elem_id="card", padding=False)

    def card_of(session: Session, path: Path, label: str) -> str:
        session.file = path, label
        try:
            return views.file_card(studio.comparer_of(session).shelf.card(path, label))
        except ValueError as problem:
            return views.message(str(problem).replace(str(path), path.name), "bad")

    def come(session: Session, label: str | None) -> list:
        """The adapters of now, and the card that was there before, which may be of an uploaded file, for the base of
        now."""
        labels = list(session.adapters)
        if label not in labels:
            label = labels[0] if labels else None
        shown = card_of(session, *session.file) if session.file else show(session, label)[1]
        return [gr.Dropdown(choices=labels, value=label), shown]

    def show(session: Session, label: str | None) -> list:
        if label not in session.adapters:
            return [label, views.message(NONE)]
        return [label, card_of(session, Path(session.adapters[label].path), label)]

    def upload(session: Session, path: str) -> str:
        return card_of(session, Path(path), Path(path).stem)

    latest = Latest(studio)
    latest.on([tab.select], come, [chosen], [chosen, card])
    latest.on([chosen.input], show, [chosen], [chosen, card])
    latest.on([other.upload], upload, [other], [card])
