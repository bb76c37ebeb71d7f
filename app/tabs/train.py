"""Train: images and a prompt in, a run of the training script out, watched while it goes.

A browser sees its own trainings, from any of its windows and after a restart of the server, and no others.
"""

import secrets
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from .. import run_views, views
from ..forms import read_train_request
from ..images import read_images
from ..runs import RunFolder, read_run
from ..sessions import Session
from ..studio import LIGHT, PRIVATE, Studio
from ..tabs import refusal
from ..trainer import CONFIG, Training
from .curves import curves
from .fields import Fields
from .latest import Latest
from .train_form import train_form

SECONDS_BETWEEN_LOOKS = 2
SMOOTHING = 0.95
STORAGE = "reslora-trainings"
INTRODUCTION = (
    "Teaches the loaded base a subject from a few images, with the script of the command line and a configuration "
    "file that it takes too. The adapter joins the Compare tab when it is done."
)
NONE = """No training of yours yet. Loss, samples and what the script says appear here as they come. It begins with
- a few images of one subject: five are enough, different views are better than many
- a prompt with a rare word that stands for it, such as sks
- a method; LoRA, then ResLoRA trains both on equal terms, and opens both in Compare"""
CHOOSES = """element.addEventListener('click', (event) => {
  const entry = event.target.closest('[data-name]');
  if (entry) trigger('click', {name: entry.dataset.name});
});"""


def train_watch() -> tuple[gr.BrowserState, gr.Timer]:
    """Make the browser's key and the timer by which it looks. They stand outside of the tabs, whose insides are made
    when they are first shown. Gradio encrypts what a browser stores, by a key that changes with each start of the
    server unless it is given."""
    return gr.BrowserState("", storage_key=STORAGE, secret=STORAGE), gr.Timer(SECONDS_BETWEEN_LOOKS, active=False)


def train_tab(
    studio: Studio,
    tab: gr.Tab,
    compared: Fields,
    arrival: Dependency,
    owner: gr.BrowserState,
    timer: gr.Timer,
) -> None:
    """`compared` are the fields of the Compare tab, whose adapters a training adds to; `arrival` is the event that
    fills them."""
    trainer = studio.trainer

    gr.HTML(views.message(INTRODUCTION), padding=False)
    with gr.Row(equal_height=False, elem_classes="tab-body"):
        with gr.Column(scale=4, min_width=300):
            form = train_form(studio)
            with gr.Row(elem_classes="tools go"):
                start = gr.Button("Train", variant="primary", min_width=120, elem_id="train_start")
                stop = gr.Button("Stop", variant="stop", interactive=False, min_width=80, elem_id="train_stop")
            with gr.Row(elem_classes="tools"):
                resume = gr.Button("Go on", size="sm", interactive=False, min_width=80, elem_id="train_resume")
                config = gr.DownloadButton(
                    "Configuration .yaml", size="sm", interactive=False, elem_id="download_config", min_width=110
                )
        with gr.Column(scale=9, min_width=320):
            listed = gr.HTML(js_on_load=CHOOSES, elem_id="train_list", padding=False)
            status = gr.HTML(views.message(NONE), elem_id="train_status", padding=False, min_height=48)
            drawing = curves(studio, "train")
            images = gr.HTML(elem_id="train_samples", padding=False)
            with gr.Accordion("What the script says", open=False):
                log = gr.HTML(elem_id="train_log", padding=False)

    shown = [
        listed,
        status,
        *drawing.outputs,
        images,
        log,
        start,
        stop,
        resume,
        config,
        timer,
        compared.adapters,
        compared.joined,
    ]

    def looked_at(session: Session, key: str) -> Training | None:
        """The training that was chosen, if it is this owner's; else their newest."""
        found = trainer.of(key)
        chosen = (training for training in found if training.folder == session.training)
        return next(chosen, found[0] if found else None)

    def begin(session: Session, key: str, chosen: str, paths: list[str] | None, *values) -> list:
        try:
            asked = read_train_request(*values)
            base, resolution = studio.bases.source(session.base), studio.comparer_of(session).resolution
            sources = read_images(form.images.paths(chosen, paths), trainer.limits.images)
            training = trainer.start(asked, sources, key, str(base), resolution)
        except ValueError as problem:
            raise refusal(problem) from None
        session.training, session.training_seen = training.folder, None
        return look(session, training, key)

    def go_on(session: Session, key: str) -> list:
        try:
            if (training := looked_at(session, key)) is None:
                raise ValueError("There is no training of yours to go on with.")
            training = trainer.resume(training)
        except ValueError as problem:
            raise refusal(problem) from None
        return look(session, training, key)

    def watch(session: Session, key: str) -> list:
        if training := looked_at(session, key):
            return look(session, training, key)
        nothing = {timer: gr.Timer(active=False), compared.joined: []}  # no adapter was brought
        return [nothing.get(control, gr.skip()) for control in shown]

    def choose(session: Session, key: str, event: gr.EventData) -> list:
        name = getattr(event, "name", None)
        own = next((t.folder for t in trainer.of(key) if t.folder.name == name), session.training)
        session.training, session.training_seen = own, None
        return watch(session, key)

    def arrive(session: Session, key: str) -> list:
        """A reload finds its trainings again."""
        return [key or secrets.token_hex(16), *watch(session, key)]

    def halt(key: str, request: gr.Request) -> None:
        if training := looked_at(studio.sessions.of(request.session_hash), key):
            training.stop()

    def look(session: Session, training: Training, key: str) -> list:
        """Values of `shown`; curves and samples only where there is news of them."""
        own, running = trainer.of(key), training.running
        at_work = any(other.running for other in own)  # before the status: one that says it ended is looked at again
        try:
            runs = [read_run(label(training, folder), folder) for folder in training.runs()]
            status = run_views.training_status(training)
        except ValueError as problem:
            runs, status = [], views.message(str(problem), "bad")
        counts = ((len(r.losses), len(r.validation), len(r.samples)) for r in runs)
        seen = (training.folder, running, training.plot_of_search, *counts)
        news, before = seen != session.training_seen, session.training_seen
        ended = before is not None and before[:2] == (training.folder, True)
        session.training_seen = seen
        return [
            run_views.trainings(own, training),
            status,
            *(drawing.drawn(session, runs, SMOOTHING) if news else [gr.skip()] * len(drawing.outputs)),
            run_views.search(training, session.thumbnail) + samples_of_runs(runs, session) if news else gr.skip(),
            run_views.log(training.log()),
            gr.Button(interactive=trainer.running is None),
            gr.Button("Stop at once" if running and training.stopped else "Stop", interactive=running),
            gr.Button(interactive=not (running or training.finished)),
            gr.DownloadButton(value=str(take_away(session, training)), interactive=True),
            gr.Timer(active=running or at_work),
            *([gr.skip(), []] if running or not news else offered(session, training, ended)),
        ]

    def samples_of_runs(runs: list[RunFolder], session: Session) -> str:
        """The steps of one run side by side; of two, their newest samples."""
        if len(runs) == 1:
            return run_views.sample_history(runs[0], session.thumbnail)
        return run_views.samples(runs, max((run.last_step for run in runs), default=0), session.thumbnail)

    def take_away(session: Session, training: Training) -> Path:
        """A copy of the configuration where the page may serve it from."""
        path = session.folder / CONFIG
        path.write_bytes((training.folder / CONFIG).read_bytes())
        return path

    def offered(session: Session, training: Training, ended: bool) -> list:
        """Add what was trained to the adapters; it is chosen where it has just ended, or was chosen before a reload."""
        joined = []
        for file in training.adapters():
            try:
                card = studio.comparer_of(session).shelf.card(file, run_views.adapter_label(training, file))
                if not card.fits:
                    raise ValueError("\n".join(card.mismatches))
                if card.adapter.sha256 in session.removed and not ended:
                    continue
            except ValueError as problem:
                gr.Warning(views.plain(problem), duration=None)
                continue
            label = session.add_adapter(card.adapter).label
            joined += [label] if ended or label in session.wanted else []
        return compared.brought(session, joined)

    def label(training: Training, folder: Path) -> str:
        return training.folder.name if folder == training.folder else f"{training.folder.name}/{folder.name}"

    latest = Latest(studio)
    asked = [owner, *form.images.controls, *form.fields]
    events = [
        latest.on([start.click], begin, asked, shown, trigger_mode="once", adds=True),
        latest.on([resume.click], go_on, [owner], shown, trigger_mode="once", adds=True),
        latest.on([listed.click], choose, [owner], shown, in_turn=True, says=True),
        latest.on([timer.tick, tab.select], watch, [owner], shown, trigger_mode="once"),
        latest.after(arrival, arrive, [owner], [owner, *shown], in_turn=True),
    ]
    for event in events:
        compared.tick_after(event)
    stop.click(halt, owner, None, **LIGHT, **PRIVATE)
    latest.after(arrival, form.look, form.images.controls, [form.preview])
