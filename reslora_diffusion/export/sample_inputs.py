"""A few random inputs of a transformers model, from its configuration: what its outputs can be compared on.

    text              input_ids [1, T], and decoder_input_ids [1, T] of encoder-decoders
    images, sound     pixel_values [1, channels, height, width], input_features [1, bands, frames], input_values [1, N]
    text and images   both, where text alone is refused, as by CLIP

There is one row, so no padding is needed. Configurations differ; `candidates` are tried in turn.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
TOKENS = 16
SAMPLES = 16000  # of sound: a second


def candidates(model: nn.Module, tokens: Sequence[int] = ()) -> Iterator[Inputs]:
    """Inputs that a model may take, likeliest first; nothing for what is no model of transformers.

    Args:
        model: its device and precision are those of the inputs.
        tokens: ids that shall be among the tokens, because they have been trained.
    """
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not hasattr(config, "get_text_config"):
        return
    text, generator = config.get_text_config(), torch.Generator().manual_seed(0)
    ids = token_ids(text, tokens, generator)
    decoder = decoder_ids(config, ids)
    images = of(model, *image_shape(config), generator=generator)
    main: dict[str, Inputs] = {
        "input_ids": {"input_ids": ids} if ids is not None else {},
        "pixel_values": images,
        "input_features": of(model, "input_features", sound_shape(config), generator=generator),
        "input_values": of(model, "input_values", waves_shape(config), generator=generator),
    }
    device = next(model.parameters()).device
    found = main.get(str(name), {})
    for more in (decoder, {}, images, images | decoder):
        if found and not (more and more.keys() <= found.keys()):
            yield {key: value.to(device) for key, value in (found | more).items()}


def token_ids(config: Any, tokens: Sequence[int], generator: torch.Generator) -> Tensor | None:
    """[1, T]: random tokens, the given ones among them, and the end token that some heads look for."""
    rows = getattr(config, "vocab_size", None)
    if not rows:
        return None
    longest = getattr(config, "max_position_embeddings", None) or TOKENS
    length = max(min(TOKENS, longest - 4), 2)  # RoBERTa's positions begin behind its padding
    ids = torch.randint(rows, (1, length), generator=generator)
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if isinstance(pad, int):
        ids[ids == pad] = (pad + 1) % rows
    known = torch.tensor([token for token in dict.fromkeys(tokens) if token < rows][: length - 1])
    ids[0, : len(known)] = known
    if isinstance(end, int) and 0 <= end < rows:
        ids[0, -1] = end
    return ids


def decoder_ids(config: Any, ids: Tensor | None) -> Inputs:
    """Return the token ids that the decoder of an encoder-decoder reads."""
    if not getattr(config, "is_encoder_decoder", False) or ids is None:
        return {}
    rows = getattr(getattr(config, "decoder", None) or config.get_text_config(decoder=True), "vocab_size", 2)
    return {"decoder_input_ids": ids % rows}


def image_shape(config: Any) -> tuple[str, list[int] | None]:
    """[1, channels, height, width] of what a vision tower reads."""
    vision = next((c for c in (getattr(config, "vision_config", None), config) if hasattr(c, "image_size")), None)
    size = getattr(vision, "image_size", None)
    size = [size, size] if isinstance(size, int) else size
    if not (isinstance(size, list | tuple) and len(size) == 2):
        return "pixel_values", None
    return "pixel_values", [1, getattr(vision, "num_channels", 3), *size]


def sound_shape(config: Any) -> list[int] | None:
    """[1, bands, frames] of a spectrogram, as Whisper reads it."""
    bands, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    return [1, bands, 2 * positions] if bands and positions else None


def waves_shape(config: Any) -> list[int]:
    """[1, samples] of sound; [1, frames, bands] for a spectrogram transformer."""
    bands, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    return [1, frames, bands] if bands and frames and frames > 100 else [1, SAMPLES]


def of(model: nn.Module, name: str, shape: list[int] | None, generator: torch.Generator) -> Inputs:
    """Random numbers of a shape in the model's precision; nothing where there is no shape."""
    if shape is None:
        return {}
    precisions = (p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1)
    return {name: torch.randn(shape, generator=generator).to(next(precisions, torch.float32))}
