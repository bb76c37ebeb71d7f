"""A contact sheet: labelled pictures in rows and columns."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, HEAD, LEFT = 8, 28, 190


def contact_sheet(columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str], side: int = 160) -> Image.Image:
    """A picture for each row in each column; equal row labels one below the other are written once.

    Pictures keep their shape inside squares of `side` pixels.
    """
    font = ImageFont.load_default(14)
    sheet = Image.new("RGB", (LEFT + len(columns) * (side + MARGIN), HEAD + len(rows) * (side + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, label in enumerate(rows):
        if y == 0 or rows[y - 1] != label:
            lines = "\n".join(wrapped(label, LEFT - 2 * MARGIN, font))
            draw.multiline_text((MARGIN, HEAD + y * (side + MARGIN)), lines, fill="black", font=font)
    for x, (label, images) in enumerate(columns.items()):
        corner = LEFT + x * (side + MARGIN)
        draw.text((corner, MARGIN), label, fill="black", font=font)
        for y, image in enumerate(images):
            ratio = side / max(image.size)
            size = (round(image.width * ratio), round(image.height * ratio))
            sheet.paste(image.convert("RGB").resize(size), (corner, HEAD + y * (side + MARGIN)))
    return sheet


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
