"""Pages of a comparison: its grid in parts, one for each prompt, seed, adapter or whatever else it goes through.

A page holds the rows, or the columns, of one value. The base has no value of adapter and strength, and stands on every
page.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from .request import Column, CompareRequest, Row


class PageAxis(StrEnum):
    NOTHING = "nothing: one page"
    PROMPT = "prompt"
    SEED = "seed"
    ROWS = "what rows go through"
    ADAPTER = "adapter"
    STRENGTH = "strength"
    COLUMNS = "what columns go through"


OF_ROWS: Mapping[PageAxis, Callable[[Row], str | None]] = {
    PageAxis.PROMPT: lambda row: row.prompt,
    PageAxis.SEED: lambda row: f"seed {row.seed}",
    PageAxis.ROWS: lambda row: row.setting and row.setting.label,
}
OF_COLUMNS: Mapping[PageAxis, Callable[[Column], str | None]] = {
    PageAxis.ADAPTER: lambda column: column.adapter and column.adapter.label,
    PageAxis.STRENGTH: lambda column: f"strength {column.strength:g}" if column.adapter else None,
    PageAxis.COLUMNS: lambda column: column.setting and column.setting.label,
}


def pages(request: CompareRequest, axis: str) -> tuple[list[str], list[int | None], list[int | None]]:
    """Names of the pages, and the number of the page of each row and of each column; None stands on every page.

    Fewer than two pages are none.
    """

    def parts(keys: Mapping, places: Sequence[Any]) -> list[str | None]:
        key = keys.get(axis, lambda _: None)
        return [key(place) for place in places]

    rows, columns = parts(OF_ROWS, request.rows), parts(OF_COLUMNS, request.columns)
    names = list(dict.fromkeys(name for name in (*rows, *columns) if name is not None))
    if len(names) < 2:
        return [], [None] * len(rows), [None] * len(columns)
    number = {None: None} | {name: place for place, name in enumerate(names)}
    return names, [number[name] for name in rows], [number[name] for name in columns]
