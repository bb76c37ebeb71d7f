"""Words of a prompt that stand for new tokens, as TOK does for `<s0><s1>` (textual inversion)."""

import re
from collections.abc import Mapping, Sequence

TokensByWord = Mapping[str, Sequence[str]]  # new tokens by the word that stands for them


def worded(prompt: str, tokens: TokensByWord) -> str:
    """A prompt with the new tokens in place of their words, wherever these stand. Of two words that begin alike, such
    as TOK and TOK2, the longer one is meant.

    >>> worded("a photo of TOK", {"TOK": ["<s0>", "<s1>"]})
    'a photo of <s0><s1>'
    """
    if not tokens:
        return prompt
    words = "|".join(re.escape(word) for word in sorted(tokens, key=len, reverse=True))
    return re.sub(words, lambda found: "".join(tokens[found[0]]), prompt)


def new_tokens(words: Sequence[str], count: int) -> dict[str, list[str]]:
    """The names of `count` new tokens for each word, numbered as diffusers' scripts do.

    >>> new_tokens(["TOK", "TOK2"], 2)
    {'TOK': ['<s0>', '<s1>'], 'TOK2': ['<s2>', '<s3>']}
    """
    return {word: [f"<s{place * count + number}>" for number in range(count)] for place, word in enumerate(words)}


def all_of(tokens: TokensByWord) -> list[str]:
    """All new tokens, in their order."""
    return [token for own in tokens.values() for token in own]
