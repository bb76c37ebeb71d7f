"""Subject likeness: how much of a subject is in an image, beyond a plain blob of its colour.

    cut-out     the figure on a plain ground: the pixels that are further than GROUND from the border's median colour,
                their bounding box stretched to 8 x 8; colour times mask, and half the mask
    likeness    1 - |image - reference|² / |best blob - reference|², at least 0, the best over the references

The best blob is the nearer of an ellipse and a box in the mean colour of the reference's figure. So 0 is what a blob of
the right colour in the right place gets, or less, and 1 the subject itself. It knows no names, no style and no other
side of a thing, and needs plain grounds: `references_problem` says where it does not apply, and then nothing is
measured. On the stickers of `assets/subjects` it puts the subject above its blurred copies, those above what training
has half learned, and other subjects, the class, blobs and noise below all of them (tests/test_app_likeness.py).
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

GROUND = 0.14  # distance in RGB: further from the ground's colour is figure
SIDE = 8
MASK_WEIGHT = 0.5  # of the outline against the colours
ALIKE = 0.5  # likeness of the references among themselves, below which the measure does not apply
PLAIN = 0.003  # distance to its best blob, below which a subject is one; 0.006 to 0.04 of stickers


def pixels(image: Image.Image) -> np.ndarray:
    """[height, width, 3] in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def ground(image: Image.Image) -> np.ndarray | None:
    """[3]: the median colour of the one-pixel border; None if less than half of the border has it."""
    x = pixels(image)
    border = np.concatenate([x[0], x[-1], x[1:-1, 0], x[1:-1, -1]])
    colour = np.median(border, axis=0)
    plain = np.linalg.norm(border - colour, axis=-1) <= GROUND
    return colour if plain.mean() >= 0.5 else None


def cut_out(image: Image.Image) -> np.ndarray | None:
    """[8, 8, 4]; None without a plain ground, or without a figure on it."""
    colour = ground(image)
    if colour is None:
        return None
    x = pixels(image)
    mask = (np.linalg.norm(x - colour, axis=-1) > GROUND).astype(np.float32)[..., None]
    ys, xs = (np.flatnonzero(mask.sum(axis=axis) >= 2) for axis in (1, 0))  # single pixels are no figure
    if not ys.size or not xs.size:
        return None
    planes = np.concatenate([(x - 0.5) * mask, MASK_WEIGHT * mask], axis=-1)
    planes = planes[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    small = (Image.fromarray(planes[..., i]).resize((SIDE, SIDE), Image.Resampling.BOX) for i in range(4))
    return np.stack([np.asarray(plane) for plane in small], axis=-1)


def blobs(reference: np.ndarray) -> list[np.ndarray]:
    """An ellipse and a box of the figure's mean colour, each [8, 8, 4]."""
    y, x = (np.mgrid[:64, :64] + 0.5) / 32 - 1
    disc = Image.fromarray((x**2 + y**2 <= 1).astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX)
    mean = reference.sum(axis=(0, 1)) / reference[..., 3].sum() * MASK_WEIGHT
    return [np.asarray(mask)[..., None] * mean for mask in (disc, np.ones((SIDE, SIDE)))]


def likeness(image: np.ndarray | None, references: Sequence[np.ndarray]) -> float:
    """In [0, 1], of cut-outs."""
    if image is None:
        return 0.0
    return max(0.0, *(1 - distance(image, own) / max(PLAIN, from_blobs(own)) for own in references))


def from_blobs(reference: np.ndarray) -> float:
    return min(distance(blob, reference) for blob in blobs(reference))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean())


def references_problem(cut_outs: Sequence[np.ndarray | None]) -> str | None:
    """Return why nothing can be measured with these references, in words; None if it can."""
    found = [cut for cut in cut_outs if cut is not None]
    if len(found) < len(cut_outs):
        return (
            f"not measured: {len(cut_outs) - len(found)} of {len(cut_outs)} references have no figure on plain ground"
        )
    if not found:
        return "needs reference images"
    if np.median([from_blobs(cut) for cut in found]) < PLAIN:
        return "not measured: the subject is hardly more than a blob of one colour"
    if len(found) > 1 and (alike := among_themselves(found)) < ALIKE:
        return f"not measured: the references are too unlike one another ({alike:.2f} by this measure)"
    return None


def among_themselves(cut_outs: Sequence[np.ndarray]) -> float:
    """The median likeness of each reference to the others."""
    alone = [likeness(own, [*cut_outs[:i], *cut_outs[i + 1 :]]) for i, own in enumerate(cut_outs)]
    return float(np.median(alone))
