"""Input from elsewhere: JSON that may be anything, words that may hold any character, and
who asks."""

import sys

from reslora_diffusion.utils.documents import parse_json
from reslora_diffusion.utils.names import composed
from reslora_diffusion.utils.problems import printable_lines

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins a text that a spreadsheet computes
ALONE = ("127.0.0.1", "localhost", "::1")  # names of this machine under which no other reaches it


def parsed_json(content: bytes) -> object:
    """The value.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds text that no encoding can write.
    """
    return parse_json(content.decode("utf-8-sig"))


def lines_of(text: str) -> list[str]:
    """Lines as a text field has them. `str.splitlines` also splits at what is part of a line, such as U+2028."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def printable(text: object) -> str:
    """Lines without control characters, which could reorder what is read or look like words of ours, and without what
    no encoding can write. Unicode's normal form C, so that equal words are equal."""
    return printable_lines(composed(str(text)))


def name_of(text: str, length: int) -> str:
    """A stranger's name on one line; two that differ in their ends only still differ."""
    return shortened(printable(text).replace("\n", " ").strip(), length) or "unnamed"


def is_number(value: object) -> bool:
    """A finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) < sys.float_info.max  # NaN is not below it


def is_text(text: str) -> bool:
    """Tell whether an encoding can write it: half of a surrogate pair alone is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_cell(value: object) -> object:
    """A value for CSV; what a spreadsheet would compute is made text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def shortened(text: str, length: int = 60) -> str:
    """The beginning and the end: names of checkpoints, and columns at strengths, differ there."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"
