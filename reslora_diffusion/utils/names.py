"""Names that files and adapters may have: one rule for trainers, exports and the library.

file      letters and digits of any script, and . _ + -, in Unicode's composed form (NFC); begins with a letter or
          digit, so that no shell takes it for an option; what `<lora:NAME:1>` of A1111 and ComfyUI's lists can hold
adapter   what PEFT can keep as a module of that name: not empty, no dot, not the prefix of its own parameters
"""

import re
import unicodedata

LONGEST = 180  # bytes of a name: with its endings and hidden prefixes it stays below the 255 that file systems allow
FILE = re.compile(r"[^\W_][\w.+-]*")
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # by Windows


def composed(name: str) -> str:
    """The one of several ways to write the same characters that is used; macOS uses another in file names."""
    return unicodedata.normalize("NFC", name)


def file_name_problem(name: str) -> str | None:
    """Return why a file cannot have this name (without its ending); None if it can."""
    name = composed(name)
    if not FILE.fullmatch(name) or name.endswith("."):
        return f"{name!r} is not a file name (letters, digits and . _ + -, beginning with a letter or digit)"
    if len(name.encode(errors="replace")) > LONGEST:
        return f"{name[:40]!r}... has {len(name.encode())} bytes; wanted a file name of at most {LONGEST}"
    if name.partition(".")[0].lower() in RESERVED:
        return f"{name!r} is a device to Windows, not a file name"
    return None


def file_name_from(text: str, otherwise: str = "lora") -> str:
    """A file name from any text, such as the name of a folder."""
    name = re.sub(r"[^\w.+-]+", "-", composed(text)).strip("-.+_")
    name = name.encode()[:LONGEST].decode(errors="ignore").rstrip("-.+_")
    return name if name and not file_name_problem(name) else otherwise


def adapter_name_problem(name: object) -> str | None:
    """Return why an adapter cannot have this name; None if it can."""
    if not isinstance(name, str) or not name or "." in name or not name.isprintable():
        return f"adapter name: got {name!r}, wanted characters without dots"
    if name.startswith("lora_"):
        return f"adapter name: got {name!r}; names that begin with lora_ are taken for parameters by PEFT"
    return None
