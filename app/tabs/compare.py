"""Compare: what to generate on the left, the images on the right, as a grid or pair by pair."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from .. import views
from ..forms import NOTHING_SWEPT, SWEEP, fields_of, fields_of_settings, read_request
from ..request import Axis, CompareRequest, Scheduler, Setting
from ..saved import View
from ..sessions import Session
from ..studio import HEAVY, LIGHT, PRIVATE, Studio
from ..tabs import refusal
from ..tabs.looking import looking
from ..tabs.taking import opened, said, takeaway

SECONDS_BETWEEN_LOOKS = 0.25
NO_ADAPTER = "This is the base alone. Add an adapter's file, train one here, or run make demo and start the page anew."
# On a narrow screen the images stand above the button.
SHOW_STATUS = """() => {
  if (window.innerWidth < 700) document.getElementById('status').scrollIntoView();
}"""
# A tab of the browser has its own work, which a reload finds again. Private windows may have no storage.
KEY_OF_TAB = """() => {
  const fresh = [...crypto.getRandomValues(new Uint8Array(16))].map((v) => v.toString(16).padStart(2, '0')).join('');
  try {
    const key = sessionStorage.getItem('reslora-visit') || fresh;
    sessionStorage.setItem('reslora-visit', key);
    return [key];
  } catch { return [fresh]; }
}"""
AFRESH = """() => {
  try { sessionStorage.removeItem('reslora-visit'); } catch {}
  location.reload();
}"""
# The last input of an event that looks at the fields: when it did.
WITH_TIME = "(...values) => [...values.slice(0, -1), performance.now()]"


@dataclass(frozen=True)
class CompareTab:
    """What the other tabs need of this one."""

    adapters: gr.CheckboxGroup  # a training adds to it
    arrival: Dependency  # the event that fills it when somebody comes
    news: list[Dependency]  # the events after which other images are shown
    verdict: gr.HTML  # votes and measures fill it


def compare_tab(studio: Studio, demo: gr.Blocks) -> CompareTab:
    comparer, limits = studio.comparer, studio.comparer.limits
    # Gradio writes a value that comes for a folded field when it is unfolded, over what may have been typed by then:
    # these fields are filled when the page is built, not when somebody comes.
    first = studio.first_request

    with gr.Row(equal_height=False, elem_classes="tab-body"):
        with gr.Column(scale=4, min_width=300, elem_classes="controls"):
            prompts = gr.Textbox(label="Prompts", info="One to a line.", lines=2, max_lines=12, elem_id="prompts")
            with gr.Row():
                seeds = gr.Textbox(label="Seeds", info="0-3, 7", min_width=110, elem_id="seeds")
                strengths = gr.Textbox(
                    label="Strengths", info=f"0 to {limits.strength:g}", min_width=110, elem_id="strengths"
                )
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
                more = gr.Dropdown(
                    label="Add from runs",
                    info="Adapters of runs and their checkpoints.",
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
                guidance = gr.Slider(
                    0, limits.guidance, first.guidance_scale, step=0.1, label="Guidance", elem_id="guidance"
                )
                scheduler = gr.Dropdown(
                    list(Scheduler), value=str(first.scheduler), label="Scheduler", elem_id="scheduler"
                )
            expected = gr.HTML(elem_id="expected", padding=False)
            looked_at = gr.Number(0, visible=False)
            key = gr.Textbox("", visible=False)
            with gr.Row(elem_classes="tools"):
                run = gr.Button("Compare", variant="primary", elem_id="run", min_width=120)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
            with gr.Row(elem_classes="tools"):
                saved_files = gr.UploadButton(
                    "Open a comparison (.zip or .json)", file_count="multiple", size="sm", elem_id="saved_files"
                )
                afresh = gr.Button("Start afresh", size="sm", min_width=100, elem_id="afresh")
        with gr.Column(scale=9, min_width=320, elem_classes="results"):
            status = gr.HTML(elem_id="status", min_height=48, padding=False)
            again = gr.Button("Generate again", variant="primary", size="sm", visible=False, elem_id="again")
            look = looking(studio)
            takeaway(studio)
            verdict = gr.HTML(elem_id="verdict", padding=False)

    fields = [prompts, placeholders, seeds, adapters, strengths, include_base, negative, steps, guidance, scheduler]
    fields += [columns_axis, columns_values, rows_axis, rows_values, strengths_first]
    unfolded = [prompts, seeds, adapters, strengths, include_base]
    results = [status, look.grid]

    def session_of(request: gr.Request) -> Session:
        return studio.sessions.of(request.session_hash)

    def read(session: Session, values: tuple) -> CompareRequest:
        return read_request(*values, adapters=session.adapters, limits=limits)

    def filled(session: Session, asked: CompareRequest) -> list:
        """The fields of a request, with the adapters that this visitor has."""
        values = list(fields_of(asked))
        here = [label for label in values[3] if label in session.adapters]
        values[3] = gr.CheckboxGroup(choices=list(session.adapters), value=here)
        return values

    def expect(request: gr.Request, *values) -> str | dict:
        """Several of these run at once, and may end in another order than they began: the latest look counts."""
        *values, when = values
        session = session_of(request)
        session.looked_at = max(session.looked_at, when)
        said = expectation(session, values)
        if when < session.looked_at:
            return gr.skip()
        if session.visit and session.arrived:
            session.visit.write_fields(values)
        return said

    def expectation(session: Session, values: list) -> str:
        try:
            asked = read(session, values)
        except ValueError as problem:
            return views.message(str(problem), "warn")
        count, seconds = comparer.estimate(asked)
        long = comparer.prompt_warnings(asked)
        text = f"{count} image{'s' * (count != 1)}, about {views.duration(seconds)}"
        return views.message("\n".join([text, *long]), "warn" if long else "note")

    def ask(request: gr.Request) -> list:
        session_of(request).ask()
        return ["Grid", gr.Button(visible=False)]

    def generate(
        prompts: str,
        placeholders: str,
        seeds: str,
        adapters: list[str],
        strengths: str,
        include_base: bool,
        negative_prompt: str,
        num_inference_steps: float,
        guidance_scale: float,
        scheduler: str,
        columns_axis: str,
        columns_values: str,
        rows_axis: str,
        rows_values: str,
        strengths_first: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        """The parameters' names are those of the API."""
        session, sampling = session_of(request), (num_inference_steps, guidance_scale, scheduler)
        axes = (columns_axis, columns_values, rows_axis, rows_values, strengths_first)
        values = (prompts, placeholders, seeds, adapters, strengths, include_base, negative_prompt, *sampling, *axes)
        try:
            asked = read(session, values)
        except ValueError as problem:
            raise refusal(problem) from None
        count, seconds = comparer.estimate(asked)
        cancel = session.begin(asked)
        if session.visit:
            session.visit.show(asked, [], studio.base_name, View.of(asked))

        told, shown = Pace(), Pace()

        def on_step(cell: int, step: int) -> None:
            if told.is_due():
                progress((cell, count), desc=f"image {cell + 1} of {count}, step {step}", unit="images")

        yield views.message(f"Generating {count} images, about {views.duration(seconds)}."), views.grid(session)
        try:
            for cell in comparer.compare(asked, cancel, on_step):
                if session.cancel is not cancel:
                    return  # the visitor looks at another comparison by now
                session.add(cell)
                if session.visit:
                    session.visit.add(asked, session.cells, studio.base_name, View.of(asked))
                if shown.is_due():
                    yield views.message(f"{len(session.cells)} of {count} images."), views.grid(session)
        except (ValueError, RuntimeError) as problem:  # of a file, or of the machine, such as its memory
            done = f"Ended by an error after {len(session.cells)} of {count} images, which stay."
            yield views.message(done, "bad"), views.grid(session)
            raise refusal(problem) from None
        if session.cancel is cancel:
            yield finished(session, count), views.grid(session)

    def add_files(paths: list[str] | None, chosen: list[str], request: gr.Request) -> gr.CheckboxGroup:
        return added({Path(path).name: Path(path) for path in paths or []}, True, chosen, session_of(request))

    def add_of_runs(label: str | None, chosen: list[str], request: gr.Request) -> list:
        files = studio.adapter_files()
        if label is None:
            return [gr.skip()] * 2
        if label not in files:
            raise refusal(f"There is no adapter {label} any more.")
        return [added({label: files[label]}, False, chosen, session_of(request)), None]

    def added(paths: dict[str, Path], uploaded: bool, chosen: list[str], session: Session) -> gr.CheckboxGroup:
        """The files that fit join the adapters; the others are named with the reason. Uploads go by their own names."""
        problems = []
        for name, path in paths.items():
            try:
                card = comparer.shelf.card(path, path.stem if uploaded else name)
            except ValueError as problem:
                problems.append(str(problem).replace(str(path), name))
                continue
            if card.fits:
                own = session.add_adapter(card.adapter)
                if session.visit and uploaded:
                    session.add_adapter(session.visit.keep(own))
                chosen = [*chosen, own.label]
            else:
                problems.append("\n".join([f"{name} does not fit the loaded base:", *card.mismatches]))
        if problems:
            gr.Warning(views.plain("\n".join(problems)), duration=None, title="Not added")
        return gr.CheckboxGroup(choices=list(session.adapters), value=list(dict.fromkeys(chosen)))

    def open_files(paths: list[str] | None, request: gr.Request) -> list:
        session = session_of(request)
        try:
            asked, base = opened(studio, session, [Path(path) for path in paths or []])
        except ValueError as problem:
            raise refusal(problem, "This cannot be opened") from None
        if session.visit:
            session.visit.show(asked, session.cells, studio.base_name, session.view)
        return [
            *filled(session, asked),
            said(session, base, studio.base_name),
            views.grid(session),
            gr.Button(visible=True),
            *look.values(session, session.view),
        ]

    def arrive(key: str, request: gr.Request) -> list:
        """What this tab of the browser had before a reload, or else what everybody sees first."""
        session, asked = session_of(request), studio.first_request
        session.visit = studio.visits.of(key)
        session.show(asked, studio.first_cells)
        restored = restore(session)
        count = len(session.request.rows) * len(session.request.columns)
        done = finished(session, count) if session.adapters else views.message(NO_ADAPTER)
        of_runs = gr.Dropdown(choices=list(studio.adapter_files()), value=None)
        values = filled(session, session.request)
        if typed := session.visit.fields() if session.visit else None:
            here = [label for label in typed[3] if label in session.adapters]
            values = [*typed[:3], gr.CheckboxGroup(choices=list(session.adapters), value=here), *typed[4:]]
        elif not restored:  # gradio would write them over what is typed into folded fields meanwhile
            values = [value if f in unfolded else gr.skip() for f, value in zip(fields, values, strict=True)]
        session.arrived = True
        return [*values, of_runs, done, views.grid(session), *look.values(session, View.of(session.request))]

    def restore(session: Session) -> bool:
        """Adapters, comparison and round of the visit, as far as they can be read."""
        visit = session.visit
        for adapter in visit.adapters() if visit else ():
            session.add_adapter(adapter)
        if not visit or not (files := visit.comparison()):
            return False
        try:
            opened(studio, session, files)
        except ValueError:
            return False
        session.resume = None
        session.ballot = visit.ballot(session.request, session.cells)
        return True

    def judge(request: gr.Request) -> str:
        return views.verdict(studio.findings(session_of(request)))

    def halt(request: gr.Request) -> None:
        session_of(request).cancel.set()

    seen = {"fn": expect, "inputs": [*fields, looked_at], "outputs": expected, "js": WITH_TIME, **LIGHT, **PRIVATE}
    gr.on([f.change for f in fields], trigger_mode="always_last", **seen)
    # Gradio may forget the last of several quick changes; a field that is left is looked at once more.
    texts = [field for field in fields if isinstance(field, gr.Textbox)]
    gr.on([text.blur for text in texts], trigger_mode="multiple", **seen)
    sweep.click(lambda: SWEEP, None, strengths, **LIGHT, **PRIVATE)
    started = gr.on(
        [run.click, again.click],
        ask,
        None,
        [look.view, again],
        **LIGHT,
        **PRIVATE,
    )
    generating = started.then(
        generate,
        fields,
        results,
        api_name="compare",
        show_progress="full",
        show_progress_on=[status],
        **HEAVY,
    )
    look.follow(generating)
    gr.on([run.click, again.click], None, js=SHOW_STATUS, **PRIVATE)
    stop.click(halt, None, None, **LIGHT, **PRIVATE)
    files.upload(add_files, [files, adapters], adapters, **LIGHT, **PRIVATE)
    more.input(add_of_runs, [more, adapters], [adapters, more], **LIGHT, **PRIVATE)
    opening = saved_files.upload(
        open_files, saved_files, [*fields, *results, again, *look.controls], **LIGHT, **PRIVATE
    )
    look.refresh(opening)
    arrival = demo.load(arrive, key, [*fields, more, *results, *look.controls], js=KEY_OF_TAB, **LIGHT, **PRIVATE)
    afresh.click(None, None, None, js=AFRESH, **PRIVATE)
    for event in (generating, opening):
        event.then(judge, None, verdict, **LIGHT, **PRIVATE)
    return CompareTab(adapters, arrival, [generating, opening], verdict)


def sweep_fields(side: str, settings: tuple[Setting, ...]) -> tuple[gr.Dropdown, gr.Textbox]:
    """What rows or columns go through, beside what they always do."""
    axis, values = fields_of_settings(settings)
    name = side.lower()
    with gr.Row():
        return (
            gr.Dropdown(
                [NOTHING_SWEPT, *map(str, Axis)],
                value=axis,
                label=f"{side} go through",
                min_width=120,
                elem_id=f"{name}_axis",
            ),
            gr.Textbox(value=values, label="Values", placeholder="10, 25, 50", min_width=120, elem_id=f"{name}_values"),
        )


class Pace:
    """Lets a thing be done again when some time has passed: small images are generated faster than a page is drawn."""

    def __init__(self, seconds: float = SECONDS_BETWEEN_LOOKS):
        self.seconds, self.last = seconds, -math.inf

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


def finished(session: Session, count: int) -> str:
    generated = len(session.cells)
    if generated < count:
        return views.message(f"Stopped: {generated} of {count} images were generated, and stay.", "warn")
    seconds = sum(cell.seconds for cell in session.cells)
    return views.message(f"{count} images in {views.duration(seconds)}.", "good")
