"""Options on new tokens: textual inversion beside the adapter, as in diffusers' advanced DreamBooth scripts.

--token_abstraction TOK     a word of the prompts, which is read as --num_new_tokens_per_abstraction new tokens
                            <s0><s1>, whose embeddings are trained in every text encoder
pivot                       after --train_text_encoder_ti_frac of the steps they stay as they are (pivotal tuning)
"""

from dataclasses import dataclass

from ...utils.options import option


@dataclass
class NewTokenOptions:
    """New tokens."""

    train_text_encoder_ti: bool = option(
        False,
        "Train the embeddings of new tokens beside the adapter (textual inversion, pivotal tuning).",
        binds=True,
        in_header=True,
    )
    token_abstraction: str = option(
        "TOK",
        "Word of the prompts that stands for new tokens; several with commas between them: TOK,TOK2.",
        binds=True,
    )
    num_new_tokens_per_abstraction: int | None = option(
        None,
        "New tokens that a word stands for (default: as many as --initializer_concept has, without one 2).",
        at_least=1,
        binds=True,
    )
    initializer_concept: str | None = option(
        None,
        "Words whose embeddings the new tokens begin with (default: random ones of the usual size).",
        binds=True,
    )
    train_text_encoder_ti_frac: float = option(
        0.5,
        "Share of the steps in which new tokens are trained, from the first step on.",
        above=0,
        at_most=1,
        binds=True,
    )
    enable_t5_ti: bool = option(False, "SD3, FLUX.1: train the new tokens in T5 too.", binds=True)
