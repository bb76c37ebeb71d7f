"""Prompts with {placeholders}: `{subject} on {colour}` stands for all combinations of their values."""

import itertools
import string

from .foreign import shortened


def pieces(template: str) -> list[tuple[str, str | None]]:
    """(text, the name between braces after it), in order; `{{` is a brace.

    Raises:
        ValueError: braces that do not pair, or more than a name between them.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError:
        raise ValueError(f"braces do not pair in the prompt {shortened(template)!r}") from None
    found = []
    for text, name, spec, conversion in parsed:
        if name is not None and not (name.isidentifier() and not spec and conversion is None):
            raise ValueError(f"a placeholder is a word between braces, like {{subject}}; got {shortened(template)!r}")
        found.append((text, name))
    return found


def placeholder_names(template: str) -> list[str]:
    """Names between braces, each once, in order.

    Raises:
        ValueError: as `pieces`.
    """
    return list(dict.fromkeys(name for _, name in pieces(template) if name is not None))


def filled(template: str, placeholders: dict[str, tuple[str, ...]]) -> list[str]:
    """The template with every combination of its placeholders' values; braces of values are text.

    >>> filled("a {subject} on {colour}", {"subject": ("panda",), "colour": ("red", "blue")})
    ['a panda on red', 'a panda on blue']
    """
    names, parts = placeholder_names(template), pieces(template)
    prompts = []
    for values in itertools.product(*(placeholders[name] for name in names)):
        value_of = dict(zip(names, values, strict=True))
        prompts.append("".join(text + (value_of[name] if name else "") for text, name in parts))
    return prompts
