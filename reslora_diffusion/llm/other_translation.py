"""A YAML of axolotl or LLaMA-Factory, translated: options of ours, and what there is to say of the rest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Translation:
    """Our options, and what there is to say about the others.

    Attributes:
        program: whose file it is.
        values: options of ours by name.
        notes: what is done otherwise here, or changes nothing.
        problems: what would change what is trained and is not done here.
    """

    program: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


Answer = Callable[[Translation, Any, Mapping[str, Any]], None]
"""Adds to a translation what one key says: `answer(found, value, given)`, where `given` are all keys of the file."""
