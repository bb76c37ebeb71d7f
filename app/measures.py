"""Figures about a comparison's pictures, by column, each with n and a 95 % interval. None needs a network.

    subject likeness     mean over pictures of the best cosine between the picture's cut-out and a reference's
    background obeyed    share of pictures whose border has the colour that the prompt names ("on a blue background")
    drift from the base  mean difference to the base's picture of the same row, on prompts without the subject's word
    diversity            mean difference between pictures of one prompt from different seeds

A cut-out is the figure on its plain background, found by its distance from the median colour of the border, stretched
to 16 x 16 and centred: a small measure for stickers, blind to place and size, that knows no names and no style. On
photographs it means little. Differences are of pixels: mean |a - b| over the range of a channel. With a CLIP and a DINO
at hand, `learned_measures` computes DreamBooth's instead.

Intervals are bootstraps over rows, over prompts for diversity: pictures of one prompt are not independent. Wilson's
serves the share. A single value has none.
"""

import colorsys
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .compare import Cell
from .output import by_place, difference
from .request import Column, CompareRequest
from .votes import wilson_interval

BOOTSTRAPS = 1000
FIGURE_DISTANCE = 0.14  # in RGB: further from the border's colour is figure
CUT_OUT_SIDE = 16
HUES = ((15, "red"), (42, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (320, "purple"), (361, "red"))
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "gray", "brown")


@dataclass(frozen=True)
class Figure:
    """A mean over n values, and the interval that holds it in 95 % of resamplings."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:.3f}, n = 1"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f}), n = {self.n}"


def figure(values: Iterable[float], seed: int = 0) -> Figure | None:
    """Mean and percentile bootstrap; None for no values, an interval of no width for one."""
    x = np.array(list(values), dtype=float)
    if not x.size:
        return None
    means = x[np.random.default_rng(seed).integers(x.size, size=(BOOTSTRAPS, x.size))].mean(axis=1)
    return Figure(x.mean(), *np.quantile(means, (0.025, 0.975)), x.size)


def proportion(hits: Sequence[bool]) -> Figure | None:
    """A share with Wilson's interval: a bootstrap of nothing but hits would have no width."""
    return Figure(sum(hits) / len(hits), *wilson_interval(sum(hits), len(hits)), len(hits)) if hits else None


# ---------------------------------------------------------------------------------------------- small measures


def border_colour(image: Image.Image) -> np.ndarray:
    """[3] in [0, 1]: median of the one-pixel border."""
    x = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return np.median(np.concatenate([x[0], x[-1], x[1:-1, 0], x[1:-1, -1]]), axis=0)


def cut_out(image: Image.Image) -> np.ndarray:
    """[16 * 16 * 4], unit length: the figure in RGB and its mask; zero where there is no figure."""
    x = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    mask = (np.linalg.norm(x - border_colour(image), axis=-1) > FIGURE_DISTANCE).astype(np.float32)
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not ys.size:
        return np.zeros(CUT_OUT_SIDE**2 * 4, dtype=np.float32)
    planes = np.concatenate([(x - 0.5) * mask[..., None], mask[..., None] - 0.5], axis=-1)
    planes = planes[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    size = (CUT_OUT_SIDE, CUT_OUT_SIDE)
    small = [np.asarray(Image.fromarray(planes[..., i]).resize(size, Image.Resampling.BOX)) for i in range(4)]
    vector = np.stack(small, axis=-1).reshape(-1)
    return vector / np.linalg.norm(vector)


def likeness(image: Image.Image, references: Sequence[np.ndarray]) -> float:
    """Best cosine with a reference, in [-1, 1]."""
    vector = cut_out(image)
    return max(float(vector @ reference) for reference in references)


def asked_background(prompt: str) -> str | None:
    """The colour in "blue background" or "on blue"; None if no colour is asked for."""
    colours = "|".join(COLOURS)
    match = re.search(rf"\b({colours})\s+background\b|\bon\s+(?:an?\s+)?({colours})\b", prompt.lower())
    return match and (match[1] or match[2])


def background(image: Image.Image) -> str:
    """What a person would call the border's colour, among those that prompts can ask for."""
    hue, saturation, value = colorsys.rgb_to_hsv(*map(float, border_colour(image)))
    if value < 0.2:
        return "black"
    if saturation < 0.15:
        return "white" if value > 0.9 else "gray"
    name = next(name for end, name in HUES if 360 * hue < end)
    if name == "red" and saturation < 0.5 and value > 0.7:
        return "pink"
    return "brown" if name in ("red", "orange") and value < 0.7 and saturation < 0.9 else name


# ------------------------------------------------------------------------------------------------- by column


def measure(
    request: CompareRequest, cells: Sequence[Cell], references: Sequence[Image.Image], subject_word: str
) -> dict[str, dict[Column, Figure | None]]:
    """Every measure of every column: {measure: {column: figure, or None where there is nothing to measure}}."""
    painted = by_place(cells)
    cut_outs = [cut_out(reference) for reference in references]
    names_subject: Callable[[str], bool] = lambda p: not subject_word or subject_word.lower() in p.lower()  # noqa: E731
    measures: dict[str, dict[Column, Figure | None]] = defaultdict(dict)
    for column in request.columns:
        own = [painted[row, column] for row in request.rows if (row, column) in painted]
        subject = [likeness(c.image, cut_outs) for c in own if cut_outs and names_subject(c.row.prompt)]
        obeyed = [background(c.image) == asked for c in own if (asked := asked_background(c.row.prompt))]
        unrelated = [c for c in own if not names_subject(c.row.prompt) and (c.row, Column()) in painted]
        drift = [difference(c.image, painted[c.row, Column()].image).mean() for c in unrelated]
        measures["subject likeness"][column] = figure(subject)
        measures["background obeyed"][column] = proportion(obeyed)
        measures["drift from the base"][column] = figure(drift) if column.adapter else None
        measures["diversity"][column] = figure(diversities(own))
    return dict(measures)


def diversities(cells: Sequence[Cell]) -> list[float]:
    """Mean difference between seeds, one value for each prompt with more than one."""
    by_prompt = defaultdict(list)
    for cell in cells:
        by_prompt[cell.row.prompt].append(cell.image)
    pairs = ([difference(a, b).mean() for a, b in itertools.combinations(images, 2)] for images in by_prompt.values())
    return [float(np.mean(values)) for values in pairs if values]
