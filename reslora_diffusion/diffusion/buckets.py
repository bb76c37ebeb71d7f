"""Aspect-ratio buckets: each picture is trained at the size whose shape is nearest to its own.

A bucket is (width, height). "auto" makes all sizes of at most resolution^2 pixels between 2:5 and 5:2 whose sides are
multiples of `step`, the coarsest grid of the UNet in pixels.
"""

import math

from ..problems import BadInput

Size = tuple[int, int]


def auto_buckets(resolution: int, step: int) -> list[Size]:
    """Square first, then by width. Every width has the largest height that fits."""
    buckets = {(resolution, resolution)}
    for width in range(step, 2 * resolution, step):
        height = resolution**2 // width // step * step
        if height and 0.4 <= width / height <= 2.5:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets, key=lambda size: (size[0] != size[1], size))


def parse_buckets(text: str, resolution: int, step: int) -> list[Size]:
    """`auto`, or "height,width;height,width" as in diffusers' scripts; raises `BadInput`."""
    if text == "auto":
        return auto_buckets(resolution, step)
    try:
        buckets = [(int(w), int(h)) for h, w in (pair.split(",") for pair in text.strip("; ").split(";"))]
    except ValueError:
        raise BadInput([f"--aspect_ratio_buckets: got {text!r}, wanted auto or 'height,width;height,width'"]) from None
    wrong = [f"{h},{w}" for w, h in buckets if w < step or h < step or w % 8 or h % 8]
    if wrong:
        raise BadInput(
            [f"--aspect_ratio_buckets: got {'; '.join(wrong)}, wanted multiples of 8 that are at least {step}"]
        )
    return buckets


def nearest(size: Size, buckets: list[Size]) -> Size:
    """The bucket of the most similar shape; of equally similar ones the first."""
    shape = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - shape))
