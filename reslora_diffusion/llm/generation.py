"""Evaluation by generation: answers are generated greedily or by beams, read, and compared.

    exact match = right answers / questions, with Wilson's 95 % interval; 0.5 and \\frac{1}{2} are the same answer

Batches are padded on the left, the longest prompts first, and stop at the model's end tokens.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..utils.files import write_text
from .values import same

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, and the answer that counts as right."""

    input_ids: list[int]
    answer: str


@dataclass(frozen=True)
class Generations:
    """The answers of an evaluation. Lists run parallel to the questions."""

    responses: list[str]
    answers: list[str | None]
    wanted: list[str]

    @property
    def correct(self) -> int:
        return sum(map(same, self.answers, self.wanted))

    @property
    def exact_match(self) -> float:
        return self.correct / len(self.wanted)

    def __str__(self) -> str:
        low, high = wilson(self.correct, len(self.wanted))
        return f"{self.exact_match:.1%} ({self.correct} of {len(self.wanted)}; 95 % interval {low:.1%} to {high:.1%})"

    def write(self, path: Path) -> None:
        """One line per question: response, the answer read from it, the answer wanted."""
        rows = zip(self.responses, self.answers, self.wanted, strict=True)
        lines = [json.dumps({"response": r, "answer": a, "wanted": w, "right": same(a, w)}) for r, a, w in rows]
        write_text(path, "\n".join(lines) + "\n")


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share."""
    share, extra = correct / total, z * z / total
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / total + extra / (4 * total)) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def left_padded(prompts: Sequence[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(input_ids, attention_mask)`, both [B, T]."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    max_total_tokens: int | None = None,
    batch_size: int = 32,
    num_beams: int = 1,
    synced_gpus: bool = False,
    progress: str | None = None,
) -> list[str]:
    """The response to each prompt, without special tokens. The model's mode and settings are left as they were.

    Args:
        max_total_tokens: of a prompt and its response; a longer prompt gets no response.
        synced_gpus: as in transformers, all processes take equally many steps, as sharded weights need.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    responses = [""] * len(prompts)
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None, leave=False):
            chosen = order[start : start + batch_size]
            room = [max_new_tokens if max_total_tokens is None else max_total_tokens - len(prompts[i]) for i in chosen]
            if max(room) < 1 and not synced_gpus:
                continue
            ids, mask = left_padded([prompts[i] for i in chosen], tokenizer.pad_token_id)
            out = cast("GenerativePreTrainedModel", model).generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(1, min(max_new_tokens, max(room))),
                num_beams=num_beams,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=synced_gpus,
            )
            rows = [row[: max(0, tokens)] for row, tokens in zip(out[:, ids.shape[1] :], room, strict=True)]
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                responses[i] = text.strip()
    finally:
        model.train(was_training)
    return responses


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    read: Callable[[str], str | None],
    *,
    max_new_tokens: int,
    max_total_tokens: int | None = None,
    batch_size: int = 32,
    num_beams: int = 1,
    synced_gpus: bool = False,
    progress: str | None = None,
) -> Generations:
    """Generate, read and compare. `read` finds the answer in a response."""
    responses = generate(
        model,
        tokenizer,
        [question.input_ids for question in questions],
        max_new_tokens=max_new_tokens,
        max_total_tokens=max_total_tokens,
        batch_size=batch_size,
        num_beams=num_beams,
        synced_gpus=synced_gpus,
        progress=progress,
    )
    return Generations(responses, [read(text) for text in responses], [question.answer for question in questions])
