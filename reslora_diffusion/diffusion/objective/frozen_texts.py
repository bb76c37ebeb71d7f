"""Prompts are encoded once where text encoders are not trained any more (`--train_text_encoder_frac`).

    what a text encoder makes of a prompt = a function of its tokens, the adapters' factors, and whether they are merged

While these are the same, a prompt is looked up by its tokens. A moving average in place of the factors, a fold or a new
merge is seen by itself, and each prompt is encoded again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import nn

from reslora_diffusion.core.peft.variant import find_adapter
from reslora_diffusion.rules import DEFAULT_ADAPTER

from ..models.families import Texts, Tokens

Encode = Callable[[Tokens], Texts]


class State(NamedTuple):
    """Everything besides its tokens that an encoded prompt depends on."""

    things: list[Any]  # factors and merged adapters, told apart by identity
    versions: list[int]  # how often the factors were changed

    def is_other(self, before: "State | None") -> bool:
        if before is None or self.versions != before.versions or len(self.things) != len(before.things):
            return True
        return any(one is not other for one, other in zip(self.things, before.things, strict=True))


def state_of(encoders: Sequence[nn.Module]) -> State:
    factors = [p for encoder in encoders for p in encoder.parameters() if p.requires_grad]
    adapters = [find_adapter(encoder, DEFAULT_ADAPTER) for encoder in encoders]
    merged = [None if adapter is None else adapter.merged for adapter in adapters]
    return State([*factors, *merged], [factor._version for factor in factors])


@dataclass
class FrozenTexts:
    """Remembers encoded prompts once `frozen` is set."""

    frozen: bool = False
    found: dict[bytes, Texts] = field(default_factory=dict)
    state: State | None = None  # of the encoders, when these were found

    def of(self, tokens: Tokens, encoders: Sequence[nn.Module], encode: Encode) -> Texts:
        """Encoded prompts [P, ...], each encoded by itself, so that it does not depend on the others of a batch."""
        state = state_of(encoders)
        if state.is_other(self.state):
            self.found, self.state = {}, state
        with torch.no_grad():
            texts = [self.one(one, encode) for one in tokens.each()]
        hidden = torch.cat([one.hidden for one in texts])
        pooled = [one.pooled for one in texts if one.pooled is not None]
        return Texts(hidden, torch.cat(pooled) if pooled else None)

    def one(self, tokens: Tokens, encode: Encode) -> Texts:
        key = digest(tokens)
        if key not in self.found:
            self.found[key] = encode(tokens)
        return self.found[key]


def digest(tokens: Tokens) -> bytes:
    found = sha256()
    for part in tokens:
        if part is not None:
            found.update(part.detach().double().cpu().numpy().tobytes())
    return found.digest()
