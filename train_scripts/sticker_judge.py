"""A judge for stickers that knows no neural network.

A sticker is judged in independent ways:

    background   the median colour of the one-pixel border, assigned to the nearest of the caption colours
    subject      the figure is cut out of that background (pixels further than THRESHOLD from it), its bounding box
                 is stretched to 16 x 16, and the cut-out (RGB over gray, plus the mask) is compared by mean squared
                 distance with the cut-outs of every subject's template on every background colour

    layout       the size and the middle of the figure's bounding box; of a pair, the subject of each half
    sharpness    the mean size of the image's gradient; to be compared with that of drawn stickers

Stretching the bounding box makes the feature blind to place and size, so nothing is compared "at a fixed place".
`ceiling()` says how often the judge is right about real drawings: no model can be measured above it.
"""

import functools
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sticker_data import BACKGROUNDS, HELD_OUT, RESOLUTION, draw, draw_at_random, subjects

THRESHOLD = 0.14  # distance in RGB, each channel in [0, 1]
FEATURE_SIDE = 16


def border_colour(image: Image.Image) -> np.ndarray:
    """[3] in [0, 1]: median of the one-pixel border."""
    x = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    border = np.concatenate([x[0], x[-1], x[1:-1, 0], x[1:-1, -1]])
    return np.median(border, axis=0)


def judge_background(image: Image.Image) -> str:
    """The caption colour nearest to the border's."""
    palette = np.array(list(BACKGROUNDS.values()), dtype=np.float32) / 255
    return list(BACKGROUNDS)[int(((palette - border_colour(image)) ** 2).sum(1).argmin())]


def figure(image: Image.Image) -> tuple[np.ndarray, tuple[slice, slice] | None]:
    """The figure's mask, [H, W] of 0 and 1, and its bounding box in rows and columns; None if there is no figure."""
    x = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    mask = (np.linalg.norm(x - border_colour(image), axis=-1) > THRESHOLD).astype(np.float32)
    rows, columns = (np.flatnonzero(mask.sum(axis) >= 2) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return mask, None
    return mask, (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))


def feature(image: Image.Image) -> np.ndarray:
    """[16 * 16 * 4]: the figure's cut-out, blind to its place and size."""
    x = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    mask, box = figure(image)
    if box is None:
        return np.zeros(FEATURE_SIDE * FEATURE_SIDE * 4, dtype=np.float32)
    cut_out = np.concatenate([x * mask[..., None] + 0.5 * (1 - mask[..., None]), mask[..., None]], axis=-1)[box]
    planes = [Image.fromarray(cut_out[..., i]) for i in range(4)]
    size = (FEATURE_SIDE, FEATURE_SIDE)
    return np.stack([np.asarray(p.resize(size, Image.Resampling.BOX)) for p in planes], axis=-1).reshape(-1)


def known(held_out: bool) -> dict[str, str]:
    """Name -> emoji of every training subject, and of the held-out ones if asked."""
    return {s.name: s.emoji for s in subjects()} | {name: HELD_OUT[name][0] for name in HELD_OUT if held_out}


@functools.cache
def templates(held_out: bool = False) -> tuple[np.ndarray, list[str]]:
    """Features of every subject, drawn in the middle at 75 % on every background: [N, 1024], names."""
    rows, names = [], []
    for name, emoji in known(held_out).items():
        for colour in BACKGROUNDS.values():
            rows.append(feature(draw(emoji, colour, 0.75, (0.5, 0.5), RESOLUTION)))
            names.append(name)
    return np.stack(rows), names


def judge_subject(image: Image.Image, held_out: bool = False) -> str:
    """The name of the subject whose template is nearest, among the training subjects and, if asked, the held-out."""
    features, names = templates(held_out)
    return names[int(((features - feature(image)) ** 2).mean(1).argmin())]


def judge_layout(image: Image.Image, layout: str, names: Sequence[str]) -> bool:
    """Return whether size and place of the figure are the layout's; for a pair, whether each half has its subject."""
    if layout == "pair":
        middle = image.width // 2
        halves = (image.crop((0, 0, middle, image.height)), image.crop((middle, 0, image.width, image.height)))
        return [judge_subject(half) for half in halves] == list(names)
    _, box = figure(image)
    if box is None:
        return False
    rows, columns = box
    size = max(rows.stop - rows.start, columns.stop - columns.start) / image.width
    middle = (columns.start + columns.stop) / 2 / image.width
    return {
        "plain": 0.52 < size,
        "small": size < 0.52,
        "large": 0.82 < size,
        "left": middle < 0.42,
        "right": middle > 0.58,
    }[layout]


def sharpness(images: Sequence[Image.Image]) -> float:
    """Mean of |d/dx| + |d/dy| of all pixels, in shares of the range of a channel."""
    x = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]) / 255
    return float(np.abs(np.diff(x, axis=1)).mean() + np.abs(np.diff(x, axis=2)).mean())


def ceiling(count: int = 4, seed: int = 0) -> dict[str, float]:
    """Return how often the judge is right about real drawings at random sizes and places, `count` for each subject."""
    rng = random.Random(seed)
    right_subject = right_colour = total = 0
    for subject in subjects():
        for _ in range(count):
            colour = rng.choice(list(BACKGROUNDS))
            image = draw_at_random(subject.emoji, BACKGROUNDS[colour], rng)
            right_subject += judge_subject(image) == subject.name
            right_colour += judge_background(image) == colour
            total += 1
    return {"subject": right_subject / total, "background": right_colour / total, "images": total}
