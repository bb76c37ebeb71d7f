"""Contact sheets: labels stay where they belong however long they are, and images keep their places."""

import os
import resource

import numpy as np
import pytest
from PIL import Image, ImageFont

from reslora_diffusion.diffusion.train.sheet import LEFT, MARGIN, contact_sheet, save_image, wrapped

SIDE = 60
LONG = "reslora-block:num_previous=2,merge_method=least_squares,learning_rate=2e-4 " + 30 * "long"


def images(color: str, count: int) -> list[Image.Image]:
    return [Image.new("RGB", (30, 30), color)] * count


def boxes_of(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of all pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def ink(sheet: Image.Image, box: tuple[int, int, int, int]) -> bool:
    return bool((np.asarray(sheet.crop(box)) < 128).any())


def test_a_long_head_stays_above_its_column_and_is_whole():
    sheet = contact_sheet({LONG: images("red", 1), " ": images("lime", 1)}, ["a"], SIDE)
    left, top, right, bottom = boxes_of(sheet, (255, 0, 0))
    assert (left, right - left, bottom - top) == (LEFT, SIDE, SIDE)
    assert boxes_of(sheet, (0, 255, 0)) == (right + MARGIN, top, right + MARGIN + SIDE, bottom)
    assert ink(sheet, (left, 0, right, top))
    assert not ink(sheet, (right, 0, sheet.width, top))
    assert not ink(sheet, (left, top - MARGIN // 2, right, top))  # nothing is hidden behind the image


def test_a_row_makes_room_for_a_label_that_is_taller_than_its_images():
    rows = [LONG, LONG, "b"]
    sheet = contact_sheet({"base": [*images("red", 2), *images("lime", 1)]}, rows, SIDE)
    lines = len(wrapped(LONG, LEFT - 2 * MARGIN, ImageFont.load_default(14)))
    assert lines > 8
    top, bottom = boxes_of(sheet, (255, 0, 0))[1], boxes_of(sheet, (0, 255, 0))[1]
    assert bottom - top > lines * 14
    assert not ink(sheet, (0, bottom - MARGIN, LEFT, bottom))
    assert not ink(sheet, (LEFT - MARGIN, 0, LEFT, sheet.height))
    assert sheet.height == bottom + SIDE + MARGIN


@pytest.mark.parametrize("text", [LONG, "", "a b", "W" * 40, "a-word_that,is:wide/and=joined"])
def test_lines_fit_and_nothing_is_lost(text):
    font = ImageFont.load_default(14)
    lines = wrapped(text, 50, font)
    assert all(font.getlength(line) <= 50 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_an_image_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    save_image(Image.new("RGB", (2, 2), "red"), path)
    before = path.read_bytes()

    def cut_off(image, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", cut_off)
    with pytest.raises(OSError, match="No space"):
        save_image(Image.new("RGB", (2, 2), "blue"), path)
    assert path.read_bytes() == before


def test_images_given_by_path_are_opened_one_at_a_time(tmp_path):
    paths = []
    for number in range(60):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (2, 2), (number, 0, 0)).save(paths[-1])
    columns = {f"step {n}": paths[n * 2 : n * 2 + 2] for n in range(30)}
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 8, before[1]))
    try:
        sheet = contact_sheet(columns, ["a", "a"], side=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    loaded = {label: [Image.open(path) for path in several] for label, several in columns.items()}
    assert sheet.tobytes() == contact_sheet(loaded, ["a", "a"], side=2).tobytes()
