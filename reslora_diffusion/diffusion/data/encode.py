"""Pictures and prompts, encoded once.

An `Example` holds a picture's latent distribution and its prompt in one record: neither can be paired with another's.
What is kept of the autoencoder is the distribution, mean and log-variance of each view (crop, flip), not one sample
of it: every step draws anew,

    latents = scaling_factor * (mean + exp(logvar / 2) * noise - shift_factor)

The text is kept encoded while the text encoder is frozen, else as tokens. Equal prompts share one tensor.
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
from .buckets import Size, nearest
from .disk_cache import DiskCache
from .scan import Picture, covering, crop_corners, open_mask, open_upright

Text = Texts | Tokens  # of one prompt, so without the first dimension


@dataclass(frozen=True)
class Example:
    """One picture and its prompt, of one concept. `texts` holds the orders of its tags; mostly there is one.

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


class Seen(NamedTuple):
    """Views of a picture: pixels [views, 3, H, W] in -1..1, mask [views, 1, h, w] in 0..1, time_ids [views, 6]."""

    pixels: np.ndarray
    mask: np.ndarray | None
    time_ids: np.ndarray


@dataclass(frozen=True)
class Views:
    """Which parts of a picture are cached: a function of the picture, so that what is kept serves runs of every seed,
    and a picture that joins others leaves theirs as they are.

    Args:
        buckets: sizes that are trained at.
        crops: random ones of each picture that has room for them.
        vae_scale_factor: pixels to a latent, for masks.
    """

    buckets: list[Size]
    interpolation: Image.Resampling
    center_crop: bool
    crops: int
    flip: bool
    vae_scale_factor: int = 8
    alpha_mask: bool = False

    def cut(self, picture: Picture) -> tuple[Size, Size, list[tuple[int, int]]]:
        """How a picture is resized, and cut to which size at which corners."""
        box = nearest(picture.size, self.buckets)
        size = covering(picture.size, box)
        offsets = [(0.5, 0.5)]
        if not self.center_crop:
            content = int(picture.digest[:16], 16)
            offsets = torch.rand(self.crops, 2, generator=generator(content, Stream.CROP)).tolist()
        return size, box, crop_corners(size, box, offsets)

    def key(self, picture: Picture) -> dict[str, Any]:
        """All that `of` depends on."""
        mask = hashlib.sha256(picture.mask.read_bytes()).hexdigest() if picture.mask else self.alpha_mask
        cut, flip = self.cut(picture), self.flip
        colour = {"colour": "sRGB"} if picture.profile or picture.colour_fault else {}
        return {
            "picture": picture.digest,
            "mask": mask,
            "cut": cut,
            "flip": flip,
            "by": self.interpolation.name,
        } | colour

    def of(self, picture: Picture) -> Seen:
        size, box, corners = self.cut(picture)
        image = open_upright(picture.path).resize(size, self.interpolation)
        parts = [image.crop((x, y, x + box[0], y + box[1])) for x, y in corners]
        mask = open_mask(picture, self.alpha_mask)
        masks = self.masks_of(mask.resize(size, self.interpolation), corners, box) if mask else None
        width, height = picture.size
        time_ids: np.ndarray = np.array([(height, width, y, x, box[1], box[0]) for x, y in corners], np.float32)
        pixels: np.ndarray = (
            np.stack([np.asarray(part) for part in parts]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        )
        if self.flip:
            pixels = np.concatenate([pixels, pixels[..., ::-1]])
            masks = None if masks is None else np.concatenate([masks, masks[..., ::-1]])
            time_ids = np.concatenate([time_ids, time_ids])
        return Seen(pixels, masks, time_ids)

    def masks_of(self, mask: Image.Image, corners: list[tuple[int, int]], box: Size) -> np.ndarray:
        """A cell of a latent counts by the share of its pixels that count."""
        cells = (box[0] // self.vae_scale_factor, box[1] // self.vae_scale_factor)
        parts = [mask.crop((x, y, x + box[0], y + box[1])).resize(cells, Image.Resampling.BOX) for x, y in corners]
        return np.stack([np.asarray(part) for part in parts])[:, None].astype(np.float32) / 255


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL,
    pictures: list[Picture],
    views: Views,
    *,
    prompt: str | None,
    texts: Mapping[str, Mapping[str, Text]],
    loss_weight: float = 1.0,
    concept: int = 0,
    batch_size: int = 4,
    threads: int = 0,
    progress: str | None = None,
    kept: DiskCache | None = None,
    vae_identity: str = "",
) -> list[Example]:
    """Examples of pictures, in their order.

    Args:
        vae: in the precision to encode with.
        prompt: of pictures without a caption.
        texts: for each prompt the orders of its tags, and what the training step needs of them.
        batch_size: views that the autoencoder sees at once.
        threads: that decode pictures.
        progress: title of the progress bar; none if None.
        kept: where encoded pictures are looked for first, and kept.
        vae_identity: of `vae`, for `kept`.
    """
    examples = []

    def look(picture: Picture) -> tuple[dict[str, Any], dict[str, Tensor] | None, Seen | None]:
        """Key of a picture, its encoded views if they are kept, else the views."""
        key = {"kind": "latents", "vae": vae_identity, "cell": views.vae_scale_factor, **views.key(picture)}
        found = kept.load(key) if kept else None
        return key, found, views.of(picture) if found is None else None

    with (
        ThreadPoolExecutor(max(1, threads)) as pool,
        tqdm(total=len(pictures), desc=progress, unit="picture", disable=progress is None) as bar,
    ):
        for some in batched(pictures, batch_size * max(1, threads)):
            for picture, (key, found, seen) in zip(some, pool.map(look, some), strict=True):
                if found is None:
                    assert seen is not None, "what is not kept was looked at"
                    found = encode(vae, seen, batch_size)
                    if kept:
                        kept.store(key, found)
                examples.append(
                    Example(
                        name=picture.path.name,
                        texts=texts[str(picture.caption or prompt)],
                        loss_weight=loss_weight,
                        concept=concept,
                        **{name: value.to(vae.device) for name, value in found.items()},
                    )
                )
                bar.update()
    return examples


def encode(vae: AutoencoderKL, seen: Seen, batch_size: int) -> dict[str, Tensor]:
    """What an `Example` holds of a picture's views."""
    parts = torch.from_numpy(seen.pixels).split(batch_size)
    moments = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist for part in parts]
    tensors = {name: torch.cat([getattr(m, name) for m in moments]).float() for name in ("mean", "logvar")}
    tensors["time_ids"] = torch.from_numpy(seen.time_ids)
    return tensors if seen.mask is None else tensors | {"mask": torch.from_numpy(np.ascontiguousarray(seen.mask))}


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some
