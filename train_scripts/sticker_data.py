"""Stickers: one emoji, or two, on a plain coloured background, and the words for it.

    draw(glyph, colour, size, place)      ->  a 64 x 64 RGB image
    caption(subject, colour)              ->  "a sticker of a fox face on a blue background"
    caption(phrase("left", "owl"), ...)   ->  "a sticker of an owl on the left on a blue background"

The glyphs come from the Noto Color Emoji font (Debian: fonts-noto-color-emoji), a bitmap font whose only
size is 109; their names come from `unicodedata`. Every image the shipped pipeline has seen, and every
image of a DreamBooth subject in `assets/subjects/`, is made by this file, which as a program draws the latter.
"""

import functools
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RESOLUTION = 64
FONT_SIZE = 109  # the one strike the bitmap font contains
FONT_PATHS = (
    str(Path.home() / ".local/share/fonts/NotoColorEmoji.ttf"),
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)

BACKGROUNDS = {
    "red": (214, 64, 60),
    "orange": (240, 148, 60),
    "yellow": (246, 220, 96),
    "green": (92, 176, 100),
    "blue": (72, 124, 214),
    "purple": (142, 92, 190),
    "pink": (240, 164, 192),
    "gray": (150, 154, 160),
}

# What the pipeline learns to generate: category noun -> emoji.
SUBJECTS = {
    "animal": "🐶🐱🦊🐻🐯🦁🐮🐷🐸🐵🐧🦉🐢🐬🐳🦋🐝🐞🦀🐘🐍🦆🐇🐓🦄🐌",
    "fruit": "🍎🍊🍋🍌🍉🍇🍓🍒🍍🥝🍐🥑",
    "food": "🍕🍔🍟🌭🍩🍪🍿🍦🥕🌽🥐🧀🍄",
    "plant": "🌻🌹🌷🌲🌴🍀🍁",
    "vehicle": "🚗🚕🚌🚒🚲🚀🚁🚂🚜🛸",
    "thing": "⚽🏀🎸🎺🥁🎁🎈⌚💡🔑🔔📷☂⏰🏆🎩👑💎🕯🧸",
    "face": "😀😎😍😡👻👽💀🎃",
}

# Never drawn for any part of the pipeline's training: the DreamBooth subjects. Folder name -> (emoji, class noun).
HELD_OUT = {
    "panda": ("🐼", "animal"),
    "octopus": ("🐙", "animal"),
    "robot": ("🤖", "face"),
    "cactus": ("🌵", "plant"),
    "sailboat": ("⛵", "vehicle"),
    "cake": ("🎂", "food"),
    "teapot": ("🫖", "thing"),
    "sun_hat": ("👒", "thing"),
}

TEMPLATES = (
    "a sticker of {what} on {b} {colour} background",
    "{what} sticker on {b} {colour} background",
    "{what} on {colour}",
    "a sticker of {what}, {colour} background",
)
SENTENCES = (TEMPLATES[0], TEMPLATES[3])  # the templates that can hold a phrase with a place


@dataclass(frozen=True)
class Layout:
    """The place of a sticker's figure. `size`: its longer side as a share of the image; `x`: its share of the room."""

    words: str
    size: tuple[float, float]
    x: tuple[float, float] = (0.2, 0.8)


LAYOUTS = {
    "plain": Layout("{a} {name}", (0.60, 0.90)),
    "small": Layout("a small {name}", (0.35, 0.45)),
    "large": Layout("a large {name}", (0.88, 0.98)),
    "left": Layout("{a} {name} on the left", (0.45, 0.55), (0.0, 0.1)),
    "right": Layout("{a} {name} on the right", (0.45, 0.55), (0.9, 1.0)),
    "pair": Layout("{a} {name} and {c} {other}", (0.44, 0.48), (0.0, 0.1)),  # the other one stands on the right
}


@dataclass(frozen=True)
class Subject:
    emoji: str
    category: str

    @functools.cached_property
    def name(self) -> str:
        """Unicode's own name in lower case: 'fox face'."""
        return unicodedata.name(self.emoji).lower()


def subjects() -> list[Subject]:
    """Every subject the pipeline is trained on, in a fixed order."""
    return [Subject(emoji, category) for category, row in SUBJECTS.items() for emoji in row]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def phrase(layout: str, name: str, other: str = "") -> str:
    """Return the words of a caption for the figure: "a small fox face", or for a pair "a fox face and an owl"."""
    a, c = (article(noun) if noun else "" for noun in (name, other))
    return LAYOUTS[layout].words.format(a=a, name=name, c=c, other=other)


def caption(what: str, colour: str, template: str = TEMPLATES[0]) -> str:
    """`what` is a subject's name, or a whole phrase with its article."""
    if not what.startswith(("a ", "an ")):
        what = phrase("plain", what)
    return template.format(what=what, b=article(colour), colour=colour)


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    for path in FONT_PATHS:
        if Path(path).is_file():
            return ImageFont.truetype(path, FONT_SIZE)
    raise FileNotFoundError(
        f"Noto Color Emoji is not installed; looked for {', '.join(FONT_PATHS)}. "
        "On Debian: apt-get install fonts-noto-color-emoji"
    )


@functools.cache
def glyph(emoji: str) -> Image.Image:
    """The emoji as an RGBA image, cropped to its ink."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), emoji, font=font(), embedded_color=True)
    box = canvas.getbbox()
    return canvas.crop(box) if box else canvas


def all_emoji() -> list[str]:
    """Every single-character emoji of the font except the held-out subjects: what the autoencoder learns from."""
    held_out = {emoji for emoji, _ in HELD_OUT.values()}
    blocks = (range(0x2600, 0x27C0), range(0x1F300, 0x1F650), range(0x1F680, 0x1F700), range(0x1F900, 0x1FB00))
    missing = glyph("\U0010fffd").tobytes()
    found = []
    for code in (code for block in blocks for code in block):
        emoji = chr(code)
        if emoji in held_out or unicodedata.category(emoji) in ("Cn", "Sk"):
            continue
        image = glyph(emoji)
        if max(image.size) >= 80 and image.size != (160, 160) and image.tobytes() != missing:
            found.append(emoji)
    return found


def draw(
    emoji: str, colour: tuple[int, int, int], size: float, place: tuple[float, float], resolution: int = RESOLUTION
) -> Image.Image:
    """Draw `emoji` on a plain background.

    `size` is the longer side of the emoji as a share of the image; `place` in [0, 1]^2 says where in the room that
    is left (0.5, 0.5 is the middle).
    """
    image = Image.new("RGB", (resolution, resolution), colour)
    paste(image, glyph(emoji), size, place)
    return image


def paste(image: Image.Image, ink: Image.Image, size: float, place: tuple[float, float]) -> None:
    """Put the RGBA image `ink` on `image`, `size` and `place` as in `draw`; a place outside of [0, 1] cuts it off."""
    scale = size * image.width / max(ink.size)
    ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.LANCZOS)
    left, top = (round(where * (image.width - side)) for where, side in zip(place, ink.size, strict=True))
    image.paste(ink, (left, top), ink)


def nearby(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    """Each channel +- 8."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-8, 8))) for channel in colour)
    return red, green, blue


def draw_at_random(
    emoji: str, colour: tuple[int, int, int], rng: random.Random, layout: str = "plain", other: str = ""
) -> Image.Image:
    """The training distribution: sizes and places at random within the layout, the colour nearly the named one."""
    size = rng.uniform(*LAYOUTS[layout].size)
    place = (rng.uniform(*LAYOUTS[layout].x), rng.uniform(0.2, 0.8))
    image = draw(emoji, nearby(colour, rng), size, place)
    if other:
        paste(image, glyph(other), size, (1 - place[0], rng.uniform(0.2, 0.8)))
    return image


def to_array(image: Image.Image) -> np.ndarray:
    """[3, H, W] uint8, the layout the training caches hold."""
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def draw_subjects(folder: Path, count: int = 5, seed: int = 0) -> None:
    """`folder/<name>/<i>.png`: a few images of each held-out subject, no two on the same background."""
    for name, (emoji, _) in HELD_OUT.items():
        rng = random.Random(f"{seed} {name}")
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, colour in enumerate(rng.sample(list(BACKGROUNDS.values()), count)):
            draw_at_random(emoji, colour, rng).save(folder / name / f"{i}.png")


if __name__ == "__main__":
    draw_subjects(Path("assets/subjects"))
