"""Seeing what was learned: pictures of fixed prompts from fixed seeds, and the loss on fixed noise.

Pictures are painted inside `Adapters.merged()`, by the live models and the base's own sampler: they show what would be
exported, and there is no second copy of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .adapters import Adapters
from .loss import Denoiser
from .randomness import Stream, generator
from .sampling import Batch
from .text import encode_prompts

SAMPLES = "samples"
SHEET = "samples.png"


@torch.no_grad()
def fixed_noise_loss(denoiser: Denoiser, batches: Sequence[Batch]) -> float:
    """Mean loss over batches whose noise and timesteps never change."""
    return torch.cat([denoiser.losses(batch) for batch in batches]).mean().item()


@dataclass
class Painter:
    """Paints the validation prompts. With a frozen text encoder they are encoded once, and it can be released."""

    pipeline: StableDiffusionPipeline
    prompts: list[str]
    num_images: int
    resolution: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    text_is_frozen: bool
    folder: Path
    embedded: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompts and self.text_is_frozen:
            texts = ["", *self.prompts]
            hidden = encode_prompts(self.pipeline.tokenizer, self.pipeline.text_encoder, texts)
            self.embedded = dict(zip(texts, hidden, strict=True))

    def conditions(self, prompt: str) -> dict[str, str | Tensor]:
        if not self.text_is_frozen:
            return {"prompt": prompt}
        return {"prompt_embeds": self.embedded[prompt][None], "negative_prompt_embeds": self.embedded[""][None]}

    def paint(self, adapters: Adapters, step: int) -> list[Image.Image]:
        """Pictures of every prompt, in order; also written to `samples/`, and the sheet of all steps made anew."""
        device = self.pipeline.unet.device
        self.pipeline.vae.to(device)
        images = []
        with adapters.evaluation(), adapters.merged():
            for prompt in self.prompts:
                for n in range(self.num_images):
                    images += self.pipeline(
                        **self.conditions(prompt),
                        height=self.resolution,
                        width=self.resolution,
                        num_inference_steps=self.num_inference_steps,
                        guidance_scale=self.guidance_scale,
                        generator=generator(self.seed, Stream.VALIDATION, n),
                    ).images
        self.pipeline.vae.to("cpu")
        folder = self.folder / SAMPLES / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for n, image in enumerate(images):
            image.save(folder / f"{n // self.num_images}-{n % self.num_images}.png")
        self.write_sheet()
        return images

    def write_sheet(self) -> None:
        """A column for each step, a row for each picture."""
        steps = sorted((self.folder / SAMPLES).glob("step-*"))
        names = [f"{p}-{n}.png" for p in range(len(self.prompts)) for n in range(self.num_images)]
        columns = {f"step {int(step.name[5:])}": [Image.open(step / name) for name in names] for step in steps}
        rows = [prompt for prompt in self.prompts for _ in range(self.num_images)]
        sheet = contact_sheet(columns, rows)
        fresh = self.folder / f".{SHEET}"
        sheet.save(fresh, format="PNG")
        fresh.replace(self.folder / SHEET)


def contact_sheet(columns: dict[str, list[Image.Image]], rows: list[str], side: int = 160) -> Image.Image:
    """Labelled pictures; equal row labels in a row are written once."""
    margin, head, font = 8, 28, ImageFont.load_default(14)
    left = 190
    sheet = Image.new("RGB", (left + len(columns) * (side + margin), head + len(rows) * (side + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, label in enumerate(rows):
        if y == 0 or rows[y - 1] != label:
            lines = "\n".join(wrapped(label, left - 2 * margin, font))
            draw.multiline_text((margin, head + y * (side + margin)), lines, fill="black", font=font)
    for x, (label, images) in enumerate(columns.items()):
        corner = left + x * (side + margin)
        draw.text((corner, margin), label, fill="black", font=font)
        for y, image in enumerate(images):
            sheet.paste(image.convert("RGB").resize((side, side)), (corner, head + y * (side + margin)))
    return sheet


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
