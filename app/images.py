"""Images as people hand them in, converted as the trainer converts them: upright, in sRGB, on white."""

from pathlib import Path

from PIL import Image

from reslora_diffusion.utils import images as stored

from .foreign import printable

MAX_SIDE = 1024
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_image(path: Path, side: int = MAX_SIDE) -> Image.Image:
    """In RGB, at most `side` wide and high.

    Raises:
        ValueError: it is no image that can be read, and why where the reason is ours.
    """
    try:
        image = stored.upright_rgb(stored.read_image(path))
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, (OSError, stored.NoImage)) else f" ({error})"
        raise ValueError(f"{printable(path.name)}{reason}") from None
    image.thumbnail((side, side))
    return image


def read_images(paths: list[str], most: int) -> list[Image.Image]:
    """At most `most` images.

    Raises:
        ValueError: there are too many, or some are no images.
    """
    if len(paths) > most:
        raise ValueError(f"{len(paths)} images; at most {most} are read")
    images, broken = [], []
    for path in paths:
        try:
            images.append(read_image(Path(path)))
        except ValueError as problem:
            broken.append(str(problem))
    if broken:
        raise ValueError(f"no images: {', '.join(broken)}")
    return images


def images_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
