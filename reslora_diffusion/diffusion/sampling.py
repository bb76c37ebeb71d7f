"""What each step of a run sees: batches as a pure function of (seed, step).

    example   the (step * global_batch + i)-th element of endless shuffled passes over the instance pictures;
              with prior preservation a class picture, shuffled by itself, joins each of them
    view      which crop and flip
    noise     of the autoencoder's posterior, of the forward process, and the timestep t ~ U{0..T-1}
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Example
from .randomness import Stream, generator, shuffled


@dataclass(frozen=True)
class Batch:
    """Instance examples, then as many class examples. Shapes: latents, noise [B, C, h, w]; timesteps, weights [B].

    `texts` [P, ...] holds each distinct prompt once; `prompt_index` [B] says whose is whose.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    texts: Tensor
    prompt_index: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Sampler:
    """Draws batches.

    Args:
        classes: class examples; none without prior preservation.
        scaling_factor: of the autoencoder.
        num_train_timesteps: T.
        noise_offset: standard deviation of the noise that the pixels of a channel share.
    """

    instances: Sequence[Example]
    classes: Sequence[Example]
    seed: int
    scaling_factor: float
    num_train_timesteps: int
    noise_offset: float = 0.0

    def batch(self, first: int, count: int) -> Batch:
        """The `count` draws of the run from number `first` on."""
        numbers = range(first, first + count)
        picked = [
            (self.instances[shuffled(self.seed, Stream.INSTANCE_ORDER, n, len(self.instances))], n, Stream.INSTANCE_NOISE)
            for n in numbers
        ]
        if self.classes:
            picked += [
                (self.classes[shuffled(self.seed, Stream.CLASS_ORDER, n, len(self.classes))], n, Stream.CLASS_NOISE)
                for n in numbers
            ]
        return self.collate([self.draw(example, stream, n) for example, n, stream in picked])

    def spread(self, first: int, count: int, total: int) -> Batch:
        """Instance draws with timesteps spread evenly over 0..T-1 as the number goes from 0 to `total`."""
        drawn = []
        for n in range(first, first + count):
            example, latents, noise, _ = self.draw(self.instances[n % len(self.instances)], Stream.INSTANCE_NOISE, n)
            drawn.append((example, latents, noise, int((n + 0.5) / total * self.num_train_timesteps)))
        return self.collate(drawn)

    def draw(self, example: Example, stream: Stream, number: int) -> tuple[Example, Tensor, Tensor, int]:
        """One example with its latents, noise and timestep."""
        source, shape = generator(self.seed, stream, number), example.mean.shape[1:]
        view = int(torch.randint(len(example.mean), (), generator=source))
        timestep = int(torch.randint(self.num_train_timesteps, (), generator=source))
        posterior_noise, noise = torch.randn(2, *shape, generator=source)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(shape[0], 1, 1, generator=source)
        latents = self.scaling_factor * example.latents(view, posterior_noise.to(example.mean.device))
        return example, latents, noise, timestep

    @staticmethod
    def collate(drawn: Sequence[tuple[Example, Tensor, Tensor, int]]) -> Batch:
        examples, latents, noise, timesteps = zip(*drawn, strict=True)
        texts = {example.prompt: example.text for example in examples}
        places = {prompt: place for place, prompt in enumerate(texts)}
        latents = torch.stack(latents)
        device = latents.device
        return Batch(
            latents=latents,
            noise=torch.stack(noise).to(device),
            timesteps=torch.tensor(timesteps, device=device),
            texts=torch.stack(list(texts.values())),
            prompt_index=torch.tensor([places[example.prompt] for example in examples], device=device),
            weights=torch.tensor([example.loss_weight for example in examples], device=device),
        )
