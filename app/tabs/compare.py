"""Compare: what to generate on the left, the images on the right; the comparisons before are a line below."""

from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from .. import measure_views, views
from ..forms import SWEEP
from ..sessions import Session
from ..studio import HEAVY, LIGHT, PRIVATE, Studio
from ..tabs import refusal
from .choosing import choose_adapters, runs_offered
from .fields import Fields, compare_fields
from .generating import finished, for_programs, for_the_page
from .latest import Latest
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
    return [key, stamp()];
  } catch { return [fresh, stamp()]; }
}"""
SECONDS_IN_LINE = 2  # from one look at the place in the queue to the next
AFRESH = """() => {
  try { sessionStorage.removeItem('reslora-visit'); } catch {}
  location.reload();
}"""
HISTORY_CLICKS = """element.addEventListener('click', (event) => {
  const entry = event.target.closest('[data-number]');
  if (entry) trigger('click', {number: Number(entry.dataset.number)});
});"""


@dataclass(frozen=True)
class CompareTab:
    """The parts of this tab that the other tabs need."""

    fields: Fields  # a training adds to their adapters
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
            latest = Latest(studio)
            fields = compare_fields(studio)
            choose_adapters(studio, fields, latest)
            key = gr.Textbox("", visible=False)
            with gr.Column(elem_classes="go"):
                expected = gr.HTML(elem_id="expected", padding=False)
                with gr.Row(elem_classes="tools"):
                    run = gr.Button("Compare", variant="primary", elem_id="run", min_width=120)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80, interactive=False)
            with gr.Row(elem_classes="tools"):
                saved_files = gr.UploadButton(
                    "Open a comparison (.zip or .json)", file_count="multiple", size="sm", elem_id="saved_files"
                )
                afresh = gr.Button("Start afresh", size="sm", min_width=100, elem_id="afresh")
        with gr.Column(scale=9, min_width=320, elem_classes="results"):
            line, clock = gr.HTML(elem_id="line", padding=False), gr.Timer(SECONDS_IN_LINE, active=False)
            status = gr.HTML(elem_id="status", min_height=48, padding=False)
            again = gr.Button("Generate again", variant="primary", size="sm", visible=False, elem_id="again")
            grid, pages = looking(studio)
            takeaway(studio)
            verdict = gr.HTML(elem_id="verdict", padding=False)
            history = gr.HTML(js_on_load=HISTORY_CLICKS, elem_id="history", padding=False)
    results = [status, grid, pages, history, verdict]

    def session_of(request: gr.Request) -> Session:
        return studio.sessions.of(request.session_hash)

    def strip(session: Session) -> str:
        return views.history(session.visit.history() if session.visit else (), session.thumbnail)

    def shown(session: Session, words: str) -> list:
        """Values of `results`."""
        found = measure_views.verdict(studio.findings(session))
        return [words, views.grid(session), str(session.view.pages), strip(session), found]

    def expect(session: Session, *values) -> str:
        try:
            asked = fields.read(session, values)
            comparer = studio.comparer_of(session)
        except ValueError as problem:
            return views.message(str(problem), "warn")
        count, seconds = comparer.estimate(asked)
        long = comparer.prompt_warnings(asked)
        text = f"{count} image{'s' * (count != 1)}, about {views.duration(seconds)}"
        return views.message("\n".join([text, *long]), "warn" if long else "note")

    def keep(session: Session, values: list) -> None:
        if session.visit and session.arrived:
            session.visit.write_fields(values)

    def ask(session: Session) -> list:
        session.ask()
        return [gr.Button(visible=False), gr.Button(interactive=True), *in_line(session)]

    def in_line(session: Session) -> list:
        """The place in the queue, as long as there is one."""
        ahead = studio.sessions.ahead(session) if session.waits and not session.cancel.is_set() else 0
        return [views.place_in_line(ahead) if ahead else "", gr.Timer(active=session.waits)]

    def halt(request: gr.Request) -> None:
        session_of(request).cancel.set()

    def ended(session: Session) -> list:
        """Stop goes on working where the visitor has asked for another comparison meanwhile."""
        at_work = gr.Button(interactive=session.waits or session.generates)
        return [at_work, strip(session), measure_views.verdict(studio.findings(session))]

    def open_files(session: Session, paths: list[str] | None) -> list:
        try:
            asked, its_base = opened(studio, session, [Path(path) for path in paths or []])
        except ValueError as problem:
            raise refusal(problem, "This cannot be opened") from None
        session.store_list()
        if session.visit:
            session.visit.show(asked, session.cells, studio.base_of(session), session.view)
        words = said(session, its_base, studio.base_of(session))
        return [*fields.filled(session, asked), *shown(session, words), gr.Button(visible=True)]

    def look_back(session: Session, event: gr.EventData) -> list:
        """An earlier comparison of this visit, with its round and figures."""
        number = getattr(event, "number", None)
        try:
            if session.visit is None or type(number) is not int:
                raise ValueError("This comparison is not stored any more.")
            session.visit.choose(number)
            opened(studio, session, session.visit.comparison())
        except ValueError as problem:
            raise refusal(problem, "This cannot be opened") from None
        session.store_list()
        with_its_round(session)
        count = len(session.request.rows) * len(session.request.columns)
        session.view = session.view.turned_to(session.request)
        return [*fields.filled(session, session.request), *shown(session, finished(session, count)), gr.skip()]

    def with_its_round(session: Session) -> None:
        *session.earlier, session.ballot = session.visit.rounds(session.request, session.cells) or [None]
        session.measured = session.visit.measures(session.request)

    def arrive(session: Session, key: str) -> list:
        """Show what this tab of the browser had before a reload, or else what everybody sees first."""
        asked = studio.first_request
        session.visit = studio.visits.of(key)
        session.show(asked, studio.first_cells)
        restored = restore(session)
        count = len(session.request.rows) * len(session.request.columns)
        done = finished(session, count) if session.adapters else views.message(NO_ADAPTER)
        values = fields.filled(session, session.request)
        if typed := session.visit.fields() if session.visit else None:
            session.wanted = typed[fields.controls.index(fields.adapters)]
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
        session.references = visit.references() if visit else []
        restored = bool(visit and (files := visit.comparison()))
        try:
            if restored:
                opened(studio, session, files)
                with_its_round(session)
        except ValueError:
            restored = False
        if visit:
            absent = {digest for digest, _ in visit.listed()[0]} - {*session.paths}
            session.restore_list(studio.adapters_by_content(absent) if absent else [])
        return restored

    def change_base(session: Session, label: str, chosen: list[str]) -> list:
        """Adapters that do not fit stay in the list of files, and are not chosen; the images stay those of the old."""
        before = session.base
        try:
            session.base = label
            comparer = studio.comparer_of(session)
        except ValueError as problem:
            session.base = before
            gr.Warning(views.plain(problem), duration=None, title="The base stays as it was")
            return [studio.base_of(session), gr.skip(), gr.skip()]
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
        return [label, fields.choices(session, fitting), views.message("\n".join(words), "warn")]

    controls = fields.controls
    # Not always_last, which puts changes off: where a section opens, Gradio sets its fields once more to what it knows
    # of them, and what was typed meanwhile would be lost.
    latest.on([control.change for control in controls], expect, controls, [expected], keep=keep)
    fields.sweep.click(None, None, fields.strengths, js=f"() => {SWEEP!r}", **PRIVATE)
    started = latest.on([run.click, again.click], ask, [], [again, stop, line, clock], adds=True)
    latest.on([clock.tick], in_line, [], [line, clock])
    on_status = {"show_progress": "full", "show_progress_on": [status], "trigger_mode": "multiple"}
    generating = started.then(for_the_page(studio, fields), controls, [status, grid], **on_status, **HEAVY, **PRIVATE)
    latest.after(generating, ended, [], [stop, history, verdict])
    for_programs(studio, fields)
    gr.on([run.click, again.click], None, js=SHOW_STATUS, **PRIVATE)
    stop.click(halt, None, None, **LIGHT, **PRIVATE)
    chosen_base = [base, fields.adapters, status]
    latest.on([base.input], change_base, chosen_base[:2], chosen_base, in_turn=True, show_progress="full", **HEAVY)
    opening = latest.on([saved_files.upload], open_files, [saved_files], [*controls, *results, again], in_turn=True)
    back = latest.on([history.click], look_back, [], [*controls, *results, again], in_turn=True, says=True)
    filled = [*controls, fields.of_runs, base, *results]
    arrival = latest.on([demo.load], arrive, [key], filled, in_turn=True, js=KEY_OF_TAB)
    afresh.click(None, None, None, js=AFRESH, **PRIVATE)
    return CompareTab(fields, arrival, [generating, opening, back], verdict)
