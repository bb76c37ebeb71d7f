"""Images and prompts, encoded once.

An `Example` holds an image's latent distribution and its prompt in one record: neither can be paired with another's.
An example stores the mean and log-variance that the autoencoder gives for each view (crop, flip), not one sample of
them: every step draws anew,

    latents = scaling_factor * (mean + exp(logvar / 2) * noise - shift_factor)

A frozen text encoder is applied once; for one that is trained, an example holds tokens. Equal prompts share a tensor.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..models.families import Texts, Tokens
from ..objective.randomness import Stream, generator
from .buckets import Buckets, Size
from .disk_cache import DiskCache
from .scan import ScannedImage, covering, crop_corners, open_mask, open_upright

Text = Texts | Tokens  # of one prompt, so without the first dimension


@dataclass(frozen=True)
class Example:
    """One image and its prompt, of one concept. `texts` holds the orders of its tags; mostly there is one.

    Shapes: mean, logvar [views, C, h, w]; mask [views, 1, h, w]; time_ids [views, 6].
    """

    name: str
    mean: Tensor
    logvar: Tensor
    texts: Mapping[str, Text]
    loss_weight: float
    time_ids: Tensor
    mask: Tensor | None = None
    concept: int = 0

    @property
    def shape(self) -> torch.Size:
        """The shape of the latents."""
        return self.mean.shape[1:]


class Pixels(NamedTuple):
    """The views of an image, not yet encoded.

    pixels [views, 3, H, W] in -1..1, mask [views, 1, h, w] in 0..1, time_ids [views, 6].
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    time_ids: np.ndarray


@dataclass(frozen=True)
class Views:
    """Which parts of an image are cached: a function of the image alone, so that the cache serves runs of every
    seed, and adding an image to a folder changes nothing for the others.

    Args:
        buckets: sizes that are trained at.
        crops: random ones of each image that has room for them.
        vae_scale_factor: pixels to a latent, for masks.
    """

    buckets: Buckets
    interpolation: Image.Resampling
    center_crop: bool
    crops: int
    flip: bool
    vae_scale_factor: int = 8
    alpha_mask: bool = False

    def cut(self, image: ScannedImage) -> tuple[Size, Size, list[tuple[int, int]]]:
        """How an image is resized, and cut to which size at which corners."""
        box = self.buckets.of(image.size)
        size = covering(image.size, box)
        offsets = [(0.5, 0.5)]
        if not self.center_crop:
            content = int(image.digest[:16], 16)
            offsets = torch.rand(self.crops, 2, generator=generator(content, Stream.CROP)).tolist()
        return size, box, crop_corners(size, box, offsets)

    def key(self, image: ScannedImage) -> dict[str, Any]:
        """All that `of` depends on."""
        mask = hashlib.sha256(image.mask.read_bytes()).hexdigest() if image.mask else self.alpha_mask
        cut, flip = self.cut(image), self.flip
        colour = {"colour": "sRGB"} if image.profile or image.colour_fault else {}
        return {
            "image": image.digest,
            "mask": mask,
            "cut": cut,
            "flip": flip,
            "by": self.interpolation.name,
        } | colour

    def of(self, image: ScannedImage) -> Pixels:
        """Read the file, resize and crop it."""
        size, box, corners = self.cut(image)
        resized = open_upright(image.path).resize(size, self.interpolation)
        parts = [resized.crop((x, y, x + box[0], y + box[1])) for x, y in corners]
        mask = open_mask(image, self.alpha_mask)
        masks = self.masks_of(mask.resize(size, self.interpolation), corners, box) if mask else None
        width, height = image.size
        time_ids: np.ndarray = np.array([(height, width, y, x, box[1], box[0]) for x, y in corners], np.float32)
        pixels: np.ndarray = (
            np.stack([np.asarray(part) for part in parts]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        )
        if self.flip:
            pixels = np.concatenate([pixels, pixels[..., ::-1]])
            masks = None if masks is None else np.concatenate([masks, masks[..., ::-1]])
            time_ids = np.concatenate([time_ids, time_ids])
        return Pixels(pixels, masks, time_ids)

    def masks_of(self, mask: Image.Image, corners: list[tuple[int, int]], box: Size) -> np.ndarray:
        """A cell of a latent counts by the share of its pixels that count."""
        cells = (box[0] // self.vae_scale_factor, box[1] // self.vae_scale_factor)
        parts = [mask.crop((x, y, x + box[0], y + box[1])).resize(cells, Image.Resampling.BOX) for x, y in corners]
        return np.stack([np.asarray(part) for part in parts])[:, None].astype(np.float32) / 255


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL,
    images: list[ScannedImage],
    views: Views,
    *,
    prompt: str | None,
    texts: Mapping[str, Mapping[str, Text]],
    loss_weight: float = 1.0,
    concept: int = 0,
    batch_size: int = 4,
    threads: int = 0,
    progress: str | None = None,
    cache: DiskCache | None = None,
    vae_identity: str = "",
) -> list[Example]:
    """Examples of images, in their order.

    Args:
        vae: in the precision to encode with.
        prompt: of images without a caption.
        texts: for each prompt the orders of its tags, and what the training step needs of them.
        batch_size: views that the autoencoder sees at once.
        threads: that decode images.
        progress: title of the progress bar; none if None.
        cache: read before anything is encoded, and written to afterwards.
        vae_identity: identifies `vae` in the keys of `cache`.
    """
    examples = []

    def read(image: ScannedImage) -> tuple[dict[str, Any], dict[str, Tensor] | None, Pixels | None]:
        """Its key in the cache; its encoded views if the cache has them, else its pixels."""
        key = {"kind": "latents", "vae": vae_identity, "cell": views.vae_scale_factor, **views.key(image)}
        found = cache.load(key) if cache else None
        return key, found, views.of(image) if found is None else None

    with (
        ThreadPoolExecutor(max(1, threads)) as pool,
        tqdm(total=len(images), desc=progress, unit="image", disable=progress is None) as bar,
    ):
        for some in batched(images, batch_size * max(1, threads)):
            for image, (key, found, pixels) in zip(some, pool.map(read, some), strict=True):
                if found is None:
                    assert pixels is not None, "they are read where the cache has nothing"
                    found = encode(vae, pixels, batch_size)
                    if cache:
                        cache.store(key, found)
                examples.append(
                    Example(
                        name=image.path.name,
                        texts=texts[str(image.caption or prompt)],
                        loss_weight=loss_weight,
                        concept=concept,
                        **{name: value.to(vae.device) for name, value in found.items()},
                    )
                )
                bar.update()
    return examples


def encode(vae: AutoencoderKL, views: Pixels, batch_size: int) -> dict[str, Tensor]:
    """The tensors of an `Example`."""
    parts = torch.from_numpy(views.pixels).split(batch_size)
    moments = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist for part in parts]
    tensors = {name: torch.cat([getattr(m, name) for m in moments]).float() for name in ("mean", "logvar")}
    tensors["time_ids"] = torch.from_numpy(views.time_ids)
    return tensors if views.mask is None else tensors | {"mask": torch.from_numpy(np.ascontiguousarray(views.mask))}


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some
