"""Images as a model is to see them: upright, 8 bits, sRGB, and white where they are transparent.

    file  ->  turned as EXIF says  ->  8 bits  ->  sRGB by its colour profile (ICC)  ->  on white  ->  RGB

Numbers mean colours only together with a profile: the same green is (120, 220, 90) in Adobe RGB and (27, 221, 86) in
sRGB. Models are trained on sRGB and write it. A file without a profile is taken for sRGB, as browsers do; grey and CMYK
profiles are followed too. Opacity is never converted.
"""

import io
import struct
import zlib
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageCms, ImageOps

from .problems import BAD_DATA, printable

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # none of them runs another program, as EPS does
# A few kilobytes can say that they are gigabytes of white. Flat drawings of 4096 x 6144 and 7680 x 4320 pixels pass.
MOST_PIXELS, PIXELS_PER_BYTE = 2**25, 8
# What Pillow raises on files that are damaged or made to break it.
UNREADABLE = (
    *BAD_DATA,
    OSError,
    SyntaxError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
ROUNDING = 2  # levels of 255 by which profiles of sRGB differ among each other
CHANNELS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # Pillow's mode for the colour space of a profile


class Colour(NamedTuple):
    """The effect of a file's profile on its colours; at most one of the three fields is given."""

    profile: str | None = None  # name of the profile that it is converted from
    fault: str | None = None  # why its profile is not followed
    transform: ImageCms.ImageCmsTransform | None = None


class UnreadableImage(ValueError):
    """A file is no image that can be used; says why in a line."""


class NoImage(UnreadableImage):
    """The decoders cannot read it: it is damaged, or something else."""


@cache
def known_formats() -> tuple[str, ...]:
    """Return the `FORMATS` that the installed Pillow reads; the several images of a phone's MPO are read as a JPEG."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_image(source: Path | bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """An image of a file, decoded, upright, of 8 bits; its colours are still those of its profile.

    Raises:
        NoImage: the decoders cannot read it.
        UnreadableImage: it has more pixels than a file of its size is given, or says no colours.
        OSError: there is no such file.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    most = max(MOST_PIXELS, PIXELS_PER_BYTE * len(data))
    try:
        with Image.open(io.BytesIO(data), formats=formats or known_formats()) as image:
            if image.width * image.height > most:
                raise ValueError(
                    f"{image.width} x {image.height} pixels in {len(data):,} bytes; wanted it made smaller"
                )
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return eight_bits(image)
    except UNREADABLE as error:
        reason = str(error).partition(" <_io.BytesIO")[0].strip()
        kind = UnreadableImage if type(error) is ValueError else NoImage
        raise kind(printable(reason or type(error).__name__)) from None


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by its upper 8, and its transparent value as opacity: Pillow's own conversion makes all above 255
    white, and looks for the value of 16 bits among those of 8.

    Raises:
        ValueError: floating point, which may be of any range.
    """
    if image.mode == "F":
        raise ValueError("floating point (mode F) does not say what is white; wanted 8 or 16 bits")
    transparent = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):  # older Pillow reads 16 bits as I
        info, wide = image.info, image.convert("I")
        image = wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")
        image.info = {key: value for key, value in info.items() if key != "transparency"}
        if isinstance(transparent, int):
            import numpy as np  # rare, and nobody else waits for it

            image.putalpha(Image.fromarray((np.asarray(wide) != transparent).astype(np.uint8) * 255))
    elif isinstance(transparent, tuple) and max(transparent) > 255:  # of 16 bits, of which Pillow reads the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def opaque_mode(image: Image.Image) -> str:
    """The mode of an image's colours: RGB for palettes and other encodings of RGB."""
    return {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")


def colour_of(image: Image.Image) -> Colour:
    """Return how an image is converted to sRGB; one whose profile is sRGB up to rounding is not converted."""
    profile = image.info.get("icc_profile")
    if not profile:
        missing = "it is CMYK without a colour profile" if image.mode == "CMYK" else None
        return Colour(fault=missing)
    return colour_of_profile(bytes(profile), opaque_mode(image))


@lru_cache(maxsize=64)
def colour_of_profile(profile: bytes, mode: str) -> Colour:
    """`colour_of` for an image of this mode with this profile."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = CHANNELS.get(source.profile.xcolor_space)
        if space is None or (space != mode and not (space == "RGB" and mode == "L")):
            return Colour(fault=f"its colour profile is for {source.profile.xcolor_space.strip()}, not for {mode}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), space, "RGB")
        name = " ".join((source.profile.profile_description or "").split()) or "a profile without a name"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return Colour(fault=f"its colour profile cannot be read ({str(error).strip() or type(error).__name__})")
    if space == "RGB" and is_identity(transform):
        return Colour()
    return Colour(profile="".join(c for c in name if c.isprintable())[:60], transform=transform)


def is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether a transform of RGB leaves a grid of colours as they are, up to rounding."""
    colours = list(product(range(0, 256, 51), repeat=3))
    grid = Image.new("RGB", (len(colours), 1))
    grid.putdata(colours)
    before, after = grid.tobytes(), transform.apply(grid).tobytes()
    return max(abs(a - b) for a, b in zip(before, after, strict=True)) <= ROUNDING


def in_srgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits with its colours in sRGB, as L, RGB or RGBA; its profile is dropped."""
    colour = colour_of(image)
    alpha = None
    if image.has_transparency_data:
        alpha = (image if image.mode in ("LA", "RGBA") else image.convert("RGBA")).getchannel("A")
    flat = image.convert(opaque_mode(image)) if image.mode not in ("L", "RGB", "CMYK") else image
    if colour.transform is not None:
        flat = flat.convert(colour.transform.input_mode)
        flat = colour.transform.apply(flat)
    elif flat.mode == "CMYK" or alpha is not None:
        flat = flat.convert("RGB")
    else:
        flat = flat.copy()
    if alpha is not None:
        flat.putalpha(alpha)
    flat.info.pop("icc_profile", None)  # else whoever saves and opens it converts it again
    flat.info.pop("transparency", None)
    return flat


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB in sRGB, turned as its EXIF orientation says, and white where it is transparent."""
    image = in_srgb(eight_bits(ImageOps.exif_transpose(image)))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
