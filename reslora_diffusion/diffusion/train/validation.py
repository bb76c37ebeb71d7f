"""Validation: images of fixed prompts from fixed seeds, and the loss on fixed noise.

Images are generated inside `Adapters.merged()`, by the live models and the base's own sampler: they show what would be
exported, and there is no second copy of the model.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..data.buckets import Grid
from ..data.prompts import ValidationPrompt, read_prompts
from ..data.sampling import Batch
from ..models.adapters import Adapters
from ..models.families import Family, Texts, Tokens
from ..objective.loss import Denoiser
from ..objective.randomness import Stream, generator
from ..options import DreamBoothOptions
from .sheet import contact_sheet, save_image

SAMPLES = "samples"
SHEET = "samples.png"
IMAGE_TRACKERS = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}  # that show images, and how they want them


Words = tuple[str, bool]  # and whether images are guided away from them


def words_of(prompts: Sequence[ValidationPrompt]) -> list[Words]:
    """Everything that is to be encoded for the prompts, each once."""
    return [*dict.fromkeys(words for p in prompts for words in ((p.prompt, False), (p.negative_prompt, True)))]


def read_words(
    family: Family, pipeline: DiffusionPipeline, prompts: Sequence[ValidationPrompt], options: DreamBoothOptions
) -> Tokens | None:
    """Return the words to encode for the prompts; None if there are none."""
    words = words_of(prompts)
    return family.read(pipeline, [w for w, _ in words], options, [n for _, n in words]) if words else None


def prompts_of_run(options: DreamBoothOptions) -> list[ValidationPrompt]:
    """`--num_validation_images` of each `--validation_prompt`, then one of each prompt of `--sample_prompts`."""
    numbers = range(options.num_validation_images)
    own = [ValidationPrompt(prompt, number=n) for prompt in options.validation_prompt or () for n in numbers]
    return own + (read_prompts(options.sample_prompts).prompts if options.sample_prompts else [])


@torch.no_grad()
def fixed_noise_loss(denoiser: Denoiser, batches: Sequence[Batch]) -> float:
    """Mean loss over batches whose noise and timesteps never change."""
    return torch.cat([denoiser.losses(batch) for batch in batches]).mean().item()


@dataclass
class ValidationImages:
    """Generates an image of every validation prompt. Frozen text encoders encode them once and can then be freed.

    `tokens` are those of `words_of(prompts)`; `grid` is what the sides of an image must be on.
    """

    pipeline: DiffusionPipeline
    family: Family
    prompts: list[ValidationPrompt]
    resolution: int
    grid: Grid
    seed: int
    num_inference_steps: int
    guidance_scale: float
    text_is_frozen: bool
    folder: Path
    tokens: Tokens | None
    texts: dict[Words, Texts] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.wanted and self.text_is_frozen:
            self.texts = self.encode()

    @property
    def wanted(self) -> bool:
        return bool(self.prompts)

    @torch.no_grad()
    def encode(self) -> dict[Words, Texts]:
        """The words of every prompt, as the text encoders see them now: one by one as a pipeline does it, because in
        one batch their last bits may come out differently."""
        assert self.tokens is not None, "there are prompts to generate images of"
        encoders = self.family.encoders_for(self.pipeline, self.tokens)
        encoded = [self.family.encode(encoders, tokens) for tokens in self.tokens.each()]
        return dict(zip(words_of(self.prompts), encoded, strict=True))

    def generate(self, adapters: Adapters) -> list[Image.Image]:
        """An image of every prompt, in order."""
        self.pipeline.vae.to(self.family.denoiser_of(self.pipeline).device)
        with adapters.evaluation(), adapters.merged():
            texts = self.texts or self.encode()
            images = [self.pipeline(**self.settings(prompt, texts)).images[0] for prompt in self.prompts]
        self.pipeline.vae.to("cpu")
        return images

    def settings(self, prompt: ValidationPrompt, texts: dict[Words, Texts]) -> dict[str, Any]:
        """Return the pipeline's arguments for one prompt; settings that the prompt lacks are the run's."""
        text, negative = texts[prompt.prompt, False], texts[prompt.negative_prompt, True]
        given: dict[str, Any] = {
            **self.family.pipeline_inputs(self.pipeline, text, negative, empty=not prompt.negative_prompt)
        }
        guidance = prompt.guidance_scale if self.family.is_guided else prompt.scale
        if self.family.has_true_cfg and prompt.scale is not None and prompt.scale > 1:
            given |= {
                "true_cfg_scale": prompt.scale,
                "negative_prompt_embeds": negative.hidden,
                "negative_pooled_prompt_embeds": negative.pooled,
            }
        source = generator(self.seed, Stream.VALIDATION, prompt.number)
        return given | {
            **self.family.as_asked,
            "height": self.side(prompt.height),
            "width": self.side(prompt.width),
            "num_inference_steps": prompt.sample_steps or self.num_inference_steps,
            self.family.guidance_name: self.guidance_scale if guidance is None else guidance,
            "generator": source if prompt.seed is None else torch.Generator().manual_seed(prompt.seed),
        }

    def side(self, asked: int | None) -> int:
        """A side in pixels that the model can be given."""
        return self.resolution if asked is None else max(self.grid.smallest, asked // self.grid.step * self.grid.step)

    def names(self) -> list[str]:
        """Names of the images' files: number of the prompt, then of the image of that prompt."""
        place, names = -1, []
        for prompt in self.prompts:
            place += prompt.number == 0
            names.append(f"{place}-{prompt.number}.png")
        return names

    def save(self, images: list[Image.Image], step: int) -> None:
        """Write images to `samples/`, and make the sheet of all steps anew."""
        folder = self.folder / SAMPLES / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in zip(self.names(), images, strict=True):
            save_image(image, folder / name)
        self.write_sheet()

    def forget_after(self, step: int) -> None:
        """Remove images of later steps, which an earlier or interrupted run left behind."""
        for folder in (self.folder / SAMPLES).glob("step-*"):
            if int(folder.name[5:]) > step or step == 0:
                shutil.rmtree(folder)

    def write_sheet(self) -> None:
        """A column for each step, a row for each image."""
        steps = sorted((self.folder / SAMPLES).glob("step-*"))
        names = self.names()
        columns = {
            f"step {int(step.name[5:])}": [step / name for name in names]
            for step in steps
            if all((step / name).is_file() for name in names)
        }
        save_image(contact_sheet(columns, [prompt.prompt for prompt in self.prompts]), self.folder / SHEET)
