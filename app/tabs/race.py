"""Race: how training went, for several runs on one axis of steps, with their samples on one time slider."""

import math

import gradio as gr

from .. import run_views, views
from ..runs import RunFolder, read_run
from ..sessions import Session
from ..studio import Studio
from .curves import curves
from .latest import Latest

MAX_RUNS = 8
SMOOTHING = 0.95
CHOOSE = "Choose the runs to be shown."


def race_tab(studio: Studio, tab: gr.Tab) -> None:
    with gr.Row(equal_height=False):
        chosen = gr.Dropdown(
            label="Runs",
            info="Training runs below the folders that the page was started with.",
            choices=[],
            multiselect=True,
            max_choices=MAX_RUNS,
            scale=5,
            min_width=260,
            elem_id="race_runs",
        )
        keep = gr.Slider(
            0, 0.99, value=SMOOTHING, step=0.01, label="Smoothing", scale=2, min_width=200, elem_id="race_keep"
        )
        again = gr.Button("Read again", size="sm", scale=1, min_width=110, elem_id="race_again", elem_classes="beside")
    notes = gr.HTML(elem_id="race_notes", padding=False)
    drawing = curves(studio, "race")
    merges = gr.HTML(elem_id="race_merges", padding=False)
    step = gr.Slider(0, 1, value=1, step=1, label="Samples at step", visible=False, elem_id="race_step")
    samples = gr.HTML(elem_id="race_samples", padding=False)

    def read(labels: list[str]) -> tuple[list[RunFolder], list[str]]:
        """The runs, and what keeps others of them from being shown."""
        folders = studio.run_folders()
        runs, broken = [], [f"There is no run {label} any more." for label in labels if label not in folders]
        for label in labels:
            if label in folders:
                try:
                    runs.append(read_run(label, folders[label]))
                except (ValueError, OSError) as problem:
                    broken.append(f"{label} is left out: {problem}")
        return runs, broken

    def offer(session: Session, labels: list[str]) -> gr.Dropdown:
        known = list(studio.run_folders())
        kept = [label for label in labels if label in known]
        changed = {} if kept and kept == labels else {"value": kept or studio.first_race()[:MAX_RUNS]}
        return gr.Dropdown(choices=known, **changed)

    def show(session: Session, labels: list[str], smoothing: float) -> list:
        """All of it, with the slider at the newest samples."""
        runs, broken = read(labels)
        steps = sorted({s for run in runs for s in run.samples})
        last = steps[-1] if steps else 0
        slider = gr.Slider(0, max(1, last), value=last, step=stride(steps), visible=len(steps) > 1)
        images = run_views.samples(runs, last, session.thumbnail)
        said = views.message("\n".join(["Not every run can be shown:", *broken]), "warn") if broken else ""
        said += "" if runs or broken else views.message(CHOOSE) if studio.run_folders() else run_views.NOTHING
        return [said, *drawing.drawn(session, runs, smoothing), run_views.merges(runs), slider, images]

    def smooth(session: Session, labels: list[str], smoothing: float) -> list:
        return drawing.drawn(session, read(labels)[0], smoothing)

    def travel(session: Session, labels: list[str], at: float) -> str:
        return run_views.samples(read(labels)[0], int(at), session.thumbnail)

    latest = Latest(studio)
    shown = [notes, *drawing.outputs, merges, step, samples]
    latest.on([tab.select], offer, [chosen], [chosen])
    latest.on([chosen.change], show, [chosen, keep], shown)
    latest.after(latest.on([again.click], offer, [chosen], [chosen]), show, [chosen, keep], shown)
    latest.on([keep.release], smooth, [chosen, keep], drawing.outputs)
    latest.on([step.input], travel, [chosen, step], [samples], trigger_mode="always_last")


def stride(steps: list[int]) -> int:
    """The step of the slider, so that it stops at every step with samples."""
    return math.gcd(*steps) or 1
