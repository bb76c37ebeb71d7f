"""The questions that training asks a family of models.

prompts [P] -> token ids [P, E, L]            E text encoders, L tokens
token ids   -> hidden states [P, L, D], and for some families a pooled vector [P, D2]
texts       -> what the UNet is given, and what the pipeline is given to paint
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


class Texts(NamedTuple):
    """Encoded prompts: hidden states [P, L, D], pooled [P, D2] where the family has it."""

    hidden: Tensor
    pooled: Tensor | None = None


class Family(ABC):
    """Stateless: the models are arguments."""

    title: str
    pipeline_class: type[DiffusionPipeline]
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]

    def tokenize(self, tokenizers: Sequence[PreTrainedTokenizerBase], prompts: list[str], length: int | None) -> Tensor:
        """Token ids [P, E, L], padded and cut to `length` (the tokenizers' own if None)."""
        ids = [
            tokenizer(
                prompts,
                padding="max_length",
                truncation=True,
                max_length=length or tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            for tokenizer in tokenizers
        ]
        return torch.stack(ids, dim=1)

    def tokenizers_of(self, pipeline: DiffusionPipeline) -> list[PreTrainedTokenizerBase]:
        return [getattr(pipeline, name) for name in self.tokenizers]

    def text_encoders_of(self, pipeline: DiffusionPipeline) -> list[nn.Module]:
        return [getattr(pipeline, name) for name in self.text_encoders]

    @abstractmethod
    def encode(self, text_encoders: Sequence[nn.Module], ids: Tensor) -> Texts:
        """Texts of token ids [P, E, L]."""

    @abstractmethod
    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments of the UNet. `time_ids` [B, 6]: original size, upper left corner of the crop, trained size,
        each (height, width)."""

    @abstractmethod
    def painting(self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts) -> dict[str, Tensor]:
        """Keyword arguments of the pipeline in place of prompts; `negative` is the empty prompt."""
