"""Wordings of a caption: its tags in other orders or left out, and choices, as in kohya's scripts.

    --shuffle_caption --keep_tokens 1    "sks, cat, sitting, sun" is itself, "sks, sun, cat, sitting", ...
    --keep_tokens_separator "|||"        "sks ||| cat, sun ||| sticker": the first and the last part stay in place
    --caption_tag_dropout_rate 0.1       each of the other tags is left out of about a tenth of the wordings
    --enable_wildcard                    "a {red|blue} hat" is one of both, a caption of several lines one of them
    --secondary_separator ";;;"          "hat;;;red hat" is one tag, which is read as "hat, red hat"

Prompts are encoded once, before training, so the wordings are drawn once too: a few for each caption, which depend on
the caption alone.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable

from ..options import DreamBoothOptions

ORDERS = 8  # of a caption, at most
DRAWS = 16  # wordings of a caption with choices, or of which tags are left out; equal ones count
CHOICE = re.compile(r"(\{\{)|(\}\})|\{([^{}]+)\}")  # doubled braces are braces
BRACES = "{", "}"


def tags_of(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """Count the captions that have each tag, in small letters, as kohya's scripts do."""
    return dict(Counter(tag.lower() for caption in captions for tag in tags_of(caption)))


def wordings(caption: str, options: DreamBoothOptions) -> list[str]:
    """Return the wordings that a caption is trained in, each as often as it is to be drawn."""
    kept = options.keep_tokens, options.keep_tokens_separator
    if options.caption_tag_dropout_rate or (options.enable_wildcard and has_choices(caption)):
        source = random.Random(caption)
        found = [drawn(caption, options, source) for _ in range(DRAWS)]
    else:
        found = tag_orders(caption, *kept) if options.shuffle_caption else [caption]
    together = options.secondary_separator
    return [one.replace(together, ", ") for one in found] if together else found


def has_choices(caption: str) -> bool:
    return "\n" in caption or CHOICE.search(caption) is not None


def drawn(caption: str, options: DreamBoothOptions, source: random.Random) -> str:
    """Draw one wording of a caption."""
    text = chosen(caption, source) if options.enable_wildcard else caption
    if not options.shuffle_caption and not options.caption_tag_dropout_rate:
        return text
    front, others, back = parted(text, options.keep_tokens, options.keep_tokens_separator)
    if options.shuffle_caption:
        source.shuffle(others)
    others = [tag for tag in others if source.random() >= options.caption_tag_dropout_rate]
    return ", ".join([*front, *others, *back])


def chosen(caption: str, source: random.Random) -> str:
    """One line of a caption, with one of the words in each pair of braces."""

    def one(match: re.Match[str]) -> str:
        opening, closing, words = match.groups()
        return source.choice(words.split("|")) if words else BRACES[closing is not None]

    lines = [line.strip() for line in caption.splitlines() if line.strip()]
    return CHOICE.sub(one, source.choice(lines))


def parted(caption: str, keep_tokens: int, separator: str | None) -> tuple[list[str], list[str], list[str]]:
    """Return tags that stay in front, tags that may be moved or left out, and tags that stay at the end."""
    if separator and separator in caption:
        front, others, *back = caption.split(separator, 2)
        return tags_of(front), tags_of(others), tags_of("".join(back))
    tags = tags_of(caption)
    return tags[:keep_tokens], tags[keep_tokens:], []


def tag_orders(caption: str, keep_tokens: int = 0, separator: str | None = None) -> list[str]:
    """The caption and other orders of the tags that may be moved."""
    front, rest, back = parted(caption, keep_tokens, separator)
    own = ", ".join([*front, *rest, *back])
    if separator and separator in caption:
        caption = own
    if len(rest) < 2:
        return [caption]
    source, orders = random.Random(caption), {own: caption}
    for _ in range(8 * ORDERS):  # two tags have only two orders
        source.shuffle(rest)
        order = ", ".join([*front, *rest, *back])
        orders.setdefault(order, order)
        if len(orders) == ORDERS:
            break
    return list(orders.values())
