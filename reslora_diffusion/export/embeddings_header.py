"""Names and shapes in files of embeddings of new tokens, read without torch; `embeddings` describes the files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..utils.problems import listing, printable
from ..utils.wording import all_of
from .header import json_object, open_safetensors, reading

SUFFIX = "_emb.safetensors"
TOKENS = "reslora.tokens"  # in the header
KEYS = ("clip_l", "clip_g", "t5")
OF_COMFYUI = {"t5": "t5xxl"}
OF_KOHYA = "emb_params"
MOST_TOKENS = 1024  # of a file with a name for each encoder, in which many words may stand
MOST_OF_ONE = 75  # of a file with one tensor, which stands for one word of a prompt that CLIP reads whole
LEAST_WIDTH = 8  # of one tensor whose name does not say that it is a token: another kind is a counter or a scale
WORD = re.compile(r"<.+>|[^.]+")  # a token; the name of a layer's tensor has a dot, whatever adapter it is of


class EmbeddingsHeader(NamedTuple):
    """The facts that a file states before its numbers are read."""

    stored: dict[str, str]  # names of its tensors by encoder
    tokens: dict[str, list[str]]  # by the word that stands for them
    facts: dict[str, str]  # the rest of its header, ours without `reslora.`


def read_embeddings_header(path: Path) -> EmbeddingsHeader:
    """Read the header of a file of embeddings: ours, diffusers' or kohya's.

    Raises:
        ValueError: it is none, with what is wrong with it.
    """
    with reading(path):
        if not path.is_file():
            raise ValueError(f"{path} is no file")
        with open_safetensors(path, "np") as file:
            header, shapes = file.metadata() or {}, {key: file.get_slice(key).get_shape() for key in file.keys()}
        stored = stored_rows(shapes)
        if stored is None:
            shown = listing(printable(f"{key} {shape}") for key, shape in shapes.items())
            raise ValueError(f"{path} holds no embeddings of new tokens, but {shown or 'nothing'}")
        count = count_of(shapes[next(iter(stored.values()))])
        own = {name: value for name, value in header.items() if name.startswith("reslora.") and name != TOKENS}
        facts = {name.removeprefix("reslora."): value for name, value in own.items()}
        return EmbeddingsHeader(stored, tokens_of(header, path, [*stored.values()], count), facts)


def is_embeddings(path: Path) -> bool:
    """Return whether a file holds embeddings, by its names and shapes; False for a file of another kind."""
    try:
        with open_safetensors(path, "np") as file:
            return stored_rows({key: file.get_slice(key).get_shape() for key in file.keys()}) is not None
    except (OSError, ValueError):
        return False


def count_of(shape: Sequence[int]) -> int:
    """The number of tokens in a tensor of embeddings, which are its rows; a vector is of one token."""
    return shape[0] if len(shape) == 2 else 1


def stored_rows(shapes: Mapping[str, Sequence[int]]) -> dict[str, str] | None:
    """Names of a file's tensors by encoder; None if it is no file of embeddings."""
    if not shapes or any(len(shape) not in (1, 2) or 0 in shape for shape in shapes.values()):
        return None
    counts = {count_of(shape) for shape in shapes.values()}
    if len(counts) != 1 or max(counts) > MOST_TOKENS:
        return None
    if known := {key: key for key in KEYS if key in shapes}:
        return known if shapes.keys() <= {*KEYS, *OF_COMFYUI.values()} else None
    (alone, shape), *others = shapes.items()
    if others or max(counts) > MOST_OF_ONE or not WORD.fullmatch(alone):
        return None
    says_so = alone == OF_KOHYA or alone.startswith("<")
    return {"clip_l": alone} if says_so or shape[-1] >= LEAST_WIDTH else None


def tokens_of(header: Mapping[str, str], path: Path, stored: list[str], count: int) -> dict[str, list[str]]:
    """The tokens by word: as the header has them, else those of diffusers' scripts, or the one word of the file."""
    if TOKENS in header:
        tokens = json_object(header[TOKENS], f"{TOKENS} of {path}")
        sound = all(
            isinstance(own, list) and all(isinstance(name, str) and name for name in own) for own in tokens.values()
        )
        if not sound or not all(tokens) or len(set(names := all_of(tokens))) != count or len(names) != count:
            raise ValueError(f"{path}: its header names other tokens than its {count} rows")
        return tokens
    if stored[0] in KEYS:
        return {"TOK": [f"<s{number}>" for number in range(count)]}
    word = path.name.partition(".")[0] if stored[0] == OF_KOHYA else stored[0]
    return {word: [word, *(f"{word}_{number}" for number in range(1, count))]}
