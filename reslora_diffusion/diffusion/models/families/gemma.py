"""Families that read Gemma 2: their pipelines begin each prompt with words of their own, and a negative one with none.

    hidden = states of Gemma 2 for all tokens of the prompt, the pipeline's words included          [P, L, D]

The denoiser masks padding, and the pipeline takes both prompts padded to one length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .frozen_text import FrozenTextFamily
from .texts import Texts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


def padded(texts: Texts, length: int) -> Texts:
    """Prompts with zeros behind them up to this length, and numbers as their mask."""
    import torch.nn.functional as F

    more = length - texts.hidden.shape[1]
    return Texts(F.pad(texts.hidden, (0, 0, 0, more)), mask=F.pad(texts.given_mask.long(), (0, more)))


class GemmaFamily(FrozenTextFamily):
    def words_before(self, pipeline: Any) -> dict[str, Any]:
        """Arguments of `encode_prompt` for the words that a prompt begins with, where they are not its defaults."""
        return {}

    def states(self, pipeline: Any, prompt: str, length: int, negative: bool) -> Tensor:
        common = {"device": pipeline.text_encoder.device, "max_sequence_length": length}
        if negative:
            hidden, mask = pipeline.encode_prompt([""], negative_prompt=[prompt], **common)[2:]
        else:
            common |= {"do_classifier_free_guidance": False, **self.words_before(pipeline)}
            hidden, mask = pipeline.encode_prompt([prompt], **common)[:2]
        return hidden[0, mask[0].bool()]

    def condition(self, texts: Texts, time_ids: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": texts.hidden, "encoder_attention_mask": texts.given_mask}

    def pipeline_inputs(
        self, pipeline: DiffusionPipeline, texts: Texts, negative: Texts, empty: bool = True
    ) -> dict[str, Any]:
        longest = max(part.hidden.shape[1] for part in (texts, negative))
        texts, negative = padded(texts, longest), padded(negative, longest)
        return {"negative_prompt": None, **super().pipeline_inputs(pipeline, texts, negative)}
