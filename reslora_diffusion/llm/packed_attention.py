"""Attention in packs that costs what its examples cost: each attends to itself by a call of its own.

    q, k, v [B, heads, T, width] hold examples of n_1, n_2, ... tokens one behind the other
    sdpa, eager                      one call over [T, T], most of it masked    cost B T^2
    sdpa_of_parts, eager_of_parts    a call for each example                    cost sum n_i^2

`Collator(parts=True)` says the lengths; transformers hands them to attention as it hands over those of flash kernels.
A batch without lengths (not packed, or of generation) is attended to as before.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

SUFFIX = "_of_parts"
MASKS: dict[str, Callable[..., Tensor | None]] = {"sdpa": sdpa_mask, "eager": eager_mask}
KNOWN = {"full_attention", "sliding_attention"}  # kinds of layers, as configurations call them


def causal(query: Tensor) -> Tensor:
    """The mask [1, 1, T, T] that is added to eager scores."""
    length = query.shape[2]
    return query.new_full((length, length), torch.finfo(query.dtype).min).triu(1)[None, None]


def attention_of(kind: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The attention that goes on within an example. Each of transformers' models has an eager one of its own."""
    return sdpa_attention_forward if kind == "sdpa" else sys.modules[type(module).__module__].eager_attention_forward


def attend(
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    part_lengths: Sequence[Sequence[int]] | None = None,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """Return what every token finds in its own example, [B, T, heads, width]; zeros for padding.

    Args:
        part_lengths: of the examples of each row; what is left of a row is padding.
    """
    attention = attention_of(kind, module)
    if part_lengths is None:
        masked = attention_mask is not None or kind == "sdpa"
        return attention(module, query, key, value, attention_mask if masked else causal(query), **settings)
    rows = []
    for row, lengths in enumerate(part_lengths):
        whole = [part[row : row + 1, :, : sum(lengths)].split(list(lengths), 2) for part in (query, key, value)]
        found = [
            attention(module, q, k, v, None if kind == "sdpa" else causal(q), **settings)[0]
            for q, k, v in zip(*whole, strict=True)
        ]
        rest = query.shape[2] - sum(lengths)
        rows.append(torch.cat([*found, *([found[0].new_zeros(1, rest, *found[0].shape[2:])] if rest else [])], 1))
    return torch.cat(rows), None


def mask(kind: str, *args: Any, **settings: Any) -> Tensor | None:
    """The mask of a batch; None where the lengths of its examples take its place, or it would be causal."""
    packed = settings.get("attention_mask") is None and settings.get("local_size") is None
    if packed and settings["q_length"] == settings["kv_length"]:
        return None
    return MASKS[kind](*args, **settings)


for _kind in MASKS:
    AttentionInterface.register(_kind + SUFFIX, partial(attend, _kind))
    AttentionMaskInterface.register(_kind + SUFFIX, partial(mask, _kind))


def attend_in_parts(model: PreTrainedModel | PeftModel, longest: int) -> bool:
    """Let a model attend to the examples of a pack one by one, if it can; returns whether it does.

    It does not where attention is computed by another kernel than sdpa or eager, where examples (at most `longest`
    tokens) reach beyond a sliding window, and in models that do not hand lengths on.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    kind, window = config._attn_implementation, getattr(config, "sliding_window", None)
    if (
        kind not in MASKS
        or not base._supports_attention_backend
        or not {*(getattr(config, "layer_types", None) or ())} <= KNOWN
    ):
        return False
    if window is not None and window < longest:
        return False
    if kind == "eager" and not hasattr(sys.modules[type(base).__module__], "eager_attention_forward"):
        return False
    base.set_attn_implementation(kind + SUFFIX)
    return config._attn_implementation == kind + SUFFIX
