"""Files that leave the page to be looked at: a labelled sheet, and a report that opens without the app.

Words of users are drawn as pixels or HTML-escaped. The report holds its images, no script, and a policy that lets it
load nothing.
"""

import base64
import html
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .compare import Cell
from .foreign import printable, shortened
from .request import Axis, Column, CompareRequest

SHOWN_SIDE = 256  # small images are enlarged to at least this, by whole factors
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
INK, PAPER, FAINT = "#1c1917", "#ffffff", "#78716c"


def enlarged(image: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """Whole pixels, so that what is looked at is what was generated."""
    factor = max(1, -(-side // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    """[height, width] in [0, 1]: mean over the channels of |a - b|."""
    x, y = (np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in (a, b))
    return np.abs(x - y).mean(axis=-1)


def escaped(value: object) -> str:
    """A value as printable text in HTML, without markup."""
    return html.escape(printable(value), quote=True)


def png(image: Image.Image) -> bytes:
    """Pixels only: no text chunk that could say where an image comes from."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def settings_line(request: CompareRequest, base: str) -> str:
    """Say in one line what all images of a comparison have in common."""
    common = {
        Axis.STEPS: f"{request.num_inference_steps} steps",
        Axis.GUIDANCE: f"guidance {request.guidance_scale:g}",
        Axis.SCHEDULER: f"scheduler {request.scheduler}",
    }
    swept = {setting.axis for setting in (*request.rows_by, *request.columns_by)}
    parts = [text for axis, text in common.items() if axis not in swept]
    negative = [f"negative prompt “{request.negative_prompt}”"] if request.negative_prompt else []
    return " · ".join([f"base {base}", *parts, *negative, "same noise in a row"])


def by_place(cells: Sequence[Cell]) -> dict:
    return {(cell.row, cell.column): cell for cell in cells}


def column_lines(column: Column, width: int) -> list[str]:
    """A column's label in at most four lines: its name, without the middle of a long one, strength and setting."""
    name = shortened(column.adapter.label if column.adapter else column.label, 2 * width)
    lines = [name[:width], name[width:]]
    strength = [f"× {column.strength:g}"] if column.adapter else []
    return [*filter(None, lines), *strength, *([column.setting.label] if column.setting else [])]


def sheet(request: CompareRequest, cells: Sequence[Cell], base: str) -> Image.Image:
    """Rows and columns with their labels; cells that were not generated stay empty."""
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 15)
    bold = ImageFont.truetype(FONTS / "DejaVuSans-Bold.ttf", 15)
    generated = by_place(cells)
    side, gap, left, line = max(max(enlarged(c.image).size) for c in cells), 12, 260, 20
    rows, columns = request.rows, request.columns
    width = left + len(columns) * (side + gap) + gap
    settings = textwrap.wrap(settings_line(request, base), (width - 2 * gap) // 9)
    top = gap + (len(settings) + 3 + bool(request.columns_by)) * line + gap
    canvas = Image.new("RGB", (width, top + len(rows) * (side + gap) + gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((gap, gap), "\n".join(settings), font=font, fill=FAINT)
    for j, column in enumerate(columns):
        label = "\n".join(column_lines(column, side // 11))
        draw.multiline_text((left + j * (side + gap), top - gap // 2), label, font=bold, fill=INK, anchor="ld")
    for i, row in enumerate(rows):
        y = top + i * (side + gap)
        lines = textwrap.wrap(row.prompt, 27, max_lines=max(1, side // 20 - 2), placeholder="…")
        draw.multiline_text((gap, y), "\n".join(lines), font=font, fill=INK)
        draw.text((gap, y + line * len(lines)), row.note, font=font, fill=FAINT)
        for j, column in enumerate(columns):
            x = left + j * (side + gap)
            if cell := generated.get((row, column)):
                canvas.paste(enlarged(cell.image), (x, y))
            else:
                draw.rectangle((x, y, x + side, y + side), outline=FAINT)
    return canvas


def printable_json(data: dict) -> str:
    """JSON of the same data; what cannot be printed is written as an escape, so that nothing is changed."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


REPORT_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .4rem; text-align: left; vertical-align: top; }
th { overflow-wrap: anywhere; } th[scope=col] { max-width: 192px; vertical-align: bottom; }
th[scope=row] { max-width: 16rem; min-width: 8rem; font-weight: 500; }
img { width: 192px; border-radius: 6px; display: block; }
figure { margin: 1.5rem 0; } figcaption { font-weight: 650; } .facts th, .facts td { max-width: none; }
small { opacity: .75; font-weight: 400; } td small { display: block; max-width: 192px; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: 1rem; background: #78716c22; border-radius: 6px; }
"""


def report(request: CompareRequest, cells: Sequence[Cell], base: str, evidence: str = "") -> str:
    """One HTML file with everything in it; `evidence` is HTML of votes and measures."""
    generated = by_place(cells)

    def td(cell: Cell | None) -> str:
        if cell is None:
            return "<td><small>not generated</small></td>"
        data = base64.b64encode(png(cell.image)).decode()
        alt = escaped(f"{cell.column.label}: {cell.row.label}")
        note = f"{escaped(cell.generated_with)}, {cell.seconds:.1f} s"
        return f'<td><img alt="{alt}" src="data:image/png;base64,{data}"><small>{note}</small></td>'

    head = "".join(f'<th scope="col">{escaped(column.label)}</th>' for column in request.columns)
    body = "".join(
        f'<tr><th scope="row">{escaped(row.prompt)}<br><small>{escaped(row.note)}</small></th>'
        + "".join(td(generated.get((row, column))) for column in request.columns)
        + "</tr>"
        for row in request.rows
    )
    settings = html.escape(printable_json(request.to_dict()))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>ResLoRA comparison</title><style>{REPORT_STYLE}</style></head><body><h1>ResLoRA comparison</h1>"
        f"<p>{escaped(settings_line(request, base))}</p>"
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{evidence}"
        f"<details><summary>Settings: save as settings.json to open them in the app</summary><pre>{settings}</pre>"
        "</details></body></html>"
    )
