"""Wordings of a caption: its tags in other orders or left out, and choices, as in kohya's scripts.

    --shuffle_caption --keep_tokens 1    "sks, cat, sitting, sun" is itself, "sks, sun, cat, sitting", ...
    --keep_tokens_separator "|||"        "sks ||| cat, sun ||| sticker": the first and the last part stay in place
    --caption_tag_dropout_rate 0.1       each of the other tags is left out of about a tenth of the wordings
    --enable_wildcard                    "a {red|blue} hat" is one of both, a caption of several lines one of them
    --caption_separator ";"              tags have semicolons between them; commas are read in their place
    --secondary_separator ";;;"          "hat;;;red hat" is one tag, which is read as "hat, red hat"
    --token_warmup_step 100              at step 50 a caption has the first half of its tags, from step 100 on all

Prompts are encoded once, before training, so the wordings are drawn once too: a few for each caption, which depend on
the caption alone. While the number of tags grows, a caption has one wording for each number.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable

from ..options import DreamBoothOptions
from ..options.data import READ_AS_TAGS

ORDERS = 8  # of a caption, at most
DRAWS = 16  # wordings of a caption with choices, or of which tags are left out; equal ones count
CHOICE = re.compile(r"(\{\{)|(\}\})|\{([^{}]+)\}")  # doubled braces are braces
BRACES = "{", "}"


def tags_of(text: str, separator: str = ",") -> list[str]:
    return [tag.strip() for tag in text.split(separator) if tag.strip()]


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """Count the captions that have each tag, in small letters, as kohya's scripts do."""
    return dict(Counter(tag.lower() for caption in captions for tag in tags_of(caption)))


def wordings(caption: str, options: DreamBoothOptions) -> list[str]:
    """Return the wordings that a caption is trained in, each as often as it is to be drawn."""
    if options.caption_tag_dropout_rate or (options.enable_wildcard and has_choices(caption)):
        source = random.Random(caption)
        found = [drawn(caption, options, source) for _ in range(DRAWS)]
    else:
        found = tag_orders(caption, options) if options.shuffle_caption else [whole(caption, options)]
    return [joined(one, options) for one in found]


def growing(caption: str, options: DreamBoothOptions) -> list[str]:
    """Return wordings of a caption with more and more of its tags, from `--token_warmup_min` on; none with all."""
    if not options.token_warmup_step:
        return []
    source, count = random.Random(caption), len(parted(caption, options)[1])
    return [joined(drawn(caption, options, source, most), options) for most in range(options.token_warmup_min, count)]


def joined(wording: str, options: DreamBoothOptions) -> str:
    """A wording with separators as they are read in place of those of tags that stay together."""
    separator = options.caption_separator
    together = options.secondary_separator
    return wording.replace(together, ", " if separator == "," else separator) if together else wording


def whole(caption: str, options: DreamBoothOptions) -> str:
    """A caption with all of its tags in their order, as kohya's scripts put them together again."""
    if not options.token_warmup_step:
        return caption
    return ", ".join(tag for part in parted(caption, options) for tag in part)


def has_choices(caption: str) -> bool:
    return "\n" in caption or CHOICE.search(caption) is not None


def drawn(caption: str, options: DreamBoothOptions, source: random.Random, most: int | None = None) -> str:
    """Draw one wording of a caption, with the first `most` of the tags that may be moved."""
    text = chosen(caption, source) if options.enable_wildcard else caption
    if not any(getattr(options, name) for name in READ_AS_TAGS):
        return text
    front, others, back = parted(text, options)
    others = others[:most]
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


def parted(caption: str, options: DreamBoothOptions) -> tuple[list[str], list[str], list[str]]:
    """Return tags that stay in front, tags that may be moved or left out, and tags that stay at the end."""
    kept, between = options.keep_tokens_separator, options.caption_separator
    if kept and kept in caption:
        front, others, *back = caption.split(kept, 2)
        return tags_of(front, between), tags_of(others, between), tags_of("".join(back), between)
    tags = tags_of(caption, between)
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def tag_orders(caption: str, options: DreamBoothOptions) -> list[str]:
    """The caption and other orders of the tags that may be moved."""
    front, rest, back = parted(caption, options)
    own, kept = ", ".join([*front, *rest, *back]), options.keep_tokens_separator
    if (kept and kept in caption) or options.caption_separator != ",":
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
