"""Images are resized and cropped here, before they are encoded.

An image of size (w, h) is trained at the size of its bucket, `box`. It is resized to the smallest size of its own shape
that covers the box (`covering`), and the box is cut out in the middle, or at random corners (`crop_corners`):

    image (w, h)  ->  upright sRGB  ->  resized, covers box  ->  crops [views, 3, H, W] in -1..1, and mirrored ones

The mask of an image is resized and cropped alike. `time_ids` are the numbers that SDXL reads for a crop: the size of
the image, the upper left corner, and the size of the box.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..objective.randomness import Stream, generator
from .buckets import Buckets, Size
from .scan import ScannedImage, open_mask, open_upright


class Pixels(NamedTuple):
    """The views of an image, not yet encoded.

    pixels [views, 3, H, W] in -1..1, mask [views, 1, h, w] in 0..1, time_ids [views, 6].
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    time_ids: np.ndarray


@dataclass(frozen=True)
class Views:
    """The crops of an image that are cached. They are a function of the image alone, so that the cache serves runs of
    every seed, and adding an image to a folder changes nothing for the others.

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
        """Return the size that an image is resized to, the size of its crops, and their upper left corners."""
        box = self.buckets.of(image.size)
        size = covering(image.size, box)
        offsets = [(0.5, 0.5)]
        if not self.center_crop:
            content = int(image.digest[:16], 16)
            offsets = torch.rand(self.crops, 2, generator=generator(content, Stream.CROP)).tolist()
        return size, box, crop_corners(size, box, offsets)

    def key(self, image: ScannedImage) -> dict[str, Any]:
        """Return everything that `of` depends on, for the cache."""
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
        """Read the file, resize and crop it, and mirror the crops if `flip` is set."""
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
        """Crop a mask to cells of latents; a cell counts by the share of its pixels that count."""
        cells = (box[0] // self.vae_scale_factor, box[1] // self.vae_scale_factor)
        parts = [mask.crop((x, y, x + box[0], y + box[1])).resize(cells, Image.Resampling.BOX) for x, y in corners]
        return np.stack([np.asarray(part) for part in parts])[:, None].astype(np.float32) / 255


def covering(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the same shape as `size` that covers `box`; all are (width, height)."""
    ratio = max(box[0] / size[0], box[1] / size[1])
    return max(box[0], round(size[0] * ratio)), max(box[1], round(size[1] * ratio))


def crop_corners(
    size: tuple[int, int], box: tuple[int, int], offsets: list[tuple[float, float]]
) -> list[tuple[int, int]]:
    """Upper left corners `(x, y)` for offsets in 0..1 of the room there is; equal corners once."""
    room = size[0] - box[0], size[1] - box[1]
    return list(dict.fromkeys((round(x * room[0]), round(y * room[1])) for x, y in offsets))
