"""What comes from elsewhere: JSON that may be anything, and words that may hold any character."""

import json


def parsed_json(content: bytes) -> object:
    """The value.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds text that no encoding can write.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def lines_of(text: str) -> list[str]:
    """Lines as a text field has them. `str.splitlines` also splits at what is part of a line, such as U+2028."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
