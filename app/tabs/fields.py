"""The fields of the Compare tab, in the order of `forms.read_request`, and the requests they stand for."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr
from gradio.events import Dependency

from ..forms import NOTHING_SWEPT, fields_of, fields_of_settings, read_request
from ..request import Axis, CompareRequest, Scheduler, Setting
from ..sessions import Session
from ..studio import PRIVATE, Studio

# Each that has joined is ticked once: of two answers that come in one moment, only the later list may be shown.
TICK = """(chosen, joined) => {
  const done = window.ticked ??= new Set();
  const fresh = (joined || []).filter(([mark]) => !done.has(mark));
  for (const [mark] of fresh) done.add(mark);
  return fresh.length ? [[...new Set([...(chosen || []), ...fresh.map(([, name]) => name)])]] : [{__type__: 'update'}];
}"""


@dataclass(frozen=True)
class Fields:
    """The controls of a request."""

    studio: Studio
    controls: list
    adapters: gr.CheckboxGroup
    strengths: gr.Textbox
    unfolded: list  # gradio writes a value that comes for a folded field over what is typed into it meanwhile
    sweep: gr.Button
    files: gr.UploadButton
    of_runs: gr.Dropdown
    joined: gr.JSON  # `Session.brought`

    def brought(self, session: Session, labels: list[str]) -> list:
        """Values of `adapters` and `joined`."""
        if labels:
            self.store_choice(session, lambda chosen: list(dict.fromkeys([*chosen, *labels])))
        session.brought += [(secrets.token_hex(8), label) for label in labels]
        return [gr.CheckboxGroup(choices=list(session.adapters)), session.brought]

    def store_choice(self, session: Session, change: Callable[[list[str]], list[str]]) -> None:
        """A visit finds the adapters of this change chosen, even if it is left at once."""
        with session.keeping:
            if session.visit and (typed := session.visit.fields()):
                place = self.controls.index(self.adapters)
                typed[place] = change(typed[place])
                session.visit.write_fields(typed)

    def tick_after(self, event: Dependency) -> None:
        """Choose the adapters that an event brought, beside those that are chosen when it has ended."""
        event.then(None, [self.adapters, self.joined], self.adapters, js=TICK, trigger_mode="multiple", **PRIVATE)

    def read(self, session: Session, values: tuple | list) -> CompareRequest:
        """
        Raises:
            ValueError: everything that is wrong with what was typed.
        """
        return read_request(*values, adapters=session.adapters, limits=self.studio.comparer.limits)

    def filled(self, session: Session, asked: CompareRequest) -> list:
        """Values of a request, with the adapters that this visitor has."""
        return self.typed(session, list(fields_of(asked)))

    def typed(self, session: Session, values: list) -> list:
        """Values as they were typed, with the adapters that this visitor has."""
        place = self.controls.index(self.adapters)
        return [*values[:place], self.choices(session, values[place]), *values[place + 1 :]]

    @staticmethod
    def choices(session: Session, chosen: list[str]) -> gr.CheckboxGroup:
        here = [label for label in session.adapters if label in chosen]
        return gr.CheckboxGroup(choices=list(session.adapters), value=here)


def compare_fields(studio: Studio) -> Fields:
    """The fields, where the page stands now, filled with the first request: see `Fields.unfolded`."""
    limits, first = studio.comparer.limits, studio.first_request
    prompts = gr.Textbox(label="Prompts", info="One to a line.", lines=2, max_lines=12, elem_id="prompts")
    with gr.Row():
        seeds = gr.Textbox(label="Seeds", info="0-3, 7", min_width=110, elem_id="seeds")
        strengths = gr.Textbox(label="Strengths", info=f"0 to {limits.strength:g}", min_width=110, elem_id="strengths")
    adapters = gr.CheckboxGroup(
        label="Adapters",
        info="Each gets a column for every strength.",
        choices=[adapter.label for adapter in studio.sessions.adapters],
        elem_id="adapters",
    )
    include_base = gr.Checkbox(label="Base column, without an adapter", value=True, elem_id="base_column")
    with gr.Row(elem_classes="tools"):
        files = gr.UploadButton(
            "Add files (.safetensors)", file_count="multiple", size="sm", min_width=120, elem_id="adapter_files"
        )
        sweep = gr.Button("Sweep 0 to 1.5", size="sm", min_width=110, elem_id="sweep")
    with gr.Accordion("Prompt matrix, adapters of runs", open=False):
        of_runs = gr.Dropdown(
            label="Add from runs",
            info="Adapters of runs and their checkpoints, one by one or all of a run.",
            choices=[],
            value=None,
            elem_id="adapters_of_runs",
        )
        placeholders = gr.Textbox(
            label="Placeholders",
            info="A line subject = panda, cactus fills {subject} in the prompts with both.",
            lines=1,
            max_lines=8,
            elem_id="placeholders",
            value="",  # the first request has none
        )
    with gr.Accordion("More axes", open=False):
        columns_axis, columns_values = sweep_fields("Columns", first.columns_by)
        rows_axis, rows_values = sweep_fields("Rows", first.rows_by)
        strengths_first = gr.Checkbox(
            label="Group columns by strength",
            info="Adapters of one strength stand side by side.",
            value=first.strengths_first,
            elem_id="strengths_first",
        )
    with gr.Accordion("Sampling", open=False):
        negative = gr.Textbox(label="Negative prompt", lines=1, value=first.negative_prompt, elem_id="negative")
        steps = gr.Slider(1, limits.steps, first.num_inference_steps, step=1, label="Steps", elem_id="steps")
        guidance = gr.Slider(0, limits.guidance, first.guidance_scale, step=0.1, label="Guidance", elem_id="guidance")
        scheduler = gr.Dropdown(list(Scheduler), value=str(first.scheduler), label="Scheduler", elem_id="scheduler")
    joined = gr.JSON([], visible=False)
    controls = [prompts, placeholders, seeds, adapters, strengths, include_base, negative, steps, guidance, scheduler]
    controls += [columns_axis, columns_values, rows_axis, rows_values, strengths_first]
    unfolded = [prompts, seeds, adapters, strengths, include_base]
    return Fields(studio, controls, adapters, strengths, unfolded, sweep, files, of_runs, joined)


def sweep_fields(side: str, settings: tuple[Setting, ...]) -> tuple[gr.Dropdown, gr.Textbox]:
    """Offer what rows or columns go through, beside what they always do."""
    axis, values = fields_of_settings(settings)
    name = side.lower()
    with gr.Row():
        choices = [NOTHING_SWEPT, *map(str, Axis)]
        return (
            gr.Dropdown(choices, value=axis, label=f"{side} go through", min_width=120, elem_id=f"{name}_axis"),
            gr.Textbox(value=values, label="Values", placeholder="10, 25, 50", min_width=120, elem_id=f"{name}_values"),
        )
