"""A comparison as files, and back: controls, images, and what was looked at.

    settings.json     the request of request.py, and beside it
        base          name of the pipeline it was generated with
        view          {"name": "Slider", "row": 0, "left": 0, "right": 2}
        images      [{"row", "column", "file", "generated_with", "seconds"}], by the numbers of their row and column
    comparison.zip    settings.json, images/<file>, sheet.png, report.html

What is opened may come from anywhere: an archive is never unpacked onto the disk, names in it are only looked up, sizes
are checked before anything is read, and nothing but PNG is decoded. Images that a file lacks can be generated again.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from reslora_diffusion.utils.images import UnreadableImage, read_image
from reslora_diffusion.utils.names import file_name_from

from .compare import Cell
from .foreign import is_number, parsed_json
from .output import png, report, sheet
from .pages import PageAxis, pages
from .request import CompareRequest, joined, upgraded

VIEWS = ("Grid", "Flip", "Side by side", "Slider", "Difference")
SETTINGS, IMAGES = "settings.json", "images/"
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in an archive: equal comparisons make equal archives
IMAGE_KEYS = {"row", "column", "file", "generated_with", "seconds"}
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others unpack a whole chunk, whatever a read asks for
MAX_SETTINGS_BYTES = 2**20
MAX_IMAGE_BYTES = 2**25
MAX_PIXELS = 2**27  # of all images together
MAX_WORDS = 200  # characters of `generated_with`


@dataclass(frozen=True)
class View:
    """The part of a comparison that the page shows: the grid, or two columns of one row."""

    name: str = VIEWS[0]
    row: int = 0
    left: int = 0
    right: int = 0
    transposed: bool = False  # columns of the request stand as rows
    pages: PageAxis = PageAxis.NOTHING  # what the grid has a page for each of
    page: int = 0

    @classmethod
    def of(cls, request: CompareRequest) -> "View":
        """The grid, with the first column against the last in the pickers."""
        return cls(right=len(request.columns) - 1)

    def turned_to(self, request: CompareRequest) -> "View":
        """The grid of another comparison, turned and in pages as this one."""
        return replace(View.of(request), transposed=self.transposed, pages=self.pages)


# ---------------------------------------------------------------------------------------------------- writing


def named(request: CompareRequest, cells: Sequence[Cell]) -> dict[str, Cell]:
    """Cells by the name of their file."""
    rows, columns = request.rows, request.columns
    places = [(rows.index(cell.row) + 1, columns.index(cell.column) + 1) for cell in cells]
    return {
        f"row{i:03}-column{j:02}-{file_name_from(cell.column.label, 'column')}.png": cell
        for (i, j), cell in zip(places, cells, strict=True)
    }


def settings_data(request: CompareRequest, cells: Sequence[Cell], view: View, base: str) -> dict:
    rows, columns = request.rows, request.columns
    images = [
        {
            "row": rows.index(cell.row),
            "column": columns.index(cell.column),
            "file": name,
            "generated_with": cell.generated_with,
            "seconds": round(cell.seconds, 3),
        }
        for name, cell in named(request, cells).items()
    ]
    return request.to_dict() | {"base": base, "view": asdict(view), "images": images}


def settings_json(request: CompareRequest, cells: Sequence[Cell], view: View, base: str) -> str:
    return json.dumps(settings_data(request, cells, view, base), indent=1, ensure_ascii=False)


def write_zip(
    path: Path, request: CompareRequest, cells: Sequence[Cell], view: View, base: str, evidence: str = ""
) -> Path:
    with zipfile.ZipFile(path, "w") as archive:

        def add(name: str, content: str | bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content)

        add(SETTINGS, settings_json(request, cells, view, base))
        for name, cell in named(request, cells).items():
            add(IMAGES + name, png(cell.image))
        if cells:
            add("sheet.png", png(sheet(request, cells, base)))
        add("report.html", report(request, cells, base, evidence))
    return path


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Saved:
    """Data that was handed in and may be a comparison. `read(file)` gives an image's bytes, None without."""

    data: object
    read: Callable[[str], bytes | None]


def open_saved(paths: Sequence[Path]) -> Saved:
    """An archive, or a settings file with any of its images beside it.

    Raises:
        ValueError: it is neither.
    """
    archives = [path for path in paths if zipfile.is_zipfile(path)]
    settings = [path for path in paths if path.suffix.lower() == ".json"]
    if len(archives) == 1 and len(paths) == 1:
        return open_archive(archives[0])
    if len(settings) == 1 and not archives:
        beside = {path.name: path for path in paths}
        return Saved(parsed(bounded(settings[0])), lambda name: bounded(beside[name]) if name in beside else None)
    raise ValueError("Open one .zip of this page, or one settings .json, alone or together with its images")


def open_archive(path: Path) -> Saved:
    def read(name: str, most: int) -> bytes | None:
        try:
            with zipfile.ZipFile(path) as archive:
                if name not in archive.namelist():
                    return None
                info = archive.getinfo(name)
                if info.file_size > most:
                    raise ValueError(f"{name} in the archive has more than {most >> 20} MiB")
                if info.compress_type not in BOUNDED:
                    raise ValueError(f"{name} in the archive is packed in another way than this page packs")
                with archive.open(name) as file:
                    return file.read(most + 1)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, OSError) as problem:
            raise ValueError(f"The archive cannot be read: {problem}") from None

    settings = read(SETTINGS, MAX_SETTINGS_BYTES)
    if settings is None:
        raise ValueError(f"This archive is none of this page's: it holds no {SETTINGS}")
    return Saved(parsed(settings), lambda name: read(IMAGES + name, MAX_IMAGE_BYTES))


def bounded(path: Path) -> bytes:
    most = MAX_SETTINGS_BYTES if path.suffix.lower() == ".json" else MAX_IMAGE_BYTES
    if path.stat().st_size > most:
        raise ValueError(f"{path.name} has more than {most >> 20} MiB")
    return path.read_bytes()


def parsed(content: bytes) -> object:
    try:
        return upgraded(parsed_json(content))
    except ValueError:
        raise ValueError("This is not a settings file: it is no JSON") from None


def saved_view(data: dict, request: CompareRequest) -> View:
    """The view of settings; the grid where they name none that the request has."""
    view = data.get("view")
    view = asdict(View.of(request)) | view if isinstance(view, dict) else {}  # an older version says less
    if view.keys() != View.__dataclass_fields__.keys() or view["name"] not in VIEWS:
        return View.of(request)
    columns = len(request.columns)
    ends = {"row": len(request.rows), "left": columns, "right": columns}
    fits = all(type(view[name]) is int and 0 <= view[name] < end for name, end in ends.items())
    if not fits or type(view["transposed"]) is not bool or view["pages"] not in list(PageAxis):
        return View.of(request)
    view["pages"] = PageAxis(view["pages"])
    count = len(pages(request, view["pages"])[0])
    if type(view["page"]) is not int or not 0 <= view["page"] < max(1, count):
        view["page"] = 0
    return View(**view)


def saved_cells(data: dict, request: CompareRequest, read: Callable[[str], bytes | None]) -> list[Cell]:
    """The images of settings that are at hand, each at its place.

    Raises:
        ValueError: with everything that is wrong with them.
    """
    rows, columns, cells, found, room = request.rows, request.columns, {}, [], MAX_PIXELS
    for number, said in enumerate(data.get("images", []), start=1):
        if not sound(said, len(rows), len(columns)):
            found.append(f"image {number} of the settings has no place in them")
        elif content := read(said["file"]):
            i, j, words = said["row"], said["column"], said["generated_with"][:MAX_WORDS]
            try:
                image = decoded(content, room)
            except ValueError as problem:
                found.append(f"{said['file'][:MAX_WORDS]}: {problem}")
                continue
            room -= image.width * image.height
            cells[i, j] = Cell(rows[i], columns[j], image, words, float(said["seconds"]))
    if len(sizes := {cell.image.size for cell in cells.values()}) > 1:
        found.append(f"the images have different sizes: {', '.join(f'{w} x {h}' for w, h in sorted(sizes))}")
    if found:
        raise ValueError(joined("The images cannot be shown", found))
    return [cell for _, cell in sorted(cells.items())]


def sound(said: object, rows: int, columns: int) -> bool:
    if not isinstance(said, dict) or said.keys() != IMAGE_KEYS:
        return False
    places = all(
        type(said[name]) is int and 0 <= said[name] < end for name, end in (("row", rows), ("column", columns))
    )
    texts = all(isinstance(said[name], str) for name in ("file", "generated_with"))
    return places and texts and is_number(said["seconds"])


def decoded(content: bytes, most: int) -> Image.Image:
    """A PNG of at most so many pixels, of which a file of its size may have so many."""
    try:
        image = read_image(content, formats=("PNG",))
    except UnreadableImage:
        raise ValueError("it is no PNG that can be read") from None
    if image.width * image.height > most:
        raise ValueError(f"with it there are more than {MAX_PIXELS:,} pixels")
    return image.convert("RGB")
