"""JSON Lines: one JSON value per line.

Only a line feed ends a line, with or without a carriage return before it. `str.splitlines` also divides at U+2028,
U+0085 and others, which JSON allows within a string and which `json.dumps(..., ensure_ascii=False)` writes as they are.
"""

import json
from typing import Any

from .documents import parse_json


def lines_of(text: str) -> list[str]:
    """The lines of a text, without the blank ones at its end."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def parse(line: str) -> Any:
    """The value of one line.

    Raises:
        ValueError: the line is blank, no JSON, nested too deeply, or holds a number of too many digits.
    """
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        what = f"not JSON, {error.msg} at column {error.colno}" if line.strip() else "the line is empty"
        raise ValueError(what) from error
