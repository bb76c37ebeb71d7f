"""Checks the surroundings of a run: installed packages, writable folders, and secrets on the command line."""

import re
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

SECRET = re.compile(r"--?[\w-]*(?:token|api_key|password|secret)", re.IGNORECASE)  # options whose value is not written
TOKEN = re.compile(r"hf_[A-Za-z0-9_]+")
HIDDEN = "..."


def is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def missing_packages(needed: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """One problem for each `(option as given, module, package)` whose module is not there; pip knows the package."""
    for option, module, package in needed:
        if not is_installed(module):
            yield f"{option} needs the package {package}, which is not installed: pip install {package}"


def unwritable(folder: Path) -> str | None:
    """Return why a folder, which may not exist yet, cannot be written to; it is tried, as permissions do not tell."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # it has no name, so a kill leaves nothing
            pass
    except OSError as error:
        return f"{there} {error.strerror.lower() if error.strerror else error}"
    return None


def without_secrets(words: Iterable[str]) -> list[str]:
    """A command line that may be written into a file: values of options for tokens and keys are replaced."""
    written, secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_option = SECRET.fullmatch(name) is not None
        if is_option and equals:
            word = f"{name}={HIDDEN}"
        elif secret and not word.startswith("--"):
            word = HIDDEN
        written.append(TOKEN.sub(HIDDEN, word))
        secret = is_option and not equals
    return written
