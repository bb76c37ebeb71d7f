"""Curves of runs under one legend, with hover and zoom, and as files to take away."""

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from .. import charts, run_views
from ..runs import RunFolder
from ..sessions import Session
from ..studio import PRIVATE, Studio
from ..tabs import refusal
from .taking import saves

NAMES = ("loss", "validation_loss", "merge_gap")
WRITERS = {"svg": charts.curves_svg, "csv": charts.curves_csv}


@dataclass(frozen=True)
class Curves:
    """Controls of one set of curves; `name` is that of the tab."""

    name: str
    whole: gr.Column
    legend: gr.HTML
    plots: list[gr.Plot]

    @property
    def outputs(self) -> list:
        return [self.whole, self.legend, *self.plots]

    def drawn(self, session: Session, runs: Sequence[RunFolder], keep: float) -> list:
        """Values of `outputs`."""
        session.drawn[self.name] = (list(runs), keep)
        panels = {panel.name: panel for panel in charts.panels(runs, keep)}
        plots = [
            gr.Plot(charts.chart(panel), label=f"{panel.title} ({panel.note})", visible=True)
            if (panel := panels.get(name))
            else gr.Plot(None, visible=False)
            for name in NAMES
        ]
        return [gr.Column(visible=bool(panels)), run_views.legend(runs), *plots]


def curves(studio: Studio, name: str) -> Curves:
    """Draw the curves where the page stands now."""
    with gr.Column(visible=False, elem_classes="curves") as whole:
        legend = gr.HTML(elem_id=f"{name}_legend", padding=False)
        with gr.Row():
            plots = [gr.Plot(visible=False, min_width=255, elem_id=f"{name}_{panel}") for panel in NAMES]
        with gr.Row(elem_classes="tools"):
            for kind in WRITERS:
                button = gr.Button(f"Curves .{kind}", size="sm", min_width=100, elem_id=f"{name}_{kind}")
                saves(button, writer(studio, name, kind), [], **PRIVATE)
    return Curves(name, whole, legend, plots)


def writer(studio: Studio, name: str, kind: str):
    def write(request: gr.Request) -> str:
        session = studio.sessions.of(request.session_hash)
        if name not in session.drawn:
            raise refusal("There are no curves to take away yet.")
        path = session.folder / "out" / f"curves.{kind}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(WRITERS[kind](*session.drawn[name]), encoding="utf-8")
        return str(path)

    return write
