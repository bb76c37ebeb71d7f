"""The examples of each step: batches as a pure function of (seed, step).

    example   the (step * global_batch + i)-th element of endless shuffled passes over the instance images;
              with prior preservation a class image of the same concept, shuffled by itself, joins each of them
    view      which crop and flip
    noise     of the autoencoder's posterior, of the forward process, and the timestep (`processes`)
    text      a wording of the example's, or the empty prompt's with probability caption_dropout, and in each
              dropped_pass-th pass over the data

Examples of several sizes (aspect-ratio buckets) are drawn so that the instances of a micro-step are of one size; what
differs in size nevertheless, such as class images, is a batch of its own, and the losses add up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.families import Texts, Tokens
from ..objective.drawn_noise import NoiseRecipe
from ..objective.noise import Process
from ..objective.randomness import Stream, generator, shuffled
from .encode import Example, Text


@dataclass(frozen=True)
class Batch:
    """Examples of one size. Shapes: latents, noise [B, C, h, w]; timesteps, weights [B]; time_ids [B, 6].

    `texts` holds each distinct prompt once; `prompt_index` [B] says whose is whose. `masks` [B, 1, h, w],
    if any example has one. `input_noise` [B, C, h, w] is what x_t is made with, if it is not the noise.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    texts: Texts | Tokens
    prompt_index: Tensor
    weights: Tensor
    time_ids: Tensor
    masks: Tensor | None = None
    input_noise: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """One example with what was drawn for it."""

    example: Example
    posterior_noise: Tensor
    noise: Tensor
    timestep: int
    view: int
    text: Text
    prompt: str
    input_noise: Tensor | None = None


@lru_cache(maxsize=8)
def chunks(seed: int, epoch: int, sizes: tuple[int, ...], count: int) -> list[list[int]]:
    """A shuffled pass over examples, `sizes[i]` being the size class of example i, in chunks of `count` of one size.

    The last chunk of a size is filled up with its first examples.
    """
    source = generator(seed, Stream.INSTANCE_ORDER, epoch)
    order = torch.randperm(len(sizes), generator=source).tolist()
    cut = []
    for size in dict.fromkeys(sizes):
        members = [place for place in order if sizes[place] == size]
        total = -(-len(members) // count) * count
        filled = [members[n % len(members)] for n in range(total)]
        cut += [filled[n : n + count] for n in range(0, total, count)]
    return [cut[place] for place in torch.randperm(len(cut), generator=source).tolist()]


@dataclass(frozen=True)
class Sampler:
    """Draws batches.

    Args:
        instances: an example as often as a pass shall show it.
        classes: class examples by concept; none without prior preservation.
        scaling_factor, shift_factor: of the autoencoder.
        process: which timesteps are drawn.
        empty: text of the empty prompt, for caption_dropout and dropped_pass.
        draws_per_step: instances that a step of all processes trains.
        recipe: how noise is drawn.
    """

    instances: Sequence[Example]
    classes: Mapping[int, Sequence[Example]]
    seed: int
    scaling_factor: Tensor | float
    process: Process
    shift_factor: Tensor | float = 0.0
    empty: Text | None = None
    caption_dropout: float = 0.0
    dropped_pass: int = 0
    draws_per_step: int = 1
    warmup_scale: float = 1.0  # factor on the steps in which captions grow; with 0 they have all tags from the start
    recipe: NoiseRecipe = NoiseRecipe()
    sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        known = {shape: number for number, shape in enumerate(dict.fromkeys(e.shape for e in self.instances))}
        object.__setattr__(self, "sizes", tuple(known[example.shape] for example in self.instances))

    def to_measure(self, examples: Sequence[Example], seed: int) -> "Sampler":
        """The sampler that draws these examples alone, each with its whole prompt."""
        own = replace(self, instances=examples, classes={}, seed=seed)
        return replace(own, caption_dropout=0.0, dropped_pass=0, warmup_scale=0.0)

    def order(self, first: int, count: int) -> list[Example]:
        """Examples of `count` draws of the run from number `first` on."""
        if self.has_one_size:
            places = [
                shuffled(self.seed, Stream.INSTANCE_ORDER, n, len(self.instances)) for n in range(first, first + count)
            ]
        else:
            number, turn = self.place(first, count)
            places = chunks(self.seed, number, self.sizes, count)[turn]
        return [self.instances[place] for place in places]

    @property
    def has_one_size(self) -> bool:
        return len(set(self.sizes)) == 1

    def place(self, number: int, count: int) -> tuple[int, int]:
        """`(pass, place in it)` of draw `number`. With several sizes the `count` draws of a batch are one place."""
        if self.has_one_size:
            return divmod(number, len(self.instances))
        return divmod(number // count, len(chunks(self.seed, 0, self.sizes, count)))

    def is_dropped(self, number: int, count: int) -> bool:
        """Return whether draw `number`, one of `count` of a batch, is in a pass without prompts."""
        return bool(self.dropped_pass) and (self.place(number, count)[0] + 1) % self.dropped_pass == 0

    def batches(self, first: int, count: int) -> list[Batch]:
        """The `count` draws of the run from number `first`, a multiple of `count`, on."""
        drawn = []
        for n, example in enumerate(self.order(first, count), first):
            drawn.append(self.draw(example, Stream.INSTANCE_NOISE, n, dropped=self.is_dropped(n, count)))
        for n, draw in enumerate(drawn.copy(), first):
            if images := self.classes.get(draw.example.concept):
                example = images[shuffled(self.seed, Stream.CLASS_ORDER, n, len(images))]
                drawn.append(self.draw(example, Stream.CLASS_NOISE, n, dropped=self.is_dropped(n, count)))
        return self.by_size(drawn)

    def spread(self, first: int, count: int, total: int) -> list[Batch]:
        """Instance draws with timesteps spread evenly over those that are trained, as the number goes from 0 to
        `total`."""
        drawn, span = [], self.process.span
        for n in range(first, first + count):
            timestep = span[int((n + 0.5) / total * len(span))]
            drawn.append(self.draw(self.instances[n % len(self.instances)], Stream.INSTANCE_NOISE, n, timestep))
        return self.by_size(drawn)

    def draw(
        self, example: Example, stream: Stream, number: int, timestep: int | None = None, dropped: bool = False
    ) -> Draw:
        """Make draw `number` of a stream of an example; `timestep` replaces a drawn one, to measure on."""
        source = generator(self.seed, stream, number)
        view = int(torch.randint(len(example.mean), (), generator=source))
        drawn_timestep = self.process.draw(source, example.shape)
        posterior_noise, noise = torch.randn(2, *example.shape, generator=source)
        noise = self.recipe.shaped(noise, self.channel_means(example, view, posterior_noise), source)
        if self.caption_dropout:
            dropped |= torch.rand((), generator=source).item() < self.caption_dropout
        worded = example.texts
        prompt, own = worded[int(torch.randint(len(worded), (), generator=source)) if len(worded) > 1 else 0]
        if example.warmup and self.warmup_scale:
            prompt, own = example.warmup.at(int(number // self.draws_per_step / self.warmup_scale)) or (prompt, own)
        text = self.empty if dropped else own
        assert text is not None, "captions are dropped only where there is an empty prompt"
        return Draw(
            example,
            posterior_noise=posterior_noise,
            noise=noise,
            timestep=drawn_timestep if timestep is None else timestep,
            view=view,
            text=text,
            prompt="" if dropped else prompt,
            input_noise=None if timestep is not None else self.recipe.perturbed(noise, source),
        )

    def channel_means(self, example: Example, view: int, posterior_noise: Tensor) -> Tensor:
        """The mean of each channel of a view's latents [C], on the CPU; zeros where the noise does not depend on it."""
        if not self.recipe.adaptive_noise_scale:
            return torch.zeros(example.shape[0])
        mean, logvar = example.mean[view].cpu()[None], example.logvar[view].cpu()[None]
        return normalised(mean, logvar, posterior_noise, self.scaling_factor, self.shift_factor)[0].mean((1, 2))

    def by_size(self, drawn: Sequence[Draw]) -> list[Batch]:
        """Batches of draws of equal size, in the order in which the sizes come."""
        groups: dict[torch.Size, list[Draw]] = {}
        for draw in drawn:
            groups.setdefault(draw.example.shape, []).append(draw)
        return [collate(group, self.scaling_factor, self.shift_factor) for group in groups.values()]


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors as one, with zeros at the end of shorter ones."""
    if len({len(part) for part in parts}) == 1:
        return torch.stack([*parts])
    return pad_sequence([*parts], batch_first=True)


def together(texts: Sequence[Text]) -> Text:
    """Prompts as one batch, padded where they are not equally long."""
    kind = cast(Callable[..., Text], type(texts[0]))
    found = kind(*(None if parts[0] is None else stacked(parts) for parts in zip(*texts, strict=True)))
    lengths = [len(text.hidden) for text in texts if isinstance(text, Texts)]
    if len(set(lengths)) < 2:
        return found
    places = torch.arange(max(lengths))
    mask = torch.stack([places < length for length in lengths])
    return found._replace(mask=to_device(mask, cast(Texts, found).hidden.device))


def normalised(
    mean: Tensor, logvar: Tensor, noise: Tensor, scaling_factor: Tensor | float, shift_factor: Tensor | float
) -> Tensor:
    """Latents drawn from the posterior [..., C, h, w], as the denoiser reads them."""
    scaling_factor, shift_factor = (
        value.to(mean.device) if isinstance(value, Tensor) else value for value in (scaling_factor, shift_factor)
    )
    return scaling_factor * (mean + torch.exp(0.5 * logvar) * noise - shift_factor)


def collate(drawn: Sequence[Draw], scaling_factor: Tensor | float, shift_factor: Tensor | float) -> Batch:
    texts = {draw.prompt: draw.text for draw in drawn}
    places = {prompt: place for place, prompt in enumerate(texts)}
    mean, logvar = (torch.stack([getattr(d.example, name)[d.view] for d in drawn]) for name in ("mean", "logvar"))
    device = mean.device
    posterior_noise = to_device(torch.stack([draw.posterior_noise for draw in drawn]), device)
    inputs = [draw.input_noise for draw in drawn if draw.input_noise is not None]
    masks = None
    if any(draw.example.mask is not None for draw in drawn):
        whole = torch.ones(1, *mean.shape[2:], device=device)
        masks = torch.stack([whole if d.example.mask is None else d.example.mask[d.view] for d in drawn])
    return Batch(
        latents=normalised(mean, logvar, posterior_noise, scaling_factor, shift_factor),
        noise=to_device(torch.stack([draw.noise for draw in drawn]), device),
        timesteps=to_device(torch.tensor([draw.timestep for draw in drawn]), device),
        texts=together([*texts.values()]),
        prompt_index=to_device(torch.tensor([places[draw.prompt] for draw in drawn]), device),
        weights=to_device(torch.tensor([draw.example.loss_weight for draw in drawn]), device),
        time_ids=torch.stack([draw.example.time_ids[draw.view] for draw in drawn]),
        masks=masks,
        input_noise=None if not inputs else to_device(torch.stack(inputs), device),
    )


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting for the device to be done with earlier steps."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
