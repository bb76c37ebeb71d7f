"""Files: what each adapter says about itself, and whether it fits the loaded base."""

from pathlib import Path

import gradio as gr

from .. import views
from ..studio import LIGHT, PRIVATE, Studio

NONE = "No adapter is here yet: look at a file, train one, or start the page with --runs and the folder of your runs."


def files_tab(studio: Studio, tab: gr.Tab) -> None:
    with gr.Row():
        chosen = gr.Dropdown(label="Adapter", choices=[], scale=3, min_width=200, elem_id="card_adapter")
        other = gr.UploadButton(
            "Look at a file (.safetensors)", size="sm", scale=1, elem_id="card_file", elem_classes="beside"
        )
    card = gr.HTML(views.message(NONE), elem_id="card", padding=False)

    def choices(request: gr.Request) -> gr.Dropdown:
        labels = list(studio.sessions.of(request.session_hash).adapters)
        return gr.Dropdown(choices=labels, value=labels[0] if labels else None)

    def look(path: Path, label: str | None, request: gr.Request) -> str:
        session = studio.sessions.of(request.session_hash)
        try:
            return views.file_card(studio.comparer_of(session).shelf.card(path, label))
        except ValueError as problem:
            return views.message(str(problem).replace(str(path), path.name), "bad")

    def show(label: str | None, request: gr.Request) -> str:
        adapters = studio.sessions.of(request.session_hash).adapters
        return look(Path(adapters[label].path), label, request) if label in adapters else views.message(NONE)

    def upload(path: str, request: gr.Request) -> str:
        return look(Path(path), Path(path).stem, request)

    tab.select(choices, None, chosen, **LIGHT, **PRIVATE)
    chosen.change(show, chosen, card, **LIGHT, **PRIVATE)
    other.upload(upload, other, card, **LIGHT, **PRIVATE)
