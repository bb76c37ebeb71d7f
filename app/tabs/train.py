"""Train: images and a prompt in, a run of the training script out, watched while it goes."""

import secrets
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from reslora_diffusion.methods.offers import Offer, offered_optimizers, offered_schedules

from .. import run_views, views
from ..forms import read_train_request
from ..images import images_in, read_images
from ..runs import Run, read_run
from ..sessions import Session
from ..studio import LIGHT, PRIVATE, Studio
from ..tabs import refusal
from ..training import CONFIG, NO_SCHEDULE, OF_MODELS, PLAIN_OPTIMIZER, Method, Training, TrainRequest

SECONDS_BETWEEN_LOOKS = 2
SMOOTHING = 0.95
OWN = "images of my own"
INTRODUCTION = (
    "Teaches the loaded base a subject from a few images, with the script of the command line and a configuration "
    "file that it takes too. The adapter joins the Compare tab when it is done."
)


def said(offer: Offer) -> tuple[str, str]:
    """A choice of a dropdown: its words, and its value."""
    return f"{offer.value}: {offer.summary}", offer.value


def train_watch() -> tuple[gr.BrowserState, gr.Timer]:
    """Who the browser is, and when it looks. Outside of the tabs, whose insides are made when they are first shown."""
    return gr.BrowserState("", storage_key="reslora-trainings"), gr.Timer(SECONDS_BETWEEN_LOOKS, active=False)


def train_tab(
    studio: Studio, adapters: gr.CheckboxGroup, arrival: Dependency, owner: gr.BrowserState, timer: gr.Timer
) -> None:
    """`arrival` is the event that fills the Compare tab, whose `adapters` a training adds to."""
    trainer, limits = studio.trainer, studio.trainer.limits

    gr.HTML(views.message(INTRODUCTION), padding=False)
    with gr.Row(equal_height=False, elem_classes="tab-body"):
        with gr.Column(scale=4, min_width=300):
            subject = gr.Dropdown(
                label="Images of the subject",
                choices=[OWN, *studio.subjects],
                value=studio.first_subject or OWN,
                visible=bool(studio.subjects),
                elem_id="train_subject",
            )
            files = gr.File(
                label="My images",
                file_count="multiple",
                file_types=["image"],
                height=150,
                visible=studio.first_subject is None,
                elem_id="train_files",
            )
            preview = gr.HTML(elem_id="train_preview", padding=False)
            prompt = gr.Textbox(
                label="Their prompt",
                info="A rare word for the subject, and what it is a kind of.",
                value=studio.first_prompt.partition(" on a ")[0],
                elem_id="train_prompt",
            )
            method = gr.Radio(list(Method), value=TrainRequest.method, label="Method", elem_id="train_method")
            steps = gr.Number(
                TrainRequest.max_train_steps, label="Steps", precision=0, minimum=1, elem_id="train_steps"
            )
            samples_of = gr.Textbox(
                label="Prompts for samples",
                info=f"One to a line, at most {limits.validation_prompts}; generated as training goes.",
                value=studio.first_prompt,
                lines=2,
                elem_id="train_samples_of",
            )
            with gr.Accordion("The rest of the family", open=False):
                optimizer = gr.Dropdown(
                    [("AdamW", PLAIN_OPTIMIZER), *map(said, offered_optimizers())],
                    value=PLAIN_OPTIMIZER,
                    label="Optimizer",
                    elem_id="train_optimizer",
                )
                schedules = [offer for offer in offered_schedules() if offer.value not in OF_MODELS]
                schedule = gr.Dropdown(
                    [("none", NO_SCHEDULE), *map(said, schedules)],
                    value=NO_SCHEDULE,
                    label="Schedule",
                    elem_id="train_schedule",
                )
                dora = gr.Checkbox(False, label="DoRA: magnitudes beside the directions", elem_id="train_dora")
            with gr.Accordion("More", open=False):
                rank = gr.Slider(1, limits.rank, value=TrainRequest.rank, step=1, label="Rank")
                rate = gr.Number(TrainRequest.learning_rate, label="Learning rate", minimum=0, maximum=1)
                batch = gr.Slider(
                    1, limits.batch_size, value=TrainRequest.train_batch_size, step=1, label="Images in a step"
                )
                text_encoder = gr.Checkbox(True, label="Train the text encoder too")
                class_prompt = gr.Textbox(
                    label="Prompt of the class",
                    info="Such as: a sticker of animal. The base generates images of it to train on as well, so that "
                    "the class stays what it was.",
                    value="",
                )
                class_images = gr.Slider(1, limits.class_images, value=40, step=1, label="Images of the class")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                name = gr.Textbox(label="Name of the run", info="From the prompt and the method if empty.", value="")
            with gr.Row(elem_classes="tools"):
                start = gr.Button("Train", variant="primary", min_width=120, elem_id="train_start")
                stop = gr.Button("Stop", variant="stop", interactive=False, min_width=80, elem_id="train_stop")
            config = gr.DownloadButton(
                "Configuration .yaml", size="sm", interactive=False, elem_id="download_config", min_width=110
            )
        with gr.Column(scale=9, min_width=320):
            status = gr.HTML(
                views.message("No training of yours yet."), elem_id="train_status", padding=False, min_height=48
            )
            curves = gr.HTML(elem_id="train_curves", padding=False)
            images = gr.HTML(elem_id="train_samples", padding=False)
            with gr.Accordion("What the script says", open=False):
                log = gr.HTML(elem_id="train_log", padding=False)

    fields = [
        prompt,
        method,
        steps,
        samples_of,
        rank,
        rate,
        batch,
        text_encoder,
        class_prompt,
        class_images,
        seed,
        name,
        optimizer,
        schedule,
        dora,
    ]
    shown = [status, curves, images, log, start, stop, config, timer, adapters]

    def session_of(request: gr.Request) -> Session:
        return studio.sessions.of(request.session_hash)

    def sources_of(chosen: str, paths: list[str] | None) -> list[str]:
        return images_in(studio.subjects[chosen]) if chosen in studio.subjects else paths or []

    def look_at(chosen: str, paths: list[str] | None, request: gr.Request) -> str:
        sources = sources_of(chosen, paths)[: limits.images]
        shown = filter(None, map(session_of(request).thumbnail, map(Path, sources)))
        return views.strip(list(shown), chosen if chosen in studio.subjects else "my subject")

    def begin(
        request: gr.Request, key: str, chosen: str, paths: list[str] | None, chosen_adapters: list[str], *values
    ) -> list:
        try:
            asked = read_train_request(*values)
            session = session_of(request)
            base, resolution = studio.bases.source(session.base), studio.comparer_of(session).resolution
            images = read_images(sources_of(chosen, paths), limits.images)
            training = trainer.start(asked, images, key, str(base), resolution)
        except ValueError as problem:
            raise refusal(problem) from None
        session.training_seen = None
        return look(session, training, chosen_adapters)

    def nothing_new() -> list:
        return [gr.Timer(active=False) if control is timer else gr.skip() for control in shown]

    def watch(key: str, chosen_adapters: list[str], request: gr.Request) -> list:
        training = trainer.of(key)
        if training is None:
            return nothing_new()
        return look(session_of(request), training, chosen_adapters)

    def arrive(key: str, chosen_adapters: list[str], request: gr.Request) -> list:
        """A reload finds its training again."""
        return [key or secrets.token_hex(16), *watch(key, chosen_adapters, request)]

    def halt(key: str) -> None:
        if training := trainer.of(key):
            training.stop()

    def look(session: Session, training: Training, chosen_adapters: list[str]) -> list:
        running = training.running
        try:
            runs = [read_run(label(training, folder), folder) for folder in training.runs()]
        except ValueError as problem:
            return [views.message(str(problem), "bad"), *nothing_new()[1:]]
        seen = (training.folder, running, *((len(r.losses), len(r.validation), len(r.samples)) for r in runs))
        news = seen != session.training_seen
        session.training_seen = seen
        return [
            run_views.training_status(training),
            run_views.curves(runs, SMOOTHING) if news and runs else gr.skip(),
            samples_of_runs(runs, session) if news else gr.skip(),
            run_views.log(training.log()),
            gr.Button(interactive=not running),
            gr.Button("Stop at once" if training.stopped else "Stop", interactive=running),
            gr.DownloadButton(value=str(take_away(session, training)), interactive=True),
            gr.Timer(active=running),
            gr.skip() if running else offered(session, training, chosen_adapters),
        ]

    def samples_of_runs(runs: list[Run], session: Session) -> str:
        """The steps of one run side by side; of two, their newest samples."""
        if len(runs) == 1:
            return run_views.sample_history(runs[0], session.thumbnail)
        return run_views.samples(runs, max((run.last_step for run in runs), default=0), session.thumbnail)

    def take_away(session: Session, training: Training) -> Path:
        """A copy of the configuration where the page may serve it from."""
        path = session.folder / CONFIG
        path.write_bytes((training.folder / CONFIG).read_bytes())
        return path

    def offered(session: Session, training: Training, chosen_adapters: list[str]):
        """What was trained joins the adapters to compare."""
        chosen = list(chosen_adapters)
        for file in training.adapters():
            try:
                card = studio.comparer_of(session).shelf.card(file, run_views.adapter_label(training, file))
                if not card.fits:
                    raise ValueError("\n".join(card.mismatches))
            except ValueError as problem:
                gr.Warning(views.plain(problem), duration=None)
                continue
            chosen.append(session.add_adapter(card.adapter).label)
        return gr.CheckboxGroup(choices=list(session.adapters), value=list(dict.fromkeys(chosen)))

    def label(training: Training, folder: Path) -> str:
        return training.folder.name if folder == training.folder else f"{training.folder.name}/{folder.name}"

    start.click(begin, [owner, subject, files, adapters, *fields], shown, **LIGHT, **PRIVATE)
    stop.click(halt, owner, None, **LIGHT, **PRIVATE)
    timer.tick(watch, [owner, adapters], shown, **LIGHT, **PRIVATE)
    subject.input(lambda chosen: gr.File(visible=chosen == OWN), subject, files, **LIGHT, **PRIVATE)
    gr.on([subject.input, files.change], look_at, [subject, files], preview, **LIGHT, **PRIVATE)
    arrival.then(look_at, [subject, files], preview, **LIGHT, **PRIVATE)
    arrival.then(arrive, [owner, adapters], [owner, *shown], **LIGHT, **PRIVATE)
