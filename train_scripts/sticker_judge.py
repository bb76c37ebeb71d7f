"""A judge for stickers that knows no neural network.

A sticker is judged in two independent ways:

    background   the median colour of the one-pixel border, assigned to the nearest of the caption colours
    subject      the figure is cut out of that background (pixels further than THRESHOLD from it), its bounding box
                 is stretched to 16 x 16, and the cut-out (RGB over gray, plus the mask) is compared by mean squared
                 distance with the cut-outs of every subject's template on every background colour

Stretching the bounding box makes the feature blind to place and size, so nothing is compared "at a fixed place".
`ceiling()` says how often the judge is right about real drawings: no model can be measured above it.
"""

import functools
import random

import numpy as np
from PIL import Image

from sticker_data import BACKGROUNDS, RESOLUTION, draw, draw_at_random, subjects

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


def feature(image: Image.Image) -> np.ndarray:
    """[16 * 16 * 4]: the figure's cut-out, blind to its place and size."""
    x = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    mask = (np.linalg.norm(x - border_colour(image), axis=-1) > THRESHOLD).astype(np.float32)
    rows, columns = (np.flatnonzero(mask.sum(axis) >= 2) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return np.zeros(FEATURE_SIDE * FEATURE_SIDE * 4, dtype=np.float32)
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    cut_out = np.concatenate([x * mask[..., None] + 0.5 * (1 - mask[..., None]), mask[..., None]], axis=-1)[box]
    planes = [Image.fromarray(cut_out[..., i]) for i in range(4)]
    size = (FEATURE_SIDE, FEATURE_SIDE)
    return np.stack([np.asarray(p.resize(size, Image.Resampling.BOX)) for p in planes], axis=-1).reshape(-1)


@functools.cache
def templates() -> tuple[np.ndarray, list[str]]:
    """Features of every training subject, drawn in the middle at 75 % on every background: [N, 1024], names."""
    rows, names = [], []
    for subject in subjects():
        for colour in BACKGROUNDS.values():
            rows.append(feature(draw(subject.emoji, colour, 0.75, (0.5, 0.5), RESOLUTION)))
            names.append(subject.name)
    return np.stack(rows), names


def judge_subject(image: Image.Image) -> str:
    """The name of the training subject whose template is nearest."""
    features, names = templates()
    return names[int(((features - feature(image)) ** 2).mean(1).argmin())]


def ceiling(count: int = 4, seed: int = 0) -> dict[str, float]:
    """How often the judge is right about real drawings at random sizes and places, `count` of each subject."""
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
