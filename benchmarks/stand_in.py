"""diffusers' DreamBooth script where torchvision is not installed: its image transforms, by Pillow and torch.

    python -m benchmarks.stand_in path/to/train_dreambooth_lora.py ...its options

The script imports `torchvision.transforms` for six things: Compose, Resize, CenterCrop, RandomCrop, ToTensor, Normalize
(and the names of interpolations). torchvision computes them on Pillow images in the same way, and they take
milliseconds of a run. transformers and diffusers are told first that there is no torchvision, since they would look for
the rest of it. `benchmarks.run` uses this only where the package is not there, and says so in its results.
"""

import runpy
import sys
from collections.abc import Callable
from enum import Enum
from types import ModuleType

import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor


class InterpolationMode(Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Compose:
    def __init__(self, transforms: list[Callable]) -> None:
        self.transforms = transforms

    def __call__(self, value: object) -> object:
        for transform in self.transforms:
            value = transform(value)
        return value


class Resize:
    """The shorter side becomes `size`."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        self.size, self.resampling = size, Resampling[interpolation.name]

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        return image.resize((width, height), self.resampling)


class CenterCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def corner(self, image: Image.Image) -> tuple[int, int]:
        return round((image.width - self.size) / 2), round((image.height - self.size) / 2)

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = self.corner(image)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomCrop(CenterCrop):
    def corner(self, image: Image.Image) -> tuple[int, int]:
        free = (image.height - self.size, image.width - self.size)
        top, left = (int(torch.randint(0, room + 1, (1,))) for room in free)
        return left, top


class ToTensor:
    """[3, H, W] from 0 to 1."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, -1).permute(2, 0, 1).contiguous().float() / 255


class Normalize:
    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


def install() -> None:
    """Make `from torchvision import transforms` give the above."""
    import diffusers.utils.import_utils  # noqa: F401 (looks for torchvision when it is imported)
    from transformers.utils import is_torchvision_available

    assert not is_torchvision_available(), "it is installed; run the script itself"
    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    for item in (InterpolationMode, Compose, Resize, CenterCrop, RandomCrop, ToTensor, Normalize):
        setattr(transforms, item.__name__, item)
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
