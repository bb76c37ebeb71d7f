"""A program's options are the fields of a dataclass: each fact about an option stands in its field and nowhere else.

    @dataclass
    class Options:
        rank: int = option(4, "Rank of the adapters.", at_least=1, binds=True)

`convert` makes a value from the words of a command line, `value_problems` says which values are no choice of theirs or
out of bounds. `option_parser.Reader` reads command lines and files.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .problems import nearest

TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Facts:
    """The facts about one option.

    Attributes:
        help: what it means, for `--help`.
        choices: the values that it may have.
        at_least, above, below, at_most: bounds of a number.
        lower: whether capital letters are read as small ones.
        import_path: whether the dotted path of a Python class may be given in place of a choice.
        binds: whether a checkpoint depends on it, so that a continued run must agree on it.
        in_header: whether the headers of exported files name it.
        recorded: whether `run.json` holds it.
        families: its default for some families of models, by the class of their pipelines.
        aliases: further names that it is read under.
        kohya: its names in kohya's scripts, each with a remark on what differs, or "".
    """

    help: str
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    lower: bool = False
    import_path: bool = False
    binds: bool = False
    in_header: bool = False
    recorded: bool = True
    families: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    kohya: Mapping[str, str] = field(default_factory=dict)


def option(default: Any, help: str, **facts: Any) -> Any:
    """A field of an options dataclass; `facts` are those of `Facts`."""
    metadata = {"facts": Facts(help, **facts)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def facts_of(kind: type) -> dict[str, Facts]:
    """Facts by the name of the option."""
    return {item.name: item.metadata["facts"] for item in dataclasses.fields(kind) if "facts" in item.metadata}


def default_of(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def convert(kind: Any, words: Sequence[str]) -> Any:
    """The value of `kind` that words of a command line give.

    Raises:
        ValueError: with what was wanted.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return first_that_fits([part for part in inner if part is not type(None)], words)
    if origin is list:
        return [convert(inner[0], [part]) for word in words for part in split(word, inner[0])]
    if origin is dict:
        pairs = [word.partition("=") for word in words]
        if not all(name and value for name, _, value in pairs):
            raise ValueError(f"name={wanted(inner[1])}")
        return {name: convert(inner[1], [value]) for name, _, value in pairs}
    if origin is Literal and len(words) == 1 and words[0] in inner:
        return words[0]
    if kind is bool and len(words) <= 1:
        if not words or words[0].lower() in TRUTH:
            return TRUTH[words[0].lower()] if words else True
    elif kind in (int, float, str, Path) and len(words) == 1 and (words[0] or kind is str):
        try:
            return kind(words[0])
        except ValueError:
            pass
    raise ValueError(wanted(kind))


def first_that_fits(kinds: Sequence[Any], words: Sequence[str]) -> Any:
    for kind in kinds:
        try:
            return convert(kind, words)
        except ValueError as error:
            if len(kinds) == 1:
                raise error from None
    raise ValueError(" or ".join(map(wanted, kinds)))


def split(word: str, kind: Any) -> list[str]:
    """`12,30` is two numbers; a comma in a text stays."""
    return [part.strip() for part in word.split(",") if part.strip()] if kind is int else [word]


def wanted(kind: Any) -> str:
    """The kind of a value in words."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(typing.get_args(kind))
    return {int: "a whole number", float: "a number", str: "one text", Path: "a path", bool: "true or false"}[kind]


def takes_many(kind: Any) -> bool:
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return any(typing.get_origin(part) in (list, dict) for part in parts)


def is_switch(kind: Any) -> bool:
    return kind in (bool, bool | None)


def value_problems(options: Any) -> Iterator[str]:
    """Values that are no choice of theirs, or out of bounds."""
    yield from wrong_values(options).values()


def wrong_values(options: Any) -> dict[str, str]:
    """The problems with values, by the name of the option."""
    found = {}
    for name, facts in facts_of(type(options)).items():
        value = getattr(options, name)
        if value is None:
            continue
        if facts.choices and value not in facts.choices and not (facts.import_path and is_import_path(value)):
            choices = ", ".join(map(str, facts.choices))
            found[name] = f"--{name}: got {value!r}, wanted {choices}{nearest(value, facts.choices)}"
        elif outside := [one for one in numbers_of(value, facts) if not in_bounds(one, facts)]:
            found[name] = f"--{name}: got {', '.join(map(str, outside))}, wanted {bounds(facts)}"
    return found


def numbers_of(value: Any, facts: Facts) -> list[float]:
    """The numbers that bounds are for: the value of an option, or what a list or dictionary with bounds holds."""
    held = [value]
    if isinstance(value, (list, dict)):
        bounded = any(bound is not None for bound in (facts.at_least, facts.above, facts.below, facts.at_most))
        held = [*(value.values() if isinstance(value, dict) else value)] if bounded else []
    return [one for one in held if type(one) in (int, float)]


def is_import_path(value: Any) -> bool:
    """Return whether a text is the dotted path of a class: a module and a name."""
    return isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))


def in_bounds(value: float, facts: Facts) -> bool:
    return (
        math.isfinite(value)
        and (facts.at_least is None or value >= facts.at_least)
        and (facts.above is None or value > facts.above)
        and (facts.below is None or value < facts.below)
        and (facts.at_most is None or value <= facts.at_most)
    )


def bounds(facts: Facts) -> str:
    """The bounds of a number in words."""
    parts = [] if facts.at_least is None else [f"{facts.at_least:g} or more"]
    parts += [] if facts.above is None else [f"a number above {facts.above:g}"]
    parts += [] if facts.below is None else [f"below {facts.below:g}"]
    parts += [] if facts.at_most is None else [f"at most {facts.at_most:g}"]
    return " and ".join(parts) or "a finite number"
