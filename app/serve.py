"""From folders to a page that answers."""

from pathlib import Path

import gradio as gr

from .compare import Comparer, load_pipeline
from .page import build_demo
from .sessions import Sessions
from .studio import Studio, adapters_in
from .style import CSS, HEAD, THEME

MAX_UPLOAD = "2gb"
QUEUE_SIZE = 32


def open_studio(
    base: Path, runs: tuple[Path, ...], folder: Path, prompt: str, device: str = "cpu", first_steps: int = 25
) -> Studio:
    """Load the pipeline, find the adapters of the runs, and paint what visitors see first. `folder` is for pictures."""
    comparer = Comparer(load_pipeline(base, device))
    comparer.warm_up()
    studio = Studio(comparer, Sessions(folder, adapters_in(runs, comparer.shelf)), base.name, runs)
    studio.paint_first(prompt, first_steps)
    return studio


def launch(studio: Studio, **options) -> gr.Blocks:
    """Serve the page; from the disk, nothing but the visitors' own pictures."""
    studio.sessions.root.mkdir(parents=True, exist_ok=True)
    demo = build_demo(studio)
    demo.queue(max_size=QUEUE_SIZE, default_concurrency_limit=4)
    demo.launch(
        theme=THEME,
        css=CSS,
        head=HEAD,
        allowed_paths=[str(studio.sessions.root)],
        max_file_size=MAX_UPLOAD,
        footer_links=["api"],
        ssr_mode=False,
        strict_cors=True,
        show_error=True,
        **options,
    )
    return demo
