"""New tokens in a text encoder: rows of its embedding that are trained, while the table stays as it is.

    row(id) = table[id]            id < first
              new[id - first]      first <= id < first + n,  new [n, D] in float32

Only `new` has a gradient and moments of an optimizer. After each step it is brought back to the size of the table's
rows, as in diffusers' advanced scripts (`retract_embeddings`): with std over all numbers of a matrix,

    new <- new * (std(table) / std(new)) ** 0.1

A CLIP whose configuration says eos_token_id 2, as those of Stable Diffusion do, pools at the largest id of a prompt.
That was the end of the text until there were ids above it; here such an encoder pools at the end of the text.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from reslora_diffusion.export.embeddings import pool_at_the_end

from ...utils.wording import all_of
from ..objective.randomness import Stream, generator
from ..options import DreamBoothOptions
from ..options.token_checks import start_ids
from .families import Family

PULL = 0.1  # how far a step brings the new rows back to the size of the others
TABLES = ("token_embedding", "embed_tokens")  # what CLIP and T5 call their table


class NewTokens(nn.Module):
    """Stands in the place of a text encoder's table.

    Args:
        table: the embedding of the base.
        new: the rows [n, D] that are trained.
        first: id of the first new token; the others follow.
    """

    std: Tensor

    def __init__(self, table: nn.Embedding, new: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.first = table, first
        self.new = nn.Parameter(new)
        self.register_buffer("std", table.weight.detach().float().std(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of ids [...], in the precision of the table."""
        known = self.table(ids.clamp(max=self.first - 1))
        own = self.new[(ids - self.first).clamp(min=0)]
        return torch.where((ids >= self.first).unsqueeze(-1), own.to(known.dtype), known)

    @torch.no_grad()
    def rescale(self, where: Tensor) -> None:
        """Bring the new rows towards the size of the table's, if `where` [] is true; nothing waits for the device."""
        factor = (self.std / self.new.std()) ** PULL
        self.new.mul_(torch.where(where, factor, torch.ones_like(factor)))


def table_in(encoder: nn.Module) -> tuple[nn.Module, str, nn.Embedding]:
    """The table of a text encoder, and the module that holds it under that name."""
    found = ((module, name, getattr(module, name, None)) for module in encoder.modules() for name in TABLES)
    return next((module, name, table) for module, name, table in found if isinstance(table, nn.Embedding))


def put_new_tokens(encoder: nn.Module, new: Tensor, first: int) -> NewTokens:
    """Give a text encoder rows for the ids from `first` on."""
    module, name, table = table_in(encoder)
    tokens = NewTokens(table, new, first)
    setattr(module, name, tokens)
    return tokens


def new_tokens_in(encoder: nn.Module) -> NewTokens:
    """The new tokens of an encoder that has some."""
    return next(module for module in encoder.modules() if isinstance(module, NewTokens))


def first_rows(table: nn.Embedding, words: int, count: int, start: Sequence[int], source: torch.Generator) -> Tensor:
    """Return the first values of the rows [words * count, D] of `count` tokens for each word: those of the ids
    `start`, one after the other; without any, random ones of the table's size."""
    weight = table.weight.detach().float()
    if start:
        return weight[[start[place % len(start)] for _ in range(words) for place in range(count)]].clone()
    return (torch.randn(words * count, weight.shape[1], generator=source) * weight.std().cpu()).to(weight.device)


def add_new_tokens(pipeline: DiffusionPipeline, family: Family, options: DreamBoothOptions) -> dict[str, nn.Module]:
    """Teach tokenizers and text encoders the new tokens of the options; returns the encoders by component. Equal seeds
    give equal rows."""
    names, found = all_of(options.new_tokens), dict[str, nn.Module]()
    if not names:
        return found
    words = len(options.new_tokens)
    assert options.seed is not None, "`resolve_seed` has set it"
    for place, (component, tokenizer_name) in enumerate(family.token_encoders(options).items()):
        encoder, tokenizer = getattr(pipeline, component), getattr(pipeline, tokenizer_name)
        start = start_ids(tokenizer, options.initializer_concept)
        tokenizer.add_tokens(names)
        first = tokenizer.convert_tokens_to_ids(names[0])
        source = generator(options.seed, Stream.TOKENS, place)
        put_new_tokens(encoder, first_rows(table_in(encoder)[2], words, len(names) // words, start, source), first)
        pool_at_the_end(encoder, tokenizer)
        found[component] = encoder
    return found
