"""Validation: images of fixed prompts from fixed seeds, and the loss on fixed noise.

Images are generated inside `Adapters.merged()`, by the live models and the base's own sampler: they show what would be
exported, and there is no second copy of the model.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..data.sampling import Batch
from ..models.adapters import Adapters
from ..models.families import Family, Texts, Tokens
from ..objective.loss import Denoiser
from ..objective.randomness import Stream, generator
from .sheet import contact_sheet, save_image

SAMPLES = "samples"
SHEET = "samples.png"


@torch.no_grad()
def fixed_noise_loss(denoiser: Denoiser, batches: Sequence[Batch]) -> float:
    """Mean loss over batches whose noise and timesteps never change."""
    return torch.cat([denoiser.losses(batch) for batch in batches]).mean().item()


@dataclass
class ValidationImages:
    """Generates images of the validation prompts. Frozen text encoders encode them once and can then be freed."""

    pipeline: DiffusionPipeline
    family: Family
    prompts: list[str]
    num_images: int
    resolution: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    text_is_frozen: bool
    folder: Path
    tokens: Tokens | None
    texts: list[Texts] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.wanted and self.text_is_frozen:
            self.texts = self.encode()

    @property
    def wanted(self) -> bool:
        return bool(self.prompts) and self.num_images > 0

    @torch.no_grad()
    def encode(self) -> list[Texts]:
        """The empty prompt and the validation prompts, as the text encoders see them now: one by one as a pipeline
        does it, because in one batch their last bits may come out differently."""
        assert self.tokens is not None, "there are prompts to generate images of"
        encoders = self.family.text_encoders_of(self.pipeline)
        each = zip(*(part.split(1) for part in self.tokens if part is not None), strict=True)
        return [self.family.encode(encoders, Tokens(*parts)) for parts in each]

    def generate(self, adapters: Adapters) -> list[Image.Image]:
        """Images of every prompt, in order."""
        self.pipeline.vae.to(self.family.denoiser_of(self.pipeline).device)
        images = []
        with adapters.evaluation(), adapters.merged():
            negative, *prompts = self.texts or self.encode()
            for prompt in prompts:
                for n in range(self.num_images):
                    images += self.pipeline(
                        **self.family.pipeline_inputs(self.pipeline, prompt, negative),
                        height=self.resolution,
                        width=self.resolution,
                        num_inference_steps=self.num_inference_steps,
                        guidance_scale=self.guidance_scale,
                        generator=generator(self.seed, Stream.VALIDATION, n),
                    ).images
        self.pipeline.vae.to("cpu")
        return images

    def save(self, images: list[Image.Image], step: int) -> None:
        """Write images to `samples/`, and make the sheet of all steps anew."""
        folder = self.folder / SAMPLES / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for n, image in enumerate(images):
            save_image(image, folder / f"{n // self.num_images}-{n % self.num_images}.png")
        self.write_sheet()

    def forget_after(self, step: int) -> None:
        """Remove images of later steps, which an earlier or interrupted run left behind."""
        for folder in (self.folder / SAMPLES).glob("step-*"):
            if int(folder.name[5:]) > step or step == 0:
                shutil.rmtree(folder)

    def write_sheet(self) -> None:
        """A column for each step, a row for each image."""
        steps = sorted((self.folder / SAMPLES).glob("step-*"))
        names = [f"{p}-{n}.png" for p in range(len(self.prompts)) for n in range(self.num_images)]
        columns = {
            f"step {int(step.name[5:])}": [step / name for name in names]
            for step in steps
            if all((step / name).is_file() for name in names)
        }
        rows = [prompt for prompt in self.prompts for _ in range(self.num_images)]
        save_image(contact_sheet(columns, rows), self.folder / SHEET)
