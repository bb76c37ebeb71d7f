"""Colours: numbers in a file mean what its profile says, at every door that reads images."""

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dreambooth import arguments
from reslora_diffusion.diffusion.data.buckets import Buckets
from reslora_diffusion.diffusion.data.crops import Views
from reslora_diffusion.diffusion.data.scan import open_mask, open_upright, scan
from reslora_diffusion.diffusion.options.inventory import describe
from reslora_diffusion.utils.images import colour_of, read_image, upright_rgb

GREEN = (120, 220, 90)
TO_SRGB = np.array(
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.033454], [0.0719453, -0.2289914, 1.4052427]]
)
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])  # to XYZ, D50


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes, gamma: float) -> bytes:
    """An ICC profile (version 2): Adobe RGB (1998) with b"RGB ", grey of that gamma with b"GRAY"."""
    white = (0.9642, 1.0, 0.8249)
    name = b"Wide (test)"
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" * 80,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(s15, white)),
    }
    if space == b"RGB ":
        for channel, column in zip(b"rgb", ADOBE.T, strict=True):
            tags[bytes([channel]) + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(s15, column))
            tags[bytes([channel]) + b"TRC"] = curve
    else:
        tags[b"kTRC"] = curve
    table, data, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += tag + struct.pack(">II", at + len(data), len(value))
        data += value
    head = struct.pack(">I4sI4s4s4s", at + len(data), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + b"".join(map(s15, white))
    return head + b"\0" * (128 - len(head)) + table + data


WIDE, GREY = profile(b"RGB ", 2.2), profile(b"GRAY", 1.0)


def encoded(linear: np.ndarray) -> np.ndarray:
    """Levels of sRGB for linear light."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def expected_wide(colour: tuple[int, ...]) -> np.ndarray:
    """The colour by the definitions of both spaces, in float64."""
    return encoded(TO_SRGB @ (ADOBE @ (np.array(colour) / 255) ** (563 / 256)))


def saved(folder: Path, name: str, image: Image.Image, **how: object) -> Path:
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **how)
    return folder / name


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
def test_a_wide_space_is_converted_as_its_definition_says(tmp_path, name):
    colour = (120, 180, 100)  # within sRGB
    how = {".jpg": {"quality": 100}, ".webp": {"lossless": True}}.get(Path(name).suffix, {})
    path = saved(tmp_path / "f", name, Image.new("RGB", (8, 8), colour), icc_profile=WIDE, **how)
    found = np.array(open_upright(path).getpixel((4, 4)))
    assert np.abs(found - np.array(colour)).max() > 10
    np.testing.assert_allclose(found, expected_wide(colour), atol=2.5 if how else 1.5)


def test_it_is_what_colour_management_shows_whatever_the_mode(tmp_path):
    image = Image.new("RGB", (8, 8), GREEN)
    shown = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(WIDE)), ImageCms.createProfile("sRGB"))
    path = saved(tmp_path / "f", "a.png", image, icc_profile=WIDE)
    assert open_upright(path).getpixel((0, 0)) == shown.getpixel((0, 0)) != GREEN
    for mode in ("P", "RGBA"):
        other = image.quantize() if mode == "P" else image.convert(mode)
        path = saved(tmp_path / "f", f"{mode}.png", other, icc_profile=WIDE)
        assert open_upright(path).getpixel((0, 0)) == shown.getpixel((0, 0)), mode
    half = image.convert("RGBA")
    half.putalpha(Image.linear_gradient("L").resize((8, 8)))
    opacity = np.asarray(half.getchannel("A"), np.float64)[..., None] / 255
    on_white = opacity * np.asarray(shown, np.float64) + (1 - opacity) * 255
    path = saved(tmp_path / "f", "half.png", half, icc_profile=WIDE)
    np.testing.assert_allclose(np.asarray(open_upright(path), np.float64), on_white, atol=1.01)


def test_grey_follows_its_profile_in_8_and_16_bits(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)[None]
    expected = encoded(ramp[0] / 255.0)
    for name, pixels in (("8.png", ramp), ("16.tif", ramp.astype(np.uint16) * 257)):
        path = saved(tmp_path / "f", name, Image.fromarray(pixels), icc_profile=GREY)
        found = np.asarray(open_upright(path))[0]
        assert np.ptp(found, axis=1).max() <= 1
        np.testing.assert_allclose(found[8:, 0], expected[8:], atol=1.5)  # LittleCMS is coarse near black


def test_an_image_in_srgb_is_left_as_it_is_and_an_orientation_is_kept(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "f", "a.png", Image.fromarray(pixels), icc_profile=srgb)
    np.testing.assert_array_equal(np.asarray(open_upright(path)), pixels)
    assert scan(tmp_path / "f").images[0].profile is None
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "f", "b.png", Image.new("RGB", (4, 8), GREEN), icc_profile=WIDE, exif=exif)
    assert open_upright(path).size == (8, 4)
    assert open_upright(path).getpixel((0, 0)) != GREEN


def test_a_profile_that_cannot_be_followed_is_named_and_the_image_is_taken_for_srgb(tmp_path):
    image = Image.new("RGB", (8, 8), GREEN)
    saved(tmp_path / "f", "broken.png", image, icc_profile=b"no profile")
    saved(tmp_path / "f", "cut.png", image, icc_profile=WIDE[:200])
    saved(tmp_path / "f", "grey.png", image, icc_profile=GREY)
    saved(tmp_path / "f", "ink.jpg", Image.new("CMYK", (8, 8), (0, 255, 0, 0)))
    saved(tmp_path / "f", "wide.png", image, icc_profile=WIDE)
    found = scan(tmp_path / "f")
    assert found.problems == []
    said = "\n".join(describe(found, "instance", "a dog", Buckets(())))
    assert "converted to sRGB by their colour profiles: 1 (1 from Wide (test))" in said
    for name in ("broken.png (its colour profile cannot be read", "cut.png", "grey.png", "ink.jpg (it is CMYK without"):
        assert name in said.split("taken for sRGB: ")[1]
    for image in found.images[:3]:
        np.testing.assert_allclose(open_upright(image.path).getpixel((0, 0)), GREEN, atol=1)


def test_masks_are_numbers_and_not_colours(tmp_path):
    ramp = Image.linear_gradient("L").resize((8, 8))
    saved(tmp_path / "f", "a.png", Image.new("RGB", (8, 8), GREEN), icc_profile=WIDE)
    mask = saved(tmp_path / "m", "a.png", ramp, icc_profile=GREY)
    (image,) = scan(tmp_path / "f", masks=tmp_path / "m").images
    np.testing.assert_array_equal(np.asarray(open_mask(image, alpha=False)), np.asarray(ramp))
    assert image.mask == mask


def test_what_is_encoded_is_converted_and_its_cache_entry_is_another(tmp_path):
    saved(tmp_path / "f", "a.png", Image.new("RGB", (64, 64), GREEN), icc_profile=WIDE)
    (image,) = scan(tmp_path / "f").images
    views = Views(Buckets(((64, 64),)), Image.Resampling.BILINEAR, center_crop=True, crops=1, flip=False)
    shown = np.array(open_upright(image.path).getpixel((0, 0)))
    np.testing.assert_allclose((views.of(image).pixels[0, :, 0, 0] + 1) * 127.5, shown, atol=0.01)
    assert views.key(image) != views.key(replace(image, profile=None))


def test_an_upload_to_the_page_is_converted_once(tmp_path):
    images = pytest.importorskip("app.images")
    path = saved(tmp_path / "f", "a.png", Image.new("RGB", (8, 8), GREEN), icc_profile=WIDE)
    (read,) = images.read_images([str(path)], 1)
    read.save(tmp_path / "again.png")  # what the page hands to the trainer
    with Image.open(tmp_path / "again.png") as image:
        assert colour_of(image).profile is None
        assert upright_rgb(image).getpixel((0, 0)) == read.getpixel((0, 0)) == open_upright(path).getpixel((0, 0))
    deep = np.full((8, 8), 40_000, np.uint16)
    path = saved(tmp_path / "f", "deep.png", Image.fromarray(deep))
    assert images.read_images([str(path)], 1)[0].getpixel((0, 0)) == (156,) * 3


def test_images_of_a_dataset_are_converted(tmp_path):
    datasets = pytest.importorskip("datasets")
    from reslora_diffusion.diffusion.data.hub_dataset import images_of_dataset

    image = io.BytesIO()
    Image.new("RGB", (8, 8), GREEN).save(image, "PNG", icc_profile=WIDE)
    rows = datasets.Dataset.from_dict({"image": [{"bytes": image.getvalue(), "path": None}]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "d" / "train.parquet")
    args = arguments(tmp_path / "out", instance_data_dir=None, dataset_name=tmp_path / "d", cache_dir=tmp_path / "c")
    (image,) = scan(images_of_dataset(args)).images
    assert image.profile == "Wide (test)"
    assert open_upright(image.path).getpixel((0, 0)) != GREEN


def png_of_16_bits(kind, channels, transparent):
    """Half of one colour, half of another, of which one is transparent by its value (tRNS)."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    other = [value - 300 for value in channels]
    rows = [b"\0" + struct.pack(f">{len(channels) * 4}H", *(channels * 2 + other * 2))] * 4
    header = struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0)
    shown = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(f">{len(channels)}H", *transparent))
    return b"\x89PNG\r\n\x1a\n" + shown + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "channels"), [(0, [30000]), (2, [30000, 5000, 60000])])
def test_what_is_transparent_by_a_value_of_16_bits_is_white(kind, channels):
    image = upright_rgb(read_image(png_of_16_bits(kind, channels, channels)))
    left, right = image.getpixel((0, 0)), image.getpixel((3, 3))
    assert left == (255, 255, 255)
    wanted = [value - 300 for value in channels] * (3 // len(channels))
    assert all(abs(got * 257 - value) <= 257 for got, value in zip(right, wanted, strict=True))


def test_a_flat_drawing_of_a_poster_is_read():
    """4096 x 6144 pixels of a few colours take some kilobytes."""
    buffer = io.BytesIO()
    Image.new("P", (4096, 6144)).save(buffer, "PNG")
    assert read_image(buffer.getvalue()).size == (4096, 6144)
