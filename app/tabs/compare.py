"""Compare: what to generate on the left, the images on the right; the comparisons before are a line below."""

from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from .. import views
from ..forms import SWEEP
from ..saved import View
from ..sessions import Session
from ..studio import HEAVY, LIGHT, PRIVATE, Studio
from ..tabs import refusal
from .choosing import add_files, add_of_runs, manage_adapters, runs_offered
from .fields import compare_fields
from .generating import finished, for_programs, for_the_page
from .looking import looking
from .taking import opened, said, takeaway

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
HISTORY_CLICKS = """element.addEventListener('click', (event) => {
  const entry = event.target.closest('[data-number]');
  if (entry) trigger('click', {number: Number(entry.dataset.number)});
});"""


@dataclass(frozen=True)
class CompareTab:
    """What the other tabs need of this one."""

    adapters: gr.CheckboxGroup  # a training adds to it
    arrival: Dependency  # the event that fills it when somebody comes
    news: list[Dependency]  # the events after which other images are shown
    verdict: gr.HTML  # votes and measures fill it


def compare_tab(studio: Studio, demo: gr.Blocks) -> CompareTab:
    with gr.Row(equal_height=False, elem_classes="tab-body"):
        with gr.Column(scale=4, min_width=300, elem_classes="controls"):
            base = gr.Dropdown(
                label="Base",
                choices=[studio.bases.first],
                value=studio.bases.first,
                elem_id="base",
                visible=False,
            )
            fields = compare_fields(studio)
            manage_adapters(studio, fields)
            expected = gr.HTML(elem_id="expected", padding=False)
            looked_at = gr.Number(0, visible=False)
            key = gr.Textbox("", visible=False)
            with gr.Row(elem_classes="tools go"):
                run = gr.Button("Compare", variant="primary", elem_id="run", min_width=120)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80, interactive=False)
            with gr.Row(elem_classes="tools"):
                saved_files = gr.UploadButton(
                    "Open a comparison (.zip or .json)", file_count="multiple", size="sm", elem_id="saved_files"
                )
                afresh = gr.Button("Start afresh", size="sm", min_width=100, elem_id="afresh")
        with gr.Column(scale=9, min_width=320, elem_classes="results"):
            status = gr.HTML(elem_id="status", min_height=48, padding=False)
            again = gr.Button("Generate again", variant="primary", size="sm", visible=False, elem_id="again")
            grid = looking(studio)
            takeaway(studio)
            verdict = gr.HTML(elem_id="verdict", padding=False)
            history = gr.HTML(js_on_load=HISTORY_CLICKS, elem_id="history", padding=False)
    results = [status, grid, history, verdict]

    def session_of(request: gr.Request) -> Session:
        return studio.sessions.of(request.session_hash)

    def strip(session: Session) -> str:
        return views.history(session.visit.history() if session.visit else (), session.thumbnail)

    def shown(session: Session, words: str) -> list:
        """Values of `results`."""
        return [words, views.grid(session), strip(session), views.verdict(studio.findings(session))]

    def expect(request: gr.Request, *values) -> str | dict:
        """Several of these run at once, and may end in another order than they began: the latest look counts."""
        *values, when = values
        session = session_of(request)
        session.looked_at = max(session.looked_at, when)
        text = expectation(session, values)
        if when < session.looked_at:
            return gr.skip()
        if session.visit and session.arrived:
            session.visit.write_fields(values)
        return text

    def expectation(session: Session, values: list) -> str:
        try:
            asked = fields.read(session, values)
            comparer = studio.comparer_of(session)
        except ValueError as problem:
            return views.message(str(problem), "warn")
        count, seconds = comparer.estimate(asked)
        long = comparer.prompt_warnings(asked)
        text = f"{count} image{'s' * (count != 1)}, about {views.duration(seconds)}"
        return views.message("\n".join([text, *long]), "warn" if long else "note")

    def ask(request: gr.Request) -> list:
        session_of(request).ask()
        return [gr.Button(visible=False), gr.Button(interactive=True)]

    def halt(request: gr.Request) -> None:
        session_of(request).cancel.set()

    def ended(request: gr.Request) -> list:
        session = session_of(request)
        return [gr.Button(interactive=False), strip(session), views.verdict(studio.findings(session))]

    def open_files(paths: list[str] | None, request: gr.Request) -> list:
        session = session_of(request)
        try:
            asked, its_base = opened(studio, session, [Path(path) for path in paths or []])
        except ValueError as problem:
            raise refusal(problem, "This cannot be opened") from None
        if session.visit:
            session.visit.show(asked, session.cells, studio.base_of(session), session.view)
        words = said(session, its_base, studio.base_of(session))
        return [*fields.filled(session, asked), *shown(session, words), gr.Button(visible=True)]

    def look_back(event: gr.EventData, request: gr.Request) -> list:
        """An earlier comparison of this visit, with its round and figures."""
        session = session_of(request)
        number = getattr(event, "number", None)
        try:
            if session.visit is None or type(number) is not int:
                raise ValueError("This comparison is not stored any more.")
            session.visit.choose(number)
            opened(studio, session, session.visit.comparison())
        except ValueError as problem:
            raise refusal(problem, "This cannot be opened") from None
        with_its_round(session)
        count = len(session.request.rows) * len(session.request.columns)
        session.view = View.of(session.request)
        return [*fields.filled(session, session.request), *shown(session, finished(session, count)), gr.skip()]

    def with_its_round(session: Session) -> None:
        session.ballot = session.visit.ballot(session.request, session.cells)
        session.measured = session.visit.measures(session.request)

    def arrive(key: str, request: gr.Request) -> list:
        """What this tab of the browser had before a reload, or else what everybody sees first."""
        session, asked = session_of(request), studio.first_request
        session.visit = studio.visits.of(key)
        session.show(asked, studio.first_cells)
        restored = restore(session)
        count = len(session.request.rows) * len(session.request.columns)
        done = finished(session, count) if session.adapters else views.message(NO_ADAPTER)
        values = fields.filled(session, session.request)
        if typed := session.visit.fields() if session.visit else None:
            values = fields.typed(session, typed)
        elif not restored:
            values = [v if f in fields.unfolded else gr.skip() for f, v in zip(fields.controls, values, strict=True)]
        session.arrived = True
        bases = list(studio.bases.choices())
        picker = gr.Dropdown(choices=bases, value=studio.base_of(session), visible=len(bases) > 1)
        return [*values, runs_offered(studio), picker, *shown(session, done)]

    def restore(session: Session) -> bool:
        """Base, adapters, comparison, round and figures of the visit, as far as they can be read."""
        visit = session.visit
        if visit and (label := visit.base()) in studio.bases.choices():
            session.base = label
        for adapter in visit.adapters() if visit else ():
            session.add_adapter(adapter)
        if not visit or not (files := visit.comparison()):
            return False
        try:
            opened(studio, session, files)
        except ValueError:
            return False
        with_its_round(session)
        return True

    def change_base(label: str, chosen: list[str], request: gr.Request) -> list:
        """Adapters that do not fit stay in the list of files, and are not chosen; the images stay those of the old."""
        session = session_of(request)
        before = session.base
        try:
            session.base = label
            comparer = studio.comparer_of(session)
        except ValueError as problem:
            session.base = before
            gr.Warning(views.plain(problem), duration=None, title="The base stays as it was")
            return [gr.Dropdown(value=studio.base_of(session)), gr.skip(), gr.skip()]
        if session.visit:
            session.visit.write_base(label)
        misfits = {}
        for name in chosen:
            try:
                card = comparer.shelf.card(Path(session.adapters[name].path), name)
                misfits |= {} if card.fits else {name: card.mismatches[0]}
            except (ValueError, KeyError) as problem:
                misfits[name] = str(problem)
        words = [f"The base is {label}. The images are of the one before, until you compare again."]
        words += [f"{name} is not chosen any more: {reason}" for name, reason in misfits.items()]
        fitting = [name for name in chosen if name not in misfits]
        return [gr.skip(), fields.choices(session, fitting), views.message("\n".join(words), "warn")]

    controls = fields.controls
    seen = {"fn": expect, "inputs": [*controls, looked_at], "outputs": expected, "js": WITH_TIME, **LIGHT, **PRIVATE}
    gr.on([control.change for control in controls], trigger_mode="always_last", **seen)
    # Gradio may forget the last of several quick changes; a field that is left is looked at once more.
    gr.on([text.blur for text in fields.texts], trigger_mode="multiple", **seen)
    fields.sweep.click(lambda: SWEEP, None, fields.strengths, **LIGHT, **PRIVATE)
    started = gr.on([run.click, again.click], ask, None, [again, stop], **LIGHT, **PRIVATE)
    on_status = {"show_progress": "full", "show_progress_on": [status]}
    generating = started.then(for_the_page(studio, fields), controls, [status, grid], **on_status, **HEAVY, **PRIVATE)
    generating.then(ended, None, [stop, history, verdict], **LIGHT, **PRIVATE)
    for_programs(studio, fields)
    gr.on([run.click, again.click], None, js=SHOW_STATUS, **PRIVATE)
    stop.click(halt, None, None, **LIGHT, **PRIVATE)
    base.input(change_base, [base, fields.adapters], [base, fields.adapters, status], **HEAVY, **PRIVATE)
    fields.files.upload(add_files(studio, fields), [fields.files, fields.adapters], fields.adapters, **LIGHT, **PRIVATE)
    of_runs, adapters = fields.of_runs, fields.adapters
    of_runs.input(add_of_runs(studio, fields), [of_runs, adapters], [adapters, of_runs], **LIGHT, **PRIVATE)
    opening = saved_files.upload(open_files, saved_files, [*controls, *results, again], **LIGHT, **PRIVATE)
    back = history.click(look_back, None, [*controls, *results, again], **LIGHT, **PRIVATE)
    arrival = demo.load(arrive, key, [*controls, of_runs, base, *results], js=KEY_OF_TAB, **LIGHT, **PRIVATE)
    afresh.click(None, None, None, js=AFRESH, **PRIVATE)
    return CompareTab(adapters, arrival, [generating, opening, back], verdict)
