"""Pictures as people hand them in: opened by Pillow, upright, in sRGB, on white where they are transparent."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from reslora_diffusion.utils.images import upright_rgb

MAX_SIDE = 1024
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_pictures(paths: list[str], most: int) -> list[Image.Image]:
    """At most `most` pictures in RGB, at most `MAX_SIDE` wide and high.

    Raises:
        ValueError: there are too many, or some are no pictures.
    """
    if len(paths) > most:
        raise ValueError(f"{len(paths)} pictures; at most {most} are read")
    pictures, broken = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                picture = upright_rgb(image)
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
            pictures.append(picture)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            broken.append(Path(path).name)
    if broken:
        raise ValueError(f"no pictures: {', '.join(broken)}")
    return pictures


def pictures_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
