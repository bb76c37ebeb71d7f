"""A figure for a paper: chosen rows and columns of a comparison, with a caption that says what they are of.

The caption has the base, the first digits of each adapter file's sha256, versions, seeds, settings and the date.
PNG, SVG and PDF are drawn by matplotlib; text stays text in SVG and PDF.
"""

import datetime
import io
import textwrap
from collections.abc import Sequence
from importlib.metadata import version

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .compare import Cell
from .foreign import printable, shortened
from .output import by_place, settings_line
from .request import Column, CompareRequest, Row

KINDS = ("png", "svg", "pdf")
CELL_INCHES, LEFT_INCHES, LINE_INCHES = 1.5, 1.4, 0.17
CAPTION_CHARACTERS = 16  # of an inch of width, at the caption's size
PACKAGES = ("reslora-diffusion", "diffusers", "torch")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reslora",
    "pdf.fonttype": 42,
    "font.family": "sans-serif",
    "font.size": 8,
    "text.parse_math": False,
}
FEWEST_INCHES = 4.5


def caption(request: CompareRequest, rows: Sequence[Row], columns: Sequence[Column], base: str, day: str) -> str:
    adapters = dict.fromkeys(column.adapter for column in columns if column.adapter)
    files = "; ".join(f"{adapter.label} sha256 {adapter.sha256[:12]}" for adapter in adapters)
    seeds = ", ".join(map(str, dict.fromkeys(row.seed for row in rows)))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    parts = [settings_line(request, base), f"seeds {seeds}", *([files] if files else []), versions, day]
    return printable(". ".join(parts) + ".").replace("\n", " ")


def figure(
    request: CompareRequest,
    cells: Sequence[Cell],
    rows: Sequence[Row],
    columns: Sequence[Column],
    base: str,
    kind: str,
    day: str | None = None,
) -> bytes:
    """
    Raises:
        ValueError: no row or column is chosen, or nothing in them was generated.
    """
    generated = by_place(cells)
    if not any((row, column) in generated for row in rows for column in columns):
        raise ValueError("Choose rows and columns with images.")
    day = day or datetime.date.today().isoformat()
    width = max(FEWEST_INCHES, LEFT_INCHES + CELL_INCHES * len(columns))
    text = textwrap.wrap(caption(request, rows, columns, base, day), int(width * CAPTION_CHARACTERS))
    below, above = (len(text) + 1) * LINE_INCHES, 4 * LINE_INCHES
    height = above + CELL_INCHES * len(rows) + below
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(width, height))
        for j, column in enumerate(columns):
            left = LEFT_INCHES + CELL_INCHES * j
            head = "\n".join(textwrap.wrap(printable(column.label), 18, max_lines=3, placeholder="…"))
            drawing.text((left + CELL_INCHES / 2) / width, 1 - above / height + 0.005, head, ha="center", va="bottom")
            for i, row in enumerate(rows):
                bottom = below + CELL_INCHES * (len(rows) - 1 - i)
                place = (left / width, bottom / height, 0.97 * CELL_INCHES / width, 0.97 * CELL_INCHES / height)
                axes = drawing.add_axes(place)
                axes.set(xticks=[], yticks=[])
                axes.axis("off")
                if cell := generated.get((row, column)):
                    axes.imshow(np.asarray(cell.image.convert("RGB")), interpolation="none")
        for i, row in enumerate(rows):
            middle = below + CELL_INCHES * (len(rows) - 0.5 - i)
            words = textwrap.wrap(printable(shortened(row.prompt, 90)), 22, max_lines=5, placeholder="…")
            drawing.text(0.05 / width, middle / height, "\n".join([*words, row.note]), va="center")
        drawing.text(0.05 / width, 0.06 / height, "\n".join(text), va="bottom", fontsize=7)
        buffer = io.BytesIO()
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        drawing.savefig(buffer, format=kind, dpi=300, metadata=metadata)
    return buffer.getvalue()
