"""Measures: figures about the pictures of the Compare tab."""

from pathlib import Path

import gradio as gr
from PIL import Image, UnidentifiedImageError

from app import learned, views
from app.measures import measure
from app.studio import HEAVY, LIGHT, PRIVATE, Studio

MAX_REFERENCES = 32
MAX_SIDE = 1024
EXPLANATION = (
    "Subject likeness compares cut-out figures with your reference pictures, and background obeyed the border's colour "
    "with the prompt's: small measures for stickers that work offline and are no CLIP. Drift is the pixel difference "
    "from the base on prompts without the subject's word, diversity the difference between seeds of one prompt. Each "
    "is a mean, its 95 % bootstrap interval, and n."
)


def measures_tab(studio: Studio) -> None:
    gr.HTML(views.message(EXPLANATION))
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            references = gr.File(
                label="Reference pictures of the subject", file_count="multiple", height=160, elem_id="references"
            )
            word = gr.Textbox(label="Subject's word", value="sks", info="Prompts without it are the unrelated ones.")
            with gr.Accordion("CLIP and DINO, if you have them", open=False):
                clip = gr.Textbox(
                    label="CLIP", value="", info="Folder or hub name in the local cache; nothing is downloaded."
                )
                dino = gr.Textbox(label="DINO", value="", info="Such as facebook/dino-vits16.")
            run = gr.Button("Measure", variant="primary", elem_id="measure")
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(elem_id="measures", min_height=64)

    def take(paths: list[str] | None, subject_word: str, clip_name: str, dino_name: str, request: gr.Request) -> str:
        session = studio.sessions.of(request.session_hash)
        if not session.cells:
            raise gr.Error("Compare something first: the measures are of the pictures of the Compare tab.")
        try:
            pictures = read_pictures(paths or [])
            values = measure(session.request, session.cells, pictures, subject_word.strip())
            models = learned.load(clip_name, dino_name)
            values |= learned.learned_measures(session.request, session.cells, pictures, *models)
        except ValueError as problem:
            raise gr.Error(views.plain(problem), duration=None) from None
        return views.measures(session.request, values)

    run.click(take, [references, word, clip, dino], result, **HEAVY, **PRIVATE)
    references.clear(lambda: "", None, result, **LIGHT, **PRIVATE)


def read_pictures(paths: list[str]) -> list[Image.Image]:
    """Pictures as people upload them, at most `MAX_SIDE` wide.

    Raises:
        ValueError: there are too many, or some are no pictures.
    """
    if len(paths) > MAX_REFERENCES:
        raise ValueError(f"{len(paths)} reference pictures; at most {MAX_REFERENCES} are read")
    pictures, broken = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            broken.append(Path(path).name)
            continue
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        pictures.append(picture)
    if broken:
        raise ValueError(f"no pictures: {', '.join(broken)}")
    return pictures
