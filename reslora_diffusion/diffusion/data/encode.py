"""Images and prompts are encoded once; `data.crops` cuts what is encoded.

An `Example` holds an image's latent distribution and its prompt in one record: neither can be paired with another's.
An example stores the mean and log-variance that the autoencoder gives for each view (crop, flip), not one sample of
them: every step draws anew,

    latents = scaling_factor * (mean + exp(logvar / 2) * noise - shift_factor)

A frozen text encoder is applied once; for one that is trained, an example holds tokens. Equal prompts share a tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..models.families import Texts, Tokens
from .crops import Pixels, Views
from .disk_cache import DiskCache
from .scan import ScannedImage

Text = Texts | Tokens  # of one prompt, so without the first dimension
Moments = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Warmup:
    """Wordings of a prompt with more and more of its tags, which take turns in the first `steps` steps (kohya's
    token_warmup_step)."""

    steps: int
    texts: Sequence[tuple[str, Text]]

    def at(self, step: int) -> tuple[str, Text] | None:
        """Return the wording of a step, from 0; None once it is the whole prompt's turn."""
        return self.texts[step * len(self.texts) // self.steps] if step < self.steps else None


@dataclass(frozen=True)
class Example:
    """One image and its prompt, of one concept. `texts` holds the wordings of its prompt, one as often as it is to be
    drawn; mostly there is one.

    Shapes: mean, logvar [views, C, h, w]; mask [views, 1, h, w]; time_ids [views, 6].
    """

    name: str
    mean: Tensor
    logvar: Tensor
    texts: Sequence[tuple[str, Text]]
    loss_weight: float
    time_ids: Tensor
    mask: Tensor | None = None
    concept: int = 0
    warmup: Warmup | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the latents."""
        return self.mean.shape[1:]


@torch.no_grad()
def encode_images(
    vae: Any,
    images: list[ScannedImage],
    views: Views,
    *,
    prompt: str | None,
    texts: Mapping[str, Sequence[tuple[str, Text]]],
    moments: Moments,
    warmups: Mapping[str, Warmup] | None = None,
    loss_weight: float = 1.0,
    concept: int = 0,
    batch_size: int = 4,
    threads: int = 0,
    progress: str | None = None,
    cache: DiskCache | None = None,
    vae_identity: str = "",
) -> list[Example]:
    """Examples of images, in their order.

    Args:
        vae: in the precision to encode with.
        prompt: of images without a caption.
        texts: for each prompt its wordings, and what the training step needs of each.
        warmups: for prompts that begin with some of their tags.
        moments: mean and log-variance that `vae` gives for pixels, as the family has it.
        batch_size: views that the autoencoder sees at once.
        threads: that decode images.
        progress: title of the progress bar; none if None.
        cache: read before anything is encoded, and written to afterwards.
        vae_identity: identifies `vae` in the keys of `cache`.
    """
    examples = []

    def read(image: ScannedImage) -> tuple[dict[str, Any], dict[str, Tensor] | None, Pixels | None]:
        """Its key in the cache; its encoded views if the cache has them, else its pixels."""
        key = {"kind": "latents", "vae": vae_identity, "cell": views.vae_scale_factor, **views.key(image)}
        found = cache.load(key) if cache else None
        return key, found, views.of(image) if found is None else None

    with (
        ThreadPoolExecutor(max(1, threads)) as pool,
        tqdm(total=len(images), desc=progress, unit="image", disable=progress is None) as bar,
    ):
        for some in batched(images, batch_size * max(1, threads)):
            for image, (key, found, pixels) in zip(some, pool.map(read, some), strict=True):
                if found is None:
                    assert pixels is not None, "they are read where the cache has nothing"
                    found = encode(vae, pixels, batch_size, moments)
                    if cache:
                        cache.store(key, found)
                examples.append(
                    Example(
                        name=image.path.name,
                        texts=texts[str(image.caption or prompt)],
                        warmup=(warmups or {}).get(str(image.caption or prompt)),
                        loss_weight=loss_weight,
                        concept=concept,
                        **{name: value.to(vae.device) for name, value in found.items()},
                    )
                )
                bar.update()
    return examples


def encode(vae: Any, views: Pixels, batch_size: int, moments: Moments) -> dict[str, Tensor]:
    """The tensors of an `Example`."""
    parts = torch.from_numpy(views.pixels).split(batch_size)
    found = zip(*(moments(vae, part.to(vae.device, vae.dtype)) for part in parts), strict=True)
    tensors = {name: torch.cat(part).float() for name, part in zip(("mean", "logvar"), found, strict=True)}
    tensors["time_ids"] = torch.from_numpy(views.time_ids)
    return tensors if views.mask is None else tensors | {"mask": torch.from_numpy(np.ascontiguousarray(views.mask))}


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some
