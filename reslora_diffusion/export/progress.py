"""Progress on a terminal, silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """`items`, with a bar on standard error while somebody is looking and it takes more than a second."""
    from tqdm import tqdm

    yield from tqdm(items, desc=what, leave=False, disable=None, delay=1, file=sys.stderr)
