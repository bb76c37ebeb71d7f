"""Checks of the commands' arguments, made before torch is imported; each raises ValueError with what is wrong.

The parameters have the names of the commands' (`commands.checking`); values are as click parsed them.
"""

from collections.abc import Sequence
from pathlib import Path

from .base import check_base, check_base_name, check_merge, check_pair, check_stored
from .embeddings_header import is_embeddings, read_embeddings_header
from .header import read_headers
from .limits import check_weights, parse_rank
from .trained import lora_of


def known_rank(rank: str) -> None:
    parse_rank(rank)


def readable(source: str) -> None:
    read_headers(Path(source), dora=True, products=True)


def inspectable(source: str) -> None:
    if Path(source).is_file() and is_embeddings(Path(source)):
        read_embeddings_header(Path(source))
        return
    read_headers(Path(source), beside=True, dora=True, products=True)


def readable_beside(source: str) -> None:
    """A LoRA that may have more beside it, which is only looked at."""
    read_headers(Path(source), beside=True, dora=True)


def trained(run: str) -> None:
    lora_of(Path(run))


def known_base(base: str | None) -> None:
    if base:
        check_base(base)


def mergeable(source: str, base: str, output: str, overwrite: bool, scale: float) -> None:
    check_merge(Path(source), base, Path(output), overwrite, scale=scale)


def fitting(source: str, base: str) -> None:
    """Return whether the shapes fit, once both are sound; what a base lacks is said by `mergeable`."""
    if not check_base_name(base):
        check_stored(read_headers(Path(source), dora=True, products=True), base)


def comparable(tuned: str, base: str) -> None:
    check_pair(tuned, base)


def combinable(sources: Sequence[str], weights: Sequence[str] | None) -> None:
    files, factors = files_and_weights(list(sources), list(weights or []))
    check_weights(factors, files)


def all_readable(sources: Sequence[str], weights: Sequence[str] | None) -> None:
    """Every file by itself."""
    problems = []
    for word in sources:
        try:
            if not is_weight(word, bool(weights)) and not word.startswith("-"):
                read_headers(Path(word))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))


def is_number(word: str) -> bool:
    try:
        return isinstance(float(word), float)
    except ValueError:
        return False


def is_weight(word: str, weighted: bool) -> bool:
    """Return whether a word among the files is a weight: the parser takes -0.6 for a file, and numbers that are no
    files are weights."""
    return weighted and is_number(word) and not Path(word).exists()


def files_and_weights(words: list[str], weights: list[str]) -> tuple[list[Path], list[float]]:
    """Files and weights of `A B --weights 1 -0.6`."""
    trailing = [word for word in words if is_weight(word, bool(weights))]
    numbers = [part for group in weights for part in group.split(",")] + trailing
    problems = [f"no such option: {word}" for word in words if word.startswith("-") and word not in trailing]
    problems += [f"--weights: got {number}, wanted a number" for number in numbers if not is_number(number)]
    if problems:
        raise ValueError("; ".join(problems))
    return [Path(word) for word in words if word not in trailing], [float(number) for number in numbers]
