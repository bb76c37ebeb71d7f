"""Versions of installed packages. A process reads each once: the metadata of a package take 8 ms to parse."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

LOADERS = ("diffusers", "peft", "torch", "transformers")


@cache
def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # ours, in a checkout that was not installed
        return "not installed"


def loader_versions() -> dict[str, str]:
    """Versions of the packages whose loaders read what is exported."""
    return {package: installed_version(package) for package in LOADERS}
