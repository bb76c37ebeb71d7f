"""Train: what is asked, in the order of `forms.read_train_request`."""

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from reslora_diffusion.methods.offers import Offer, offered_optimizers, offered_schedules

from .. import views
from ..sessions import Session
from ..studio import PRIVATE, Studio
from ..training import NO_SCHEDULE, OF_MODELS, PLAIN_OPTIMIZER, Method, TrainRequest
from .latest import Latest
from .subject import SubjectImages, subject_images

# Prompts for samples name the subject as the images' prompt does, unless somebody wrote them otherwise. In the browser:
# whoever goes on to write there is not overwritten by an answer that is late.
FOLLOW = """(prompt, before, samples) => {
  const follow = (line) => line.startsWith(before) ? prompt + line.slice(before.length) : line;
  return [before ? samples.split('\\n').map(follow).join('\\n') : samples, prompt];
}"""


@dataclass(frozen=True)
class TrainForm:
    """The controls of a training."""

    studio: Studio
    images: SubjectImages
    preview: gr.HTML
    fields: list

    def look(self, session: Session, chosen: str, paths: list[str] | None) -> str:
        sources = self.images.paths(chosen, paths)[: self.studio.trainer.limits.images]
        shown = filter(None, map(session.thumbnail, map(Path, sources)))
        return views.strip(list(shown), chosen if chosen in self.studio.subjects else "my subject")


def said(offer: Offer) -> tuple[str, str]:
    """A choice of a dropdown: its words, and its value."""
    return f"{offer.value}: {offer.summary}", offer.value


def train_form(studio: Studio) -> TrainForm:
    """The fields, where the page stands now."""
    limits = studio.trainer.limits
    latest = Latest(studio)
    labels, ids = ("Images of the subject", "My images"), ("train_subject", "train_files")
    images = subject_images(studio, latest, labels, ids)
    preview = gr.HTML(elem_id="train_preview", padding=False)
    prompt = gr.Textbox(
        label="Their prompt",
        info="A rare word for the subject, and what it is a kind of.",
        value=studio.first_prompt.partition(" on a ")[0],
        elem_id="train_prompt",
    )
    method = gr.Radio(list(Method), value=TrainRequest.method, label="Method", elem_id="train_method")
    steps = gr.Number(TrainRequest.max_train_steps, label="Steps", precision=0, minimum=1, elem_id="train_steps")
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
        tune = gr.Checkbox(
            False,
            label="Search learning rate and alpha first",
            info="By short trainings, measured on images that are held out; takes about a third of the time on top.",
            elem_id="train_tune",
        )
        batch = gr.Slider(1, limits.batch_size, value=TrainRequest.train_batch_size, step=1, label="Images in a step")
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
        tune,
    ]
    form = TrainForm(studio, images, preview, fields)
    latest.on(images.changes, form.look, images.controls, [preview])
    followed = gr.Textbox(prompt.value, visible=False)
    prompt.blur(None, [prompt, followed, samples_of], [samples_of, followed], js=FOLLOW, **PRIVATE)
    return form
