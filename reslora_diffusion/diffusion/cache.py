"""Pictures and prompts, encoded once.

An `Example` holds a picture's latent distribution and its prompt in one record, so neither can be paired with another's.
What is kept of the autoencoder is the distribution, mean and log-variance of each view (crop, flip), not one sample
of it: every step draws anew,

    latents = scaling_factor * (mean + exp(logvar / 2) * noise)

The text is kept as hidden states while the text encoder is frozen, else as token ids. Equal prompts share one tensor.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .data import Picture, crop_boxes, open_upright, resized
from .randomness import Stream, generator


@dataclass(frozen=True)
class Example:
    """One picture and its prompt. Shapes: mean, logvar [views, C, h, w]; text [L, D] or token ids [L]."""

    name: str
    prompt: str
    mean: Tensor
    logvar: Tensor
    text: Tensor
    loss_weight: float

    def latents(self, view: int, noise: Tensor) -> Tensor:
        """A sample of the unscaled latent distribution [C, h, w]."""
        return self.mean[view] + torch.exp(0.5 * self.logvar[view]) * noise


@dataclass(frozen=True)
class Views:
    """Which squares of a picture are cached."""

    resolution: int
    interpolation: Image.Resampling
    center_crop: bool
    crops: int
    flip: bool
    seed: int

    def of(self, index: int, image: Image.Image) -> np.ndarray:
        """Pixels [views, 3, resolution, resolution] in -1..1; crops are a function of (seed, index)."""
        image = resized(image, self.resolution, self.interpolation)
        offsets = [(0.5, 0.5)]
        if not self.center_crop:
            offsets = torch.rand(self.crops, 2, generator=generator(self.seed, Stream.CROP, index)).tolist()
        squares = [np.asarray(image.crop(box)) for box in crop_boxes(image.size, self.resolution, offsets)]
        if self.flip:
            squares += [square[:, ::-1] for square in squares]
        return np.stack(squares).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL,
    pictures: list[Picture],
    views: Views,
    *,
    prompt: str | None,
    texts: dict[str, Tensor],
    loss_weight: float = 1.0,
    batch_size: int = 4,
    threads: int = 0,
    progress: str | None = None,
) -> list[Example]:
    """Examples of pictures, in their order.

    Args:
        vae: in the precision to encode with.
        prompt: of pictures without a caption.
        texts: what the training step needs of each prompt.
        batch_size: squares that the autoencoder sees at once.
        threads: that decode pictures.
        progress: title of the progress bar; none if None.
    """
    examples = []
    with (
        ThreadPoolExecutor(max(1, threads)) as pool,
        tqdm(total=len(pictures), desc=progress, unit="picture", disable=progress is None) as bar,
    ):
        for some in batched(enumerate(pictures), batch_size * max(1, threads)):
            squares = list(pool.map(lambda item: views.of(item[0], open_upright(item[1].path)), some))
            pixels = torch.from_numpy(np.concatenate(squares)).to(vae.device, vae.dtype)
            moments = [vae.encode(part).latent_dist for part in pixels.split(batch_size)]
            counts = [len(of_picture) for of_picture in squares]
            means = torch.cat([m.mean for m in moments]).float().split(counts)
            logvars = torch.cat([m.logvar for m in moments]).float().split(counts)
            for (_, picture), mean, logvar in zip(some, means, logvars, strict=True):
                caption = picture.caption or prompt
                examples.append(Example(picture.path.name, caption, mean, logvar, texts[caption], loss_weight))
            bar.update(len(some))
    return examples


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some
