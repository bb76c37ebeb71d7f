"""Scenes: what the autoencoder learns from, so that it codes edges and not the emoji that it knows.

    sticker    the images that the UNet will generate: one emoji on a plain background
    crowd      up to four emoji of any size, turned, mirrored and recoloured, cut off by the border
    shapes     polygons, ellipses and strokes in any colour, with or without an emoji on top

Half of a sticker is plain ground, of which there is little to learn; crowds and shapes have edges everywhere. Held-out
subjects are in none of them (`sticker_data.all_emoji`).
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from sticker_data import BACKGROUNDS, LAYOUTS, RESOLUTION, draw_at_random, glyph, paste, to_array

KINDS = {"sticker": 0.4, "crowd": 0.4, "shapes": 0.2}  # shares of a batch
SUPERSAMPLING = 4  # shapes are drawn so much larger, then shrunk: smooth edges


def random_colour(rng: random.Random) -> tuple[int, int, int]:
    """Any colour, or one that captions name."""
    if rng.random() < 0.5:
        return rng.choice(list(BACKGROUNDS.values()))
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def recoloured(ink: Image.Image, rng: random.Random) -> Image.Image:
    """The emoji turned, mirrored, and with its hue, its channels or its brightness changed."""
    if rng.random() < 0.5:
        ink = ink.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        ink = ink.rotate(rng.uniform(-180, 180), Image.Resampling.BILINEAR, expand=True)
    red, green, blue, alpha = ink.split()
    channels = [red, green, blue]
    if rng.random() < 0.5:
        rng.shuffle(channels)
    if rng.random() < 0.3:
        low, high = sorted((rng.randrange(256), rng.randrange(256)))
        channels = [channel.point(lambda value: low + value * (high - low) // 255) for channel in channels]
    return Image.merge("RGBA", [*channels, alpha])


def sticker(emoji: Sequence[str], rng: random.Random) -> Image.Image:
    layout = "plain" if rng.random() < 0.7 else rng.choice(list(LAYOUTS))
    other = rng.choice(emoji) if layout == "pair" else ""
    return draw_at_random(rng.choice(emoji), random_colour(rng), rng, layout, other)


def crowd(emoji: Sequence[str], rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (RESOLUTION, RESOLUTION), random_colour(rng))
    for _ in range(rng.randint(1, 4)):
        place = rng.uniform(-0.3, 1.3), rng.uniform(-0.3, 1.3)
        paste(image, recoloured(glyph(rng.choice(emoji)), rng), rng.uniform(0.4, 1.2), place)
    return image


def shapes(emoji: Sequence[str], rng: random.Random) -> Image.Image:
    side = SUPERSAMPLING * RESOLUTION
    image = Image.new("RGB", (side, side), random_colour(rng))
    pen = ImageDraw.Draw(image)

    def points(count: int) -> list[tuple[float, float]]:
        x, y, reach = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.1, 0.6) * side
        return [(x + rng.uniform(-reach, reach), y + rng.uniform(-reach, reach)) for _ in range(count)]

    for _ in range(rng.randint(2, 8)):
        colour, width = random_colour(rng), rng.randint(SUPERSAMPLING, 5 * SUPERSAMPLING)
        kind = rng.choice(("polygon", "ellipse", "stroke"))
        if kind == "polygon":
            pen.polygon(points(rng.randint(3, 6)), fill=colour)
        elif kind == "ellipse":
            (x0, x1), (y0, y1) = map(sorted, zip(*points(2), strict=True))
            pen.ellipse((x0, y0, x1, y1), fill=colour, outline=random_colour(rng), width=rng.choice((0, width)))
        else:
            pen.line(points(rng.randint(2, 5)), fill=colour, width=width, joint="curve")
    image = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)
    if rng.random() < 0.5:
        place = rng.uniform(0, 1), rng.uniform(0, 1)
        paste(image, recoloured(glyph(rng.choice(emoji)), rng), rng.uniform(0.3, 0.9), place)
    return image


def scene(emoji: Sequence[str], rng: random.Random) -> Image.Image:
    """One 64 x 64 RGB image of a random kind."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    return {"sticker": sticker, "crowd": crowd, "shapes": shapes}[kind](emoji, rng)


def draw_scenes(emoji: Sequence[str], count: int, rng: random.Random) -> torch.Tensor:
    """[count, 3, 64, 64] in [-1, 1]."""
    images = np.stack([to_array(scene(emoji, rng)) for _ in range(count)])
    return torch.from_numpy(images).float() / 127.5 - 1
