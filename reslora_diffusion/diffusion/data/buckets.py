"""Aspect-ratio buckets: each image is trained at the size whose shape is nearest to its own.

A bucket is (width, height). "auto" makes all sizes of at most resolution^2 pixels between 2:5 and 5:2 whose sides are
multiples of the smallest image that the model can be given.
"""

import math
from typing import NamedTuple

from ...utils.problems import BadInput

Size = tuple[int, int]


class Grid(NamedTuple):
    """Sides of images that a model can be given, in pixels: multiples of `step` from `smallest` to `largest`."""

    step: int
    smallest: int
    largest: float = math.inf

    def fits(self, side: int) -> bool:
        return side % self.step == 0 and self.smallest <= side <= self.largest

    def __str__(self) -> str:
        most = "" if self.largest == math.inf else f" and at most {self.largest}"
        return f"a multiple of {self.step} that is at least {self.smallest}{most}"


def auto_buckets(resolution: int, step: int) -> list[Size]:
    """Square first, then by width. Every width has the largest height that fits."""
    buckets = {(resolution, resolution)}
    for width in range(step, 2 * resolution, step):
        height = resolution**2 // width // step * step
        if height and 0.4 <= width / height <= 2.5:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets, key=lambda size: (size[0] != size[1], size))


def parse_buckets(text: str, resolution: int, grid: Grid) -> list[Size]:
    """`auto`, or "height,width;height,width" as in diffusers' scripts; raises `BadInput`."""
    if text == "auto":
        return [size for size in auto_buckets(resolution, grid.smallest) if max(size) <= grid.largest]
    try:
        buckets = [(int(w), int(h)) for h, w in (pair.split(",") for pair in text.strip("; ").split(";"))]
    except ValueError:
        raise BadInput([f"--aspect_ratio_buckets: got {text!r}, wanted auto or 'height,width;height,width'"]) from None
    if wrong := [f"{h},{w}" for w, h in buckets if not (grid.fits(w) and grid.fits(h))]:
        raise BadInput([f"--aspect_ratio_buckets: got {'; '.join(wrong)}, wanted each side {grid}"])
    return buckets


def nearest(size: Size, buckets: list[Size]) -> Size:
    """The bucket of the most similar shape; of equally similar ones the first."""
    shape = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - shape))
