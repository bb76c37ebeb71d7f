"""Problems with the options on new tokens, and the names of the new tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from ...utils.problems import listing
from ...utils.wording import all_of, new_tokens
from . import DreamBoothOptions
from .new_tokens import NewTokenOptions

if TYPE_CHECKING:  # they import torch
    from transformers import PreTrainedTokenizerBase

    from ..data.concepts import Concept
    from ..models.meta_pipeline import MetaPipeline

USUAL = 2  # new tokens for a word, where neither their number nor a concept to begin with is given
DETAILS = {item.name for item in fields(NewTokenOptions)} - {"train_text_encoder_ti"}


def words_of(options: NewTokenOptions) -> list[str]:
    """The words of `--token_abstraction`."""
    return [word.strip() for word in options.token_abstraction.split(",")]


def option_problems(options: DreamBoothOptions) -> Iterator[str]:
    """Conflicts among the options."""
    if not options.train_text_encoder_ti:
        for name in sorted(options.given & DETAILS):
            yield f"--{name} is used only with --train_text_encoder_ti"
        return
    words = words_of(options)
    if "" in words or len(set(words)) < len(words):
        yield f"--token_abstraction: got {options.token_abstraction!r}, wanted words with commas between, each once"
    if options.initializer_concept is not None and not options.initializer_concept.strip():
        yield "--initializer_concept: got no word"
    if options.train_text_encoder:
        yield (
            "--train_text_encoder and --train_text_encoder_ti both train the text encoders, by adapters and by "
            "embeddings of new tokens; wanted one of them"
        )
    if options.pre_compute_text_embeddings:
        yield "--pre_compute_text_embeddings cannot be used with --train_text_encoder_ti: the embeddings change"
    if options.enable_t5_ti and options.skip_t5:
        yield "--enable_t5_ti trains tokens of T5, which --skip_t5 leaves out; wanted one of them"
    if options.cuda_graph and options.train_text_encoder_ti_frac != 1:
        yield (
            "--train_text_encoder_ti_frac: a recorded step has the prompts it was recorded with; got --cuda_graph, "
            "wanted --train_text_encoder_ti_frac 1"
        )
    if (options.schedule or "").startswith("prune"):
        yield "--schedule prune leaves a smaller model without files beside it; wanted no --train_text_encoder_ti"


def prompt_problems(options: DreamBoothOptions, concepts: Sequence[Concept]) -> Iterator[str]:
    """Words that no prompt of the images has: their tokens would never be trained."""
    if not options.train_text_encoder_ti or not concepts:
        return
    prompts = [str(image.caption or one.instance_prompt or "") for one in concepts for image in one.instance.images]
    if absent := [word for word in words_of(options) if word and not any(word in prompt for prompt in prompts)]:
        shown = listing(repr(prompt[:60]) for prompt in dict.fromkeys(prompts))
        yield f"--token_abstraction: {listing(absent)} stands in no prompt of the images, such as {shown}"


def take_new_tokens(options: DreamBoothOptions, base: MetaPipeline) -> Iterator[str]:
    """Name the new tokens in the options, and tell the tokenizers of a plan of them; yields what is wrong."""
    if not options.train_text_encoder_ti:
        return
    encoders = base.family.token_encoders(options)
    tokenizers = [tokenizer for tokenizer, _ in base.windows][: len(encoders)]
    if len(tokenizers) < len(encoders):
        yield "--enable_t5_ti trains tokens of T5, which this base lacks"
        return
    lengths = [len(start_ids(tokenizer, options.initializer_concept)) for tokenizer in tokenizers]
    longest = max(lengths, default=0)
    count = options.num_new_tokens_per_abstraction or longest or USUAL
    if longest > count:
        yield (
            f"--initializer_concept: {options.initializer_concept!r} is {longest} tokens of the base, and "
            f"--num_new_tokens_per_abstraction is {count}; wanted {longest}, or fewer words"
        )
    tokens = new_tokens(words_of(options), count)
    known = {token for tokenizer in tokenizers for token in all_of(tokens) if token in tokenizer.get_vocab()}
    if known:
        yield f"--train_text_encoder_ti: the base has tokens {listing(sorted(known))} already; wanted a base without"
        return
    for tokenizer in tokenizers:
        tokenizer.add_tokens(all_of(tokens))
    options.new_tokens = tokens


def start_ids(tokenizer: PreTrainedTokenizerBase, concept: str | None) -> list[int]:
    """The tokens of `--initializer_concept`; none if it is not given."""
    return list(tokenizer(concept, add_special_tokens=False).input_ids) if concept else []


def described(options: DreamBoothOptions, encoders: Iterable[str]) -> Iterator[str]:
    """Lines of the preflight."""
    if not options.new_tokens:
        return
    pairs = listing((f"{word} is read as {''.join(own)}" for word, own in options.new_tokens.items()), 8)
    begin = f"those of {options.initializer_concept!r}" if options.initializer_concept else "random ones"
    share = options.train_text_encoder_ti_frac
    when = "to the end" if share == 1 else f"in the first {share:.0%} of steps"
    yield f"new tokens: {pairs}; their embeddings in {listing(encoders)} begin as {begin} and are trained {when}"
