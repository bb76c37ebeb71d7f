"""A comparison as files, and back; and what is refused of files from elsewhere."""

import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")

from app.compare import Cell
from app.output import png
from app.request import Adapter, CompareRequest
from app.saved import MAX_PIXELS, VIEWS, View, open_saved, saved_cells, saved_view, settings_json, write_zip

ADAPTER = Adapter("a × b", "/here/file.safetensors", "d" * 64)
ASKED = CompareRequest(prompts=("a cat", "a dog"), seeds=(0, 7), adapters=(ADAPTER,), strengths=(0.5, 1.0))
VIEW = View("Flip", 3, 2, 1)


def generated(request: CompareRequest = ASKED) -> list[Cell]:
    noise = np.random.default_rng(0)
    return [
        Cell(row, column, Image.fromarray(noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)), f"with {j}", 0.25)
        for row in request.rows
        for j, column in enumerate(request.columns)
    ]


def same(some: list[Cell], others: list[Cell]) -> bool:
    facts = [[(c.row, c.column, c.generated_with, c.seconds, png(c.image)) for c in cells] for cells in (some, others)]
    return facts[0] == facts[1]


def reopened(paths: list[Path]) -> tuple[CompareRequest, list[Cell], View]:
    saved = open_saved(paths)
    request = CompareRequest.from_dict(saved.data, {ADAPTER.sha256: ADAPTER.path})
    return request, saved_cells(saved.data, request, saved.read), saved_view(saved.data, request)


@pytest.fixture
def archive(tmp_path) -> Path:
    return write_zip(tmp_path / "all.zip", ASKED, generated(), VIEW, "base")


def altered(archive: Path, change: dict[str, bytes | None]) -> Path:
    """The archive with some of its files replaced, or left out."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(archive.with_name("altered.zip"), "w") as new:
        for name in old.namelist():
            content = change.get(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return archive.with_name("altered.zip")


def with_settings(archive: Path, **change: object) -> Path:
    with zipfile.ZipFile(archive) as old:
        data = json.loads(old.read("settings.json")) | change
    return altered(archive, {"settings.json": json.dumps(data).encode()})


def first_image(archive: Path) -> str:
    with zipfile.ZipFile(archive) as old:
        return next(name for name in old.namelist() if name.startswith("images/"))


# ------------------------------------------------------------------------------------------------------ round


def test_the_archive_brings_back_controls_images_and_view(archive):
    request, cells, view = reopened([archive])
    assert request == ASKED
    assert same(cells, generated())
    assert view == VIEW


def test_settings_with_any_of_their_images_beside_them(archive, tmp_path):
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path)
    images = sorted((tmp_path / "images").iterdir())
    request, cells, view = reopened([tmp_path / "settings.json", *images[1:3]])
    assert (request, view) == (ASKED, VIEW)
    assert same(cells, generated()[1:3])
    assert reopened([tmp_path / "settings.json"])[1] == []


def test_a_stopped_comparison_comes_back_as_it_was(tmp_path):
    cells = generated()[:4]
    assert same(reopened([write_zip(tmp_path / "some.zip", ASKED, cells, View(), "base")])[1], cells)
    assert reopened([write_zip(tmp_path / "none.zip", ASKED, [], View(), "base")])[1] == []


def test_equal_comparisons_make_equal_archives(archive, tmp_path):
    again = write_zip(tmp_path / "again.zip", ASKED, generated(), VIEW, "base")
    assert again.read_bytes() == archive.read_bytes()


def test_settings_name_their_base():
    assert json.loads(settings_json(ASKED, generated(), VIEW, "sticker-sd"))["base"] == "sticker-sd"


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"{'a': 1}", b'{"prompts": ["\\ud800"]}'])
def test_files_that_are_no_settings_are_refused(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(ValueError, match="not a settings file"):
        open_saved([tmp_path / "settings.json"])


def test_large_settings_are_not_read(tmp_path, archive):
    (tmp_path / "settings.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ValueError, match="more than 1 MiB"):
        open_saved([tmp_path / "settings.json"])
    with pytest.raises(ValueError, match="more than 1 MiB"):
        open_saved([altered(archive, {"settings.json": b" " * (2**20 + 1)})])


@pytest.mark.parametrize("names", [[], ["a.png"], ["a.zip", "b.zip"], ["a.json", "b.json"], ["a.json", "b.zip"]])
def test_what_is_not_one_comparison_is_refused(archive, tmp_path, names):
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_bytes(archive.read_bytes() if path.suffix == ".zip" else b"{}")
    with pytest.raises(ValueError, match=r"Open one \.zip"):
        open_saved(paths)


def test_foreign_archives_are_refused(archive):
    with pytest.raises(ValueError, match=r"holds no settings\.json"):
        open_saved([altered(archive, {"settings.json": None})])


def test_a_damaged_archive_is_refused(archive):
    content = bytearray(archive.read_bytes())
    name = first_image(archive)
    place = content.index(name.encode()) + len(name) + 40
    content[place] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be"):
        reopened([archive])


def bomb() -> bytes:
    """A small PNG that says it is 60,000 x 60,000."""
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    crc = zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + crc


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "GIF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\x80\x04a pickle", "no PNG"), (gif(), "no PNG"), (bomb(), "no PNG|more than"),
     (png(Image.new("RGB", (8, 8))), "different sizes"), (b"\x89PNG\r\n\x1a\n", "no PNG")],
)  # fmt: skip
def test_images_that_are_none_are_refused(archive, content, words):
    with pytest.raises(ValueError, match=words):
        reopened([altered(archive, {first_image(archive): content})])


def test_no_more_pixels_are_decoded_than_fit(archive, monkeypatch):
    assert MAX_PIXELS >= 100 * 1024**2
    monkeypatch.setattr("app.saved.MAX_PIXELS", 16 * 16 * 3)
    with pytest.raises(ValueError, match="more than 768 pixels"):
        reopened([archive])


@pytest.mark.parametrize(
    "image",
    [{"row": 4}, {"row": -1}, {"row": True}, {"column": 3}, {"file": 5}, {"seconds": "1"}, {"seconds": float("inf")},
     {"seconds": 10**400},
     {"more": 1}],
)  # fmt: skip
def test_images_without_a_place_are_refused(archive, image):
    sound = {"row": 0, "column": 0, "file": first_image(archive)[7:], "generated_with": "", "seconds": 1.0}
    reopened([with_settings(archive, images=[sound])])
    with pytest.raises(ValueError, match="image 1 of the settings has no place"):
        reopened([with_settings(archive, images=[sound | image])])


@pytest.mark.parametrize("name", ["../settings.json", "/etc/passwd", "../../x.png"])
def test_no_name_leads_out_of_the_archive(archive, tmp_path, name):
    """A name is only looked up among what was handed in; nothing is read or written elsewhere."""
    said = [{"row": 0, "column": 0, "file": name, "generated_with": "", "seconds": 1.0}]
    assert reopened([with_settings(archive, images=said)])[1] == []
    (tmp_path / "settings.json").write_text(json.dumps(ASKED.to_dict() | {"images": said}))
    assert reopened([tmp_path / "settings.json"])[1] == []


@pytest.mark.parametrize(
    "view", [None, 3, {}, {"name": "Evil", "row": 0, "left": 0, "right": 0}, {"name": "Flip", "row": 9, "left": 0,
             "right": 0}, {"name": "Flip", "row": "0", "left": 0, "right": 0}],
)  # fmt: skip
def test_a_view_that_is_none_becomes_the_grid(view):
    assert saved_view({"view": view}, ASKED) == View(VIEWS[0], 0, 0, 2)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_whose_unpacking_no_read_can_bound_is_refused(archive, packing):
    other = archive.with_name("other.zip")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(other, "w", packing) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"settings\.json in the archive is packed in another way"):
        reopened([other])
