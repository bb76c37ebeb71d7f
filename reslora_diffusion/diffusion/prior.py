"""Pictures of the class, made by the untouched model, only as many as are missing."""

import hashlib
from pathlib import Path

from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from .cache import batched
from .randomness import Stream, generator
from .sheet import save_picture


def generate_class_pictures(
    pipeline: StableDiffusionPipeline,
    folder: Path,
    prompt: str,
    numbers: range,
    *,
    seed: int,
    resolution: int,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    progress: bool = True,
) -> None:
    """Write picture n of the class for each n of `numbers`; each is a function of (seed, n), whatever the batch."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=len(numbers), desc="class pictures", unit="picture", disable=not progress) as bar:
        for some in batched(numbers, batch_size):
            images = pipeline(
                [prompt] * len(some),
                height=resolution,
                width=resolution,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[generator(seed, Stream.CLASS_PICTURE, n) for n in some],
            ).images
            for n, image in zip(some, images, strict=True):
                digest = hashlib.sha256(image.tobytes()).hexdigest()[:12]
                save_picture(image, folder / f"{n:04d}-{digest}.png")
            bar.update(len(some))
