"""JSON, YAML and TOML that anybody may have written: plain values, or a ValueError with the reason.

Parsers for these formats may fail in ways of their own on what is no sensible document (RecursionError, OverflowError,
months beyond twelve), take a time that is out of all proportion, and return what nothing can be done with: half of a
surrogate pair, which no encoding can write, or a number of a thousand digits. All of that is refused here, once.
"""

import json
import math
import tomllib
from collections.abc import Callable
from datetime import date, datetime, time
from typing import Any

import yaml

from .problems import BAD_DATA

LARGEST = {".json": 2**22, ".toml": 2**16, ".yaml": 2**16, ".yml": 2**16}  # bytes; real ones have a few thousand
MOST_DOTS = 200  # in a line of TOML: a key of n parts takes n^2 memory
LARGEST_NUMBER = 2**63
IN_TEXT = ' in "<unicode string>",'  # what YAML says of a file that it is given as a text


class Loader(yaml.SafeLoader):
    """YAML's plain types without aliases: a few hundred bytes of these can stand for gigabytes. A key that is there
    twice is refused: the first of its values would be lost without a word."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor[:40]}) are not read; line {mark.line + 1}")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in known:
                    raise yaml.YAMLError(f"{key.value[:40]!r} is there twice; line {key.start_mark.line + 1}")
                known.add((key.tag, key.value))
        return node


def parse_json(text: str | bytes, **how: Any) -> Any:
    """The value of a JSON text; `how` is for `json.loads`.

    Raises:
        ValueError: it is none, is nested too deeply, or holds what no encoding can write.
    """
    try:
        value = json.loads(text, **how)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # type: ignore[operator]
        check_encodable(json.dumps(value, ensure_ascii=False))
    elif isinstance(text, str):
        check_encodable(text)
    return value


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, without keys of which one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)[:40]!r} is there twice")
    return found


def check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no character") from None


def parse_toml(text: str) -> Any:
    if max(line.count(".") for line in text.split("\n")) > MOST_DOTS:
        raise ValueError(f"a line has more than {MOST_DOTS} dots")
    return tomllib.loads(text)


PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": lambda text: parse_json(text, object_pairs_hook=each_once),
    ".toml": parse_toml,
    ".yaml": lambda text: yaml.load(text, Loader),
    ".yml": lambda text: yaml.load(text, Loader),
}


def parse_configuration(content: bytes, suffix: str) -> Any:
    """The value of a configuration file: None, truth values, numbers, texts, and lists and tables of these.

    Args:
        suffix: what the file's name ends with, one of `PARSERS`.

    Raises:
        ValueError: in one line, what is wrong with it.
    """
    if len(content) > LARGEST[suffix]:
        raise ValueError(f"it has {len(content)} bytes; at most {LARGEST[suffix]} are read")
    try:
        return plain(PARSERS[suffix](content.decode("utf-8-sig")))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (*BAD_DATA, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).replace(IN_TEXT, "").split()) or type(error).__name__) from None


def plain(value: Any) -> Any:
    """The value, with dates as texts; raises ValueError for what is no value of an option."""
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, str):
        check_encodable(value)
    elif isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
        raise ValueError(f"it holds a whole number of about {round(math.log10(abs(value))) + 1} digits")
    elif not isinstance(value, (int, float, type(None))):
        raise ValueError(f"it holds a {type(value).__name__}, wanted numbers, texts, lists and tables")
    return value
