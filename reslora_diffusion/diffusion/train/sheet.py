"""A contact sheet: labelled images in rows and columns. Labels are wrapped, and the sheet grows with them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import cast

from PIL import Image, ImageDraw, ImageFont

from ...utils.files import atomic_write

MARGIN, LEFT, SPACING = 8, 190, 4  # pixels; of row labels, and between lines
JOINTS = (re.compile(r"(?<=[:,;])"), re.compile(r"(?<=[^\w\s])(?=\w)|(?<=_)"))  # where a long word may be broken


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, complete or not at all."""
    with atomic_write(path) as fresh:
        image.save(fresh, format="PNG")


def contact_sheet(
    columns: Mapping[str, Sequence[Image.Image | Path]], rows: Sequence[str], side: int = 160
) -> Image.Image:
    """An image for each row in each column; equal row labels one below the other are written once.

    Images keep their shape inside squares of `side` pixels. Those given by path are opened one at a time: a long run
    has more of them than a process may hold open.
    """
    font = cast(ImageFont.FreeTypeFont, ImageFont.load_default(14))  # Pillow's own, which has a size
    heads = {label: wrapped(label, side, font) for label in columns}
    head = MARGIN + max((height_of(lines, font) for lines in heads.values()), default=0) + MARGIN
    groups = [(label, len(list(same))) for label, same in groupby(rows)]
    labels = [wrapped(label, LEFT - 2 * MARGIN, font) for label, _ in groups]
    heights = []  # of rows: the last of a group makes room for its label
    for (_, count), lines in zip(groups, labels, strict=True):
        room = count * (side + MARGIN)
        heights += [*[side + MARGIN] * (count - 1), side + MARGIN + max(0, height_of(lines, font) + MARGIN - room)]
    tops = list(accumulate(heights, initial=head))

    sheet = Image.new("RGB", (LEFT + len(columns) * (side + MARGIN), tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    starts = accumulate((count for _, count in groups[:-1]), initial=0)
    for start, lines in zip(starts, labels, strict=False):
        draw.multiline_text((MARGIN, tops[start]), "\n".join(lines), fill="black", font=font, spacing=SPACING)
    for x, (label, images) in enumerate(columns.items()):
        left = LEFT + x * (side + MARGIN)
        draw.multiline_text((left, MARGIN), "\n".join(heads[label]), fill="black", font=font, spacing=SPACING)
        for top, image in zip(tops, map(opened, images), strict=False):
            ratio = side / max(image.size)
            size = (round(image.width * ratio), round(image.height * ratio))
            sheet.paste(image.convert("RGB").resize(size), (left, top))
    return sheet


def opened(image: Image.Image | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    with Image.open(image) as file:
        return file.convert("RGB")


def height_of(lines: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    """The height of lines as Pillow spaces them, with room for what hangs below the last line."""
    return len(lines) * (int(font.getbbox("A")[3]) + SPACING) + font.getmetrics()[1]


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and words that are wider behind their punctuation."""
    lines = [""]
    for word in text.split():
        for n, part in enumerate(parts_of(word, width, font)):
            longer = f"{lines[-1]} {part}".strip() if n == 0 else lines[-1] + part
            if lines[-1] and font.getlength(longer) > width:
                lines.append(part)
            else:
                lines[-1] = longer
    return lines


def parts_of(
    word: str, width: int, font: ImageFont.FreeTypeFont, joints: Sequence[re.Pattern] = JOINTS
) -> Iterator[str]:
    """A word, in as many parts as it takes for each to fit: between settings, else between words, else anywhere."""
    if font.getlength(word) <= width:
        yield word
    elif joints:
        for part in joints[0].split(word):
            yield from parts_of(part, width, font, joints[1:])
    else:
        fits = max(1, next(n for n in range(1, len(word) + 1) if font.getlength(word[:n]) > width) - 1)
        yield word[:fits]
        yield from parts_of(word[fits:], width, font, ())
