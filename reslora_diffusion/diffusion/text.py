"""Prompts to token ids to hidden states, as `StableDiffusionPipeline` does it."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int | None = None) -> Tensor:
    """Token ids [P, L], padded and cut to `max_length` (the tokenizer's own if None)."""
    length = max_length or tokenizer.model_max_length
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def tokens_cut_off(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int | None = None) -> int:
    """How many tokens of a prompt the text encoder will not see."""
    length = max_length or tokenizer.model_max_length
    return max(0, len(tokenizer(prompt, truncation=False, verbose=False).input_ids) - length)


def encode(text_encoder: nn.Module, input_ids: Tensor) -> Tensor:
    """Hidden states [P, L, D] of token ids [P, L]."""
    return text_encoder(input_ids, return_dict=False)[0]


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, text_encoder: nn.Module, prompts: list[str], max_length: int | None = None
) -> Tensor:
    """Hidden states [P, L, D] of prompts, on the text encoder's device."""
    device = next(text_encoder.parameters()).device
    return encode(text_encoder, tokenize(tokenizer, prompts, max_length).to(device))
