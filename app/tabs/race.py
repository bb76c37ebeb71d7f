"""Race: how training went, for several runs on one axis of steps, with their samples on one time slider."""

import math

import gradio as gr

from .. import run_views, views
from ..runs import Run, read_run
from ..sessions import Session
from ..studio import LIGHT, PRIVATE, Studio

MAX_RUNS = 8
SMOOTHING = 0.95


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
    curves = gr.HTML(elem_id="race_curves", padding=False)
    merges = gr.HTML(elem_id="race_merges", padding=False)
    step = gr.Slider(0, 1, value=1, step=1, label="Samples at step", visible=False, elem_id="race_step")
    samples = gr.HTML(elem_id="race_samples", padding=False)

    def session_of(request: gr.Request) -> Session:
        return studio.sessions.of(request.session_hash)

    def read(labels: list[str]) -> tuple[list[Run], list[str]]:
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

    def offer(labels: list[str]) -> gr.Dropdown:
        known = list(studio.run_folders())
        kept = [label for label in labels if label in known]
        return gr.Dropdown(choices=known, value=kept or studio.first_race()[:MAX_RUNS])

    def show(labels: list[str], smoothing: float, request: gr.Request) -> list:
        """All of it, with the slider at the newest samples."""
        session = session_of(request)
        runs, broken = read(labels)
        session.race = runs
        steps = sorted({s for run in runs for s in run.samples})
        last = steps[-1] if steps else 0
        slider = gr.Slider(0, max(1, last), value=last, step=stride(steps), visible=len(steps) > 1)
        images = run_views.samples(runs, last, session.thumbnail)
        notes = views.message("\n".join(["Not every run can be shown:", *broken]), "warn") if broken else ""
        return [notes + run_views.curves(runs, smoothing), run_views.merges(runs), slider, images]

    def smooth(smoothing: float, request: gr.Request) -> str:
        return run_views.curves(session_of(request).race, smoothing)

    def travel(at: float, request: gr.Request) -> str:
        session = session_of(request)
        return run_views.samples(session.race, int(at), session.thumbnail)

    shown = [curves, merges, step, samples]
    tab.select(offer, chosen, chosen, **LIGHT, **PRIVATE)
    chosen.change(show, [chosen, keep], shown, trigger_mode="always_last", **LIGHT, **PRIVATE)
    again.click(offer, chosen, chosen, **LIGHT, **PRIVATE).then(show, [chosen, keep], shown, **LIGHT, **PRIVATE)
    keep.release(smooth, keep, curves, **LIGHT, **PRIVATE)
    step.input(travel, step, samples, trigger_mode="always_last", **LIGHT, **PRIVATE)


def stride(steps: list[int]) -> int:
    """The step of the slider, so that it stops at every step with samples."""
    return math.gcd(*steps) or 1
