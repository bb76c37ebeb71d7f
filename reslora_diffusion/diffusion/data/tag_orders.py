"""Captions that are lists of tags, in several orders: `--shuffle_caption` and `--keep_tokens`, as in kohya's scripts.

    tag_orders("sks, cat, sitting, outdoors", keep_tokens=1)   -> itself, "sks, outdoors, cat, sitting", ...

Prompts are encoded once, before training, so the orders are drawn once too: a few for each caption, which depend on the
caption alone.
"""

import random
from collections import Counter
from collections.abc import Iterable

ORDERS = 8  # of a caption, at most


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """Count the captions that have each tag, in small letters, as kohya's scripts do."""
    return dict(Counter(tag.strip().lower() for caption in captions for tag in caption.split(",") if tag.strip()))


def tag_orders(caption: str, keep_tokens: int = 0) -> list[str]:
    """The caption and other orders of its tags; the first `keep_tokens` tags stay in front."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, rest = tags[:keep_tokens], tags[keep_tokens:]
    if len(rest) < 2:
        return [caption]
    source, orders = random.Random(caption), {", ".join(tags): caption}
    for _ in range(8 * ORDERS):  # two tags have only two orders
        source.shuffle(rest)
        order = ", ".join([*kept, *rest])
        orders.setdefault(order, order)
        if len(orders) == ORDERS:
            break
    return list(orders.values())
