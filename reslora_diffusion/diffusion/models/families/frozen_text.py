"""Families whose only text encoder is a language model, which is never trained.

    hidden = some states of the language model, of the tokens that are the prompt's      [P, L, D]

The pipeline's own `encode_prompt` encodes each prompt by itself: templates, limits and layers are its. Prompts that
share a batch are padded, and `mask` then tells which tokens are theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...options import DreamBoothOptions
from .flow import FlowFamily
from .not_here import NEEDS_T5, OF_CLIP_ALONE, OF_DIFFUSION, OF_ONE_CLIP
from .texts import Texts, Tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from .base import Windows

NO_CLIP = (
    OF_DIFFUSION
    | OF_CLIP_ALONE
    | OF_ONE_CLIP
    | {"tokenizer_max_length": "counts tokens of CLIP; see --max_sequence_length"}
)
OF_TEMPLATES = 1024  # tokens of the words around a prompt, at most
T5_ALONE = {
    **NO_CLIP,
    **NEEDS_T5,
    "train_text_encoder": "trains CLIP, which this family lacks",
    "train_text_encoder_ti": "trains new tokens of CLIP, which this family lacks",
    "enable_t5_ti": "trains new tokens of T5 beside those of CLIP, which this family lacks",
}


def mode(mean: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of latents that have no variance."""
    return mean, mean.new_full(mean.shape, -float("inf"))


class Reached(Exception):
    """A text encoder was called; the argument is the mask of its tokens."""


def pipeline_to_count(name: str, tokenizer: Any) -> Any:
    """A pipeline of this class that reads prompts up to its text encoder, which raises `Reached`."""
    import diffusers
    import torch

    class Encoder(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
            raise Reached(attention_mask)

    kind = getattr(diffusers, name)
    needed = [n for n, p in inspect.signature(kind).parameters.items() if p.default is inspect.Parameter.empty]
    return kind(**dict.fromkeys(needed) | {"tokenizer": tokenizer, "text_encoder": Encoder()})


def each_by_itself(texts: Texts) -> list[Tensor]:
    """The states of each prompt, without padding."""
    if texts.mask is None:
        return list(texts.hidden)
    return [states[own] for states, own in zip(texts.hidden, texts.mask, strict=True)]


class FrozenTextFamily(FlowFamily):
    """The common part of these families; their scripts in diffusers draw noise levels uniformly and weight none."""

    text_encoders: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    fixed_encoder, fixed_tokenizer = "text_encoder", "tokenizer"
    target_modules: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    not_here = NO_CLIP | {
        "skip_t5": "leaves out T5, which this family has not",
        "train_text_encoder": "trains CLIP, and the text encoder of this family is a language model",
        "train_text_encoder_ti": "trains new tokens of CLIP, and the text encoder of this family is a language model",
        "enable_t5_ti": "belongs to T5, which this family lacks",
    }
    max_sequence_length = 512
    has_template = True  # whether the pipeline puts words of its own around a prompt
    encoding: ClassVar[Mapping[str, Any]] = {}  # further arguments of the pipeline's `encode_prompt`
    flow: Mapping[str, Any] = {"weighting_scheme": "none", "precondition_outputs": False}

    def states(self, pipeline: Any, prompt: str, length: int, negative: bool) -> Tensor:
        """Hidden states of one prompt [L, D], as the pipeline itself makes them of at most `length` tokens."""
        device = pipeline.text_encoder.device
        return pipeline.encode_prompt([prompt], device=device, max_sequence_length=length, **self.encoding)[0][0]

    def tokens_read(self, pipeline: Any, prompt: str, length: int) -> int:
        """Return the number of tokens that a pipeline to count with reads, of at most `length`."""
        try:
            self.states(pipeline, prompt, length, False)
        except Reached as reached:
            return int(reached.args[0].sum())
        raise AssertionError("the states of a prompt are those of its text encoder")

    def tokens_cut_off(self, windows: Windows, prompt: str, options: DreamBoothOptions) -> int:
        """Words that the pipeline puts around a prompt take their places of it."""
        ((tokenizer, length),) = windows
        if not self.has_template:
            return super().tokens_cut_off(windows, prompt, options)
        pipeline = pipeline_to_count(self.pipeline_class, tokenizer)
        most = max(length, self.tokens_of(tokenizer, prompt, options)) + OF_TEMPLATES
        try:
            return self.tokens_read(pipeline, prompt, most) - self.tokens_read(pipeline, prompt, length)
        except Exception:  # a chat template is the model's own program, and this tokenizer may be a part of a processor
            return super().tokens_cut_off(windows, prompt, options)

    def read(
        self,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        options: DreamBoothOptions,
        negative: Sequence[bool] | None = None,
    ) -> Tokens:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        with torch.no_grad():
            apart = [not prompt for prompt in prompts] if negative is None else negative
            length = self.t5_length(options)
            states = [self.states(pipeline, prompt, length, n) for prompt, n in zip(prompts, apart, strict=True)]
        hidden = pad_sequence(states, batch_first=True)
        ends = torch.tensor([len(part) for part in states], device=hidden.device)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < ends[:, None]
        return Tokens(ends.new_empty(len(prompts), 0, 0), hidden, mask)

    def encode(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> Texts:
        assert tokens.fixed is not None, "what the language model makes of a prompt is always computed"
        if tokens.mask is None:
            return Texts(tokens.fixed)
        longest = int(tokens.mask.sum(1).max())
        mask = tokens.mask[:, :longest]
        return Texts(tokens.fixed[:, :longest], mask=None if bool(mask.all()) else mask)

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Any]:
        return {
            "prompt_embeds": texts.hidden,
            "prompt_attention_mask": texts.given_mask,
            "negative_prompt_embeds": negative.hidden,
            "negative_prompt_attention_mask": negative.given_mask,
        }
