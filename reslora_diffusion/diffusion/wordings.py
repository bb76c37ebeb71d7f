"""Captions that are lists of tags, in several orders: `--shuffle_caption`, `--keep_tokens`, as in kohya's scripts.

    "sks, cat, sitting, outdoors"   -> itself, "sks, outdoors, cat, sitting", ...    keep_tokens 1

Texts are encoded once, so the orders are drawn once: a few of each caption, a function of the caption alone.
"""

import random

from .options import DreamBoothOptions

ORDERS = 8  # of a caption, at most


def wordings(caption: str, args: DreamBoothOptions) -> list[str]:
    """The caption, and with `--shuffle_caption` other orders of its tags."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, rest = tags[: args.keep_tokens], tags[args.keep_tokens :]
    if not args.shuffle_caption or len(rest) < 2:
        return [caption]
    source, orders = random.Random(caption), {", ".join(tags): caption}
    for _ in range(8 * ORDERS):  # of two tags there are but two
        source.shuffle(rest)
        order = ", ".join([*kept, *rest])
        orders.setdefault(order, order)
        if len(orders) == ORDERS:
            break
    return list(orders.values())
