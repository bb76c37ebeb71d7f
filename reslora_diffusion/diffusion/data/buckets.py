"""Aspect-ratio buckets: each image is trained at the size whose shape is nearest to its own.

A bucket is (width, height). "auto" makes all sizes of at most resolution^2 pixels between 2:5 and 5:2 whose sides are
multiples of the smallest image that the model can be given. With `min_bucket_reso`, `max_bucket_reso` or
`bucket_reso_steps` the sides are those multiples of the step that lie between the two, whatever the shape, as in
kohya's scripts; with `bucket_no_upscale` the bucket of an image is its own size, made smaller if it has more pixels
than the largest bucket, and cut to multiples of the step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ...utils.problems import BadInput

Size = tuple[int, int]
LEAST_SIDE, STEP = 256, 64  # of kohya's buckets, where one of their limits is given and the others are not
KOHYA_LIMITS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")


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


@dataclass(frozen=True)
class Buckets:
    """The sizes that images are trained at.

    Attributes:
        sizes: of the buckets; empty with `no_upscale`, where each image has its own.
        no_upscale: the step of sides, if no image is enlarged.
        area: pixels that an image may have, with `no_upscale`.
        smallest: side that a model can be given at least, with `no_upscale`.
    """

    sizes: tuple[Size, ...]
    no_upscale: int | None = None
    area: int = 0
    smallest: int = 1

    def of(self, size: Size) -> Size:
        """The bucket of an image of this size."""
        if self.no_upscale is None:
            return nearest(size, self.sizes)
        scale = min(1.0, math.sqrt(self.area / (size[0] * size[1])))
        width, height = (max(int(side * scale) // self.no_upscale * self.no_upscale, self.smallest) for side in size)
        return width, height

    def all(self, sizes: Iterable[Size]) -> list[Size]:
        """Buckets that there can be, of images of these sizes."""
        return [*self.sizes] if self.no_upscale is None else sorted({self.of(size) for size in sizes})


def auto_buckets(resolution: int, step: int) -> list[Size]:
    """Square first, then by width. Every width has the largest height that fits."""
    buckets = {(resolution, resolution)}
    for width in range(step, 2 * resolution, step):
        height = resolution**2 // width // step * step
        if height and 0.4 <= width / height <= 2.5:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets, key=lambda size: (size[0] != size[1], size))


def limited_buckets(area: int, least: int, most: int, step: int) -> list[Size]:
    """Square first, then by width: sides of `least`, `least + step`, ... with the largest other side that `area` pixels
    and `most` allow."""
    square = math.isqrt(area) // step * step
    buckets = {(square, square)} if square else set()
    for width in range(least, most + 1, step):
        height = min(most, area // width // step * step)
        if height >= least:
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


def make_buckets(
    text: str | None,
    resolution: int,
    grid: Grid,
    *,
    min_bucket_reso: int | None = None,
    max_bucket_reso: int | None = None,
    bucket_reso_steps: int | None = None,
    bucket_no_upscale: bool = False,
) -> Buckets:
    """The buckets that the options of these names ask for; raises `BadInput` with every one that does not fit."""
    if text is None:
        return Buckets(((resolution, resolution),))
    limits = min_bucket_reso, max_bucket_reso, bucket_reso_steps
    if text != "auto" or not (bucket_no_upscale or any(limits)):
        return Buckets(tuple(parse_buckets(text, resolution, grid)))
    least, most = min_bucket_reso or min(LEAST_SIDE, resolution), max_bucket_reso or 2 * resolution
    step = bucket_reso_steps or max(STEP, grid.smallest)
    problems = [
        f"--{name}: got {value}, wanted {grid}"
        for name, value in zip(KOHYA_LIMITS, limits, strict=True)
        if value and (value % grid.step or value < grid.smallest)
    ]
    if least > most:
        problems.append(f"--min_bucket_reso and --max_bucket_reso: got {least} and {most}, wanted the first below")
    if problems:
        raise BadInput(problems)
    if bucket_no_upscale:
        return Buckets((), step, resolution**2, max(step, grid.smallest))
    sizes = [size for size in limited_buckets(resolution**2, least, most, step) if max(size) <= grid.largest]
    if not sizes:
        raise BadInput([f"sides from {least} to {most} (--min_bucket_reso, --max_bucket_reso) allow no {resolution}^2"])
    return Buckets(tuple(sizes))


def nearest(size: Size, buckets: Iterable[Size]) -> Size:
    """The bucket of the most similar shape; of equally similar ones the first."""
    shape = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - shape))
