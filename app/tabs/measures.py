"""Measures: figures about the images of the Compare tab."""

import gradio as gr

from .. import learned, views
from ..images import images_in, read_images
from ..measures import measure
from ..studio import HEAVY, LIGHT, PRIVATE, Studio
from ..tabs import refusal
from ..tabs.compare import CompareTab

MAX_REFERENCES = 32
OWN = "images of my own"
EXPLANATION = (
    "Subject likeness is 1 for the subject and 0 for a blob of its colour; background obeyed holds the ground's colour "
    "against the prompt's. Both are for figures on plain grounds, work offline and are no CLIP. Drift is the pixel "
    "difference from the base on prompts without the subject's word, diversity the difference between seeds of one "
    "prompt. Each is a mean, its 95 % interval for other seeds of these prompts, and n."
)


def measures_tab(studio: Studio, tab: gr.Tab, compare: CompareTab) -> None:
    gr.HTML(views.message(EXPLANATION), padding=False)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            subject = gr.Dropdown(
                label="The subject looks like",
                choices=[OWN, *studio.subjects],
                value=studio.first_subject or OWN,
                elem_id="measure_subject",
                visible=bool(studio.subjects),
            )
            references = gr.File(
                label="Reference images of the subject",
                file_count="multiple",
                file_types=["image"],
                height=150,
                visible=studio.first_subject is None,
                elem_id="references",
            )
            word = gr.Textbox(label="Subject's word", value="sks", info="Prompts without it are the unrelated ones.")
            with gr.Accordion("CLIP and DINO, if you have them", open=False):
                clip = gr.Textbox(
                    label="CLIP", value="", info="Folder or hub name in the local cache; nothing is downloaded."
                )
                dino = gr.Textbox(label="DINO", value="", info="Such as facebook/dino-vits16.")
            run = gr.Button("Measure", variant="primary", elem_id="measure")
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(elem_id="measures", min_height=64, padding=False)

    def take(
        chosen: str, paths: list[str] | None, subject_word: str, clip_name: str, dino_name: str, request: gr.Request
    ) -> tuple[str, str]:
        session = studio.sessions.of(request.session_hash)
        cells = list(session.cells)
        if not cells:
            raise refusal("Compare something first: the measures are of the images of the Compare tab.")
        try:
            files = images_in(studio.subjects[chosen]) if chosen in studio.subjects else paths or []
            images = read_images(files, MAX_REFERENCES)
            values = measure(session.request, cells, images, subject_word.strip())
            models = learned.load(clip_name, dino_name)
            values += learned.learned_measures(cells, images, subject_word.strip(), *models)
        except ValueError as problem:
            raise refusal(problem) from None
        session.measured = values
        if session.visit:
            session.visit.write_measures(values, session.request)
        return views.measures(session.request, values), views.verdict(studio.findings(session))

    def figures(request: gr.Request) -> str:
        """Those of the images that are shown; none of images that are gone."""
        session = studio.sessions.of(request.session_hash)
        return views.measures(session.request, session.measured) if session.measured else ""

    run.click(take, [subject, references, word, clip, dino], [result, compare.verdict], **HEAVY, **PRIVATE)
    subject.input(lambda chosen: gr.File(visible=chosen == OWN), subject, references, **LIGHT, **PRIVATE)
    asked_anew = [subject.input, references.upload, references.clear, word.input, clip.input, dino.input]
    gr.on(asked_anew, lambda: "", None, result, **LIGHT, **PRIVATE)
    tab.select(figures, None, result, **LIGHT, **PRIVATE)
    for event in compare.news:
        event.then(figures, None, result, **LIGHT, **PRIVATE)
