"""Measures: figures about the images of the Compare tab."""

import gradio as gr

from .. import learned, measure_views, views
from ..images import read_images
from ..measures import measure
from ..sessions import Session
from ..studio import HEAVY, Studio
from ..tabs import refusal
from ..tabs.compare import CompareTab
from .latest import Latest
from .subject import subject_images

MAX_REFERENCES = 32
FIRST = "Measure, and the figures stand here, with the images sorted by any of them."
STALE = "These figures were made with other fields than those on the left: measure again."
EXPLANATION = (
    "Subject likeness is 1 for the subject and 0 for a blob of its colour; background obeyed holds the ground's colour "
    "against the prompt's. Both are for figures on plain grounds, work offline and are no CLIP. Drift is the pixel "
    "difference from the base on prompts without the subject's word, diversity the difference between seeds of one "
    "prompt. Each is a mean, its 95 % interval for other seeds of these prompts, and n."
)


def measures_tab(studio: Studio, tab: gr.Tab, compare: CompareTab) -> None:
    latest = Latest(studio)
    gr.HTML(views.message(EXPLANATION), padding=False)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            labels, ids = (
                ("The subject looks like", "Reference images of the subject"),
                ("measure_subject", "references"),
            )
            subject = subject_images(studio, latest, labels, ids)
            word = gr.Textbox(label="Subject's word", value="sks", info="Prompts without it are the unrelated ones.")
            clips, dinos = learned.at_hand()
            with gr.Accordion("CLIP and DINO", open=bool(clips or dinos)):
                where = "A folder, or a name in the hub's local cache; nothing is downloaded."
                clip, dino = (
                    gr.Dropdown(
                        ["", *names], value=(names or [""])[0], label=label, info=where, allow_custom_value=True
                    )
                    for label, names in (("CLIP", clips), ("DINO", dinos))
                )
            run = gr.Button("Measure", variant="primary", elem_id="measure")
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(views.message(FIRST), elem_id="measures", min_height=64, padding=False)
            with gr.Row(visible=False, elem_id="sorting") as sorting:
                order = gr.Dropdown(label="Images sorted by", choices=[], min_width=180, elem_id="sheet_by")
                least = gr.Checkbox(False, label="The least first", min_width=120)
            sheet = gr.HTML(elem_id="contact_sheet", padding=False)

    def take(
        session: Session, chosen: str, paths: list[str] | None, subject_word: str, clip_name: str, dino_name: str
    ) -> list:
        asked, cells = session.request, list(session.cells)
        if not cells:
            raise refusal("Compare something first: the measures are of the images of the Compare tab.")
        try:
            images = read_images(subject.paths(chosen, paths), MAX_REFERENCES)
            values = measure(asked, cells, images, subject_word.strip())
            models = learned.load(clip_name or "", dino_name or "")
            values += learned.learned_measures(cells, images, subject_word.strip(), *models)
        except ValueError as problem:
            raise refusal(problem) from None
        with session.turn:
            if session.request is not asked or len(session.cells) != len(cells):
                raise refusal("Other images were chosen or generated while these were measured: measure again.")
            session.measured, session.measured_with = values, (chosen, paths, subject_word, clip_name, dino_name)
            if session.visit:
                session.visit.write_measures(values, asked)
        return [*shown(session, *session.measured_with), measure_views.verdict(studio.findings(session))]

    def shown(session: Session, *fields: object) -> list:
        """Figures of the images that are shown, none of images that are gone; the sheet of the first measure. They are
        marked where the fields are not those that they were made with."""
        names = [measure.name for measure in session.measured if measure.is_of_images]
        by = next(iter(names), None)
        table = measure_views.measures(session.request, session.measured) if session.measured else views.message(FIRST)
        if session.measured and session.measured_with not in (None, fields):
            table = views.message(STALE, "warn") + table
        return [table, gr.Row(visible=bool(names)), gr.Dropdown(choices=names, value=by), sorted_by(session, by, False)]

    def sorted_by(session: Session, by: str | None, least_first: bool) -> str:
        measure = next((m for m in session.measured if m.name == by), None)
        return measure_views.contact_sheet(session, measure, least_first) if measure else ""

    results = [result, sorting, order, sheet]
    asked = [*subject.controls, word, clip, dino]
    latest.on([run.click], take, asked, [*results, compare.verdict], trigger_mode="once", show_progress="full", **HEAVY)
    latest.on([order.input, least.input], sorted_by, [order, least], [sheet])
    asked_anew = [*subject.changes, word.change, clip.input, dino.input]
    latest.on([*asked_anew, tab.select], shown, asked, results)
    for event in compare.news:
        latest.after(event, shown, asked, results)
