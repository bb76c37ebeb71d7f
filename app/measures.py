"""Figures about a comparison's images, by column, each with n and a 95 % interval. None needs a network.

    subject likeness     what is there of the subject beyond a blob of its colour: likeness.py
    background obeyed    share of images whose plain ground has the colour that the prompt names
    drift from the base  mean difference to the base's image of the same row, on prompts without the subject's word
    diversity            mean difference between images of one prompt from different seeds; noise is left out
    images of noise    share of them, if there are any

Differences are of pixels: mean |a - b| over the range of a channel, so that a figure which moved counts like one that
changed. With a CLIP and a DINO at hand, `learned_measures` computes DreamBooth's.

Each is checked on images whose order is known, generated ones among them: tests/test_app_likeness.py.
"""

import colorsys
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .compare import Cell
from .intervals import Figure, figure, proportion
from .likeness import cut_out, ground, likeness, pixels, references_problem
from .output import by_place, difference
from .request import Column, CompareRequest, Row

DRIFT = "drift from the base"
NOISE = 0.5  # share of the difference of any two pixels that neighbours have; below 0.3 in sharp images, 1 in noise
HUES = ((15, "red"), (42, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (320, "purple"), (361, "red"))
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "gray", "brown")


@dataclass
class Measure:
    """Values of every column by what they were taken of: a row, or a prompt where seeds are compared."""

    name: str
    wanting: str = "not measured"  # said of a column without values
    share: bool = False  # values are hits and misses
    least: float = 0.0
    most: float = 1.0
    values: dict[Column, dict[Hashable, float]] = field(default_factory=lambda: defaultdict(dict))

    def figure(self, column: Column) -> Figure | None:
        values = self.values[column].values()
        return proportion([bool(v) for v in values]) if self.share else figure(values, self.least, self.most)

    def paired(self, first: Column, second: Column) -> Figure | None:
        """First less second, over what both were taken of."""
        a, b = self.values[first], self.values[second]
        return figure((a[key] - b[key] for key in a if key in b), -self.span, self.span)

    @property
    def span(self) -> float:
        return self.most - self.least

    @property
    def is_of_images(self) -> bool:
        """True where each value is of one image, so that images can be sorted by it."""
        keys = [key for values in self.values.values() for key in values]
        return bool(keys) and all(isinstance(key, Row) for key in keys)

    def to_dict(self, request: CompareRequest) -> dict:
        """Values for JSON. Columns and rows go by their numbers, and so does what else values were taken of."""
        rows, columns, of_images = request.rows, request.columns, self.is_of_images
        keys = rows if of_images else list(dict.fromkeys(key for values in self.values.values() for key in values))
        values = {
            columns.index(column): {keys.index(key): float(value) for key, value in found.items()}
            for column, found in self.values.items()
        }
        facts = {name: getattr(self, name) for name in ("name", "wanting", "share", "least", "most")}
        return facts | {"of_images": of_images, "values": values}

    @classmethod
    def from_dict(cls, data: dict, request: CompareRequest) -> "Measure":
        """
        Raises:
            TypeError, ValueError, KeyError, IndexError, AttributeError: the data are none of `to_dict`.
        """
        measure = cls(
            str(data["name"]), str(data["wanting"]), bool(data["share"]), float(data["least"]), float(data["most"])
        )
        keys = dict(enumerate(request.rows)) if data["of_images"] else {}
        for number, found in data["values"].items():
            values = {keys.get(int(key), int(key)): float(value) for key, value in found.items()}
            measure.values[request.columns[int(number)]] = values
        return measure


# ---------------------------------------------------------------------------------------------- small measures


def asked_background(prompt: str) -> str | None:
    """The colour in "blue background", or at the end in "on blue"; None if none is asked for, or two are."""
    colours = "|".join((*COLOURS, "grey"))
    words = prompt.lower()
    if re.search(rf"\b({colours})\s+(?:and|or)\s+({colours})\s+background\b", words):
        return None
    match = re.search(rf"\b({colours})\s+background\b|\bon\s+(?:an?\s+)?({colours})\s*(?:$|[.,;])", words)
    return match and (match[1] or match[2]).replace("grey", "gray")


def background(image: Image.Image) -> str | None:
    """Name the ground's colour as a person would, among those that prompts can ask for; None if it is not plain."""
    colour = ground(image)
    if colour is None:
        return None
    hue, saturation, value = colorsys.rgb_to_hsv(*map(float, colour))
    if value < 0.2:
        return "black"
    if saturation < 0.18:
        return "white" if value > 0.9 else "gray"
    name = next(name for end, name in HUES if 360 * hue < end)
    if name == "red" and saturation < 0.5 and value > 0.7:
        return "pink"
    return "brown" if name in ("red", "orange") and value < 0.7 and saturation < 0.9 else name


def is_noise(image: Image.Image) -> bool:
    """Tell noise: neighbouring pixels differ about as much as any two do, as where nothing was denoised."""
    x = pixels(image)
    spread = 2 * x.var(axis=(0, 1)).sum()
    steps = [np.square(np.diff(x, axis=axis)).sum(axis=-1).mean() for axis in (0, 1)]
    return bool(spread > 1e-4 and np.mean(steps) / spread > NOISE)


# ------------------------------------------------------------------------------------------------- by column


def is_of(subject_word: str, prompt: str) -> bool:
    return not subject_word or subject_word.lower() in prompt.lower()


def measure(
    request: CompareRequest, cells: Sequence[Cell], references: Sequence[Image.Image], subject_word: str
) -> list[Measure]:
    """Every measure of a comparison."""
    cut_outs = [cut_out(reference) for reference in references]
    problem = references_problem(cut_outs)
    sound = [] if problem else [cut for cut in cut_outs if cut is not None]
    subject = Measure("subject likeness", problem or "needs prompts of the subject")
    obeyed = Measure("background obeyed", "needs a colour in a prompt", share=True)
    drift = Measure(DRIFT, "needs unrelated prompts and the base")
    diversity = Measure("diversity", "needs two seeds")
    noise = Measure("images of noise", share=True)
    places = by_place(cells)
    for cell in cells:
        row, column = cell.row, cell.column
        noise.values[column][row] = is_noise(cell.image)
        if asked := asked_background(row.prompt):
            obeyed.values[column][row] = background(cell.image) == asked
        if is_of(subject_word, row.prompt):
            if sound:
                subject.values[column][row] = likeness(cut_out(cell.image), sound)
        elif column.adapter and (base := places.get((row, Column(setting=column.setting)))):
            drift.values[column][row] = float(difference(cell.image, base.image).mean())
    for column in request.columns:
        own = [cell for cell in cells if cell.column == column and not noise.values[column][cell.row]]
        diversity.values[column] = dict(diversities(own))
    found = [subject, obeyed, drift, diversity]
    return [*found, noise] if any(any(values.values()) for values in noise.values.values()) else found


def diversities(cells: Iterable[Cell]) -> dict[Hashable, float]:
    """Mean difference between seeds of each prompt with more than one."""
    by_prompt = defaultdict(list)
    for cell in cells:
        by_prompt[cell.row.prompt, cell.row.setting].append(cell.image)
    return {
        prompt: math.fsum(float(difference(a, b).mean()) for a, b in pairs) / len(pairs)
        for prompt, images in by_prompt.items()
        if (pairs := list(itertools.combinations(images, 2)))
    }
