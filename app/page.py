"""`build_demo(studio)` -> the page. It holds no model and no arithmetic: the tabs join controls to the floors below."""

import gradio as gr

from . import views
from .studio import Studio
from .tabs.compare import compare_tab
from .tabs.files import files_tab
from .tabs.measures import measures_tab
from .tabs.race import race_tab
from .tabs.train import train_tab, train_watch
from .tabs.vote import vote_tab

IDLE_FILES_SECONDS = 24 * 3600


def build_demo(studio: Studio) -> gr.Blocks:
    with gr.Blocks(
        title="ResLoRA, side by side",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(IDLE_FILES_SECONDS, IDLE_FILES_SECONDS),
    ) as demo:
        gr.HTML(views.header(studio.bases.first if len(studio.bases.choices()) == 1 else ""), padding=False)
        watch = train_watch()
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                compare = compare_tab(studio, demo)
            with gr.Tab("Race", id="race") as tab:
                race_tab(studio, tab)
            with gr.Tab("Blind vote", id="vote") as tab:
                vote_tab(studio, tab, compare)
            with gr.Tab("Measures", id="measures") as tab:
                measures_tab(studio, tab, compare)
            with gr.Tab("Files", id="files") as tab:
                files_tab(studio, tab)
            with gr.Tab("Train", id="train") as tab:
                train_tab(studio, tab, compare.fields, compare.arrival, *watch)

        def leave(request: gr.Request) -> None:
            studio.sessions.close(request.session_hash)

        demo.unload(leave)
    return demo
