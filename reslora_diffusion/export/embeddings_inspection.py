"""Description of a file of embeddings of new tokens."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.problems import listing, printable
from .embeddings import Embeddings, read_embeddings
from .embeddings_header import SUFFIX, is_embeddings, read_embeddings_header
from .header import DIFFUSERS_FILE, PEFT_FILE
from .tables import table

FAMILIES = {
    (("clip_l", 768),): "Stable Diffusion 1.x or FLUX.1",
    (("clip_l", 1024),): "Stable Diffusion 2.x",
    (("clip_l", 768), ("clip_g", 1280)): "SDXL or Stable Diffusion 3",
    (("clip_l", 768), ("clip_g", 1280), ("t5", 4096)): "Stable Diffusion 3",
    (("clip_l", 768), ("t5", 4096)): "FLUX.1",
}


@dataclass(frozen=True)
class EmbeddingsInspection:
    """All of it, as data (`to_dict`) and as a page of text (`str`)."""

    path: Path
    embeddings: Embeddings

    @property
    def problems(self) -> list[str]:
        """Reasons why nobody can use the file."""
        zero = [key for key, rows in self.embeddings.rows.items() if not rows.any()]
        return [f"{listing(zero)} are zero: the tokens say nothing"] if zero else []

    @property
    def healthy(self) -> bool:
        return not self.problems

    @property
    def family(self) -> str:
        """The models that have encoders of these widths."""
        widths = tuple((key, rows.shape[1]) for key, rows in self.embeddings.rows.items())
        return FAMILIES.get(widths, "a model of other widths")

    def to_dict(self) -> dict[str, Any]:
        return {
            "files": [str(self.path)],
            "kind": "embeddings of new tokens",
            "family": self.family,
            "tokens": self.embeddings.tokens,
            "encoders": {key: list(rows.shape) for key, rows in self.embeddings.rows.items()},
            "norms": {key: rows.norm(dim=1).tolist() for key, rows in self.embeddings.rows.items()},
            "healthy": self.healthy,
            "problems": self.problems,
            "facts": self.embeddings.facts,
        }

    def __str__(self) -> str:
        own, said = self.embeddings, [(name, printable(value)) for name, value in self.embeddings.facts.items()]
        norms = {key: rows.norm(dim=1) for key, rows in own.rows.items()}
        sizes = [
            (key, *rows.shape, f"{norms[key].min():.3g} to {norms[key].max():.3g}") for key, rows in own.rows.items()
        ]
        problems = [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join(
            [
                f"{printable(self.path, None)}: embeddings of {len(own.names)} new tokens for {self.family}",
                f"in prompts {spelled(own.tokens)}",
                "",
                *table(("encoder", "tokens", "width", "norms of rows"), sizes),
                *(["", *table(("its header says", ""), said)] if said else []),
                "",
                *(problems or ["healthy: every number finite, not all zero"]),
            ]
        )


def spelled(tokens: dict[str, list[str]]) -> str:
    """Return the tokens that each word stands for."""
    pairs = ((printable(word), printable("".join(own))) for word, own in tokens.items())
    return listing((f"{word} is {own}" if own != word else word for word, own in pairs), 20)


def inspect_embeddings(path: Path) -> EmbeddingsInspection:
    """Look at a file of embeddings.

    Raises:
        ValueError: it is none, with what is wrong with it.
    """
    return EmbeddingsInspection(path, read_embeddings(path))


def embeddings_beside(lora: Path) -> Path | None:
    """The embeddings of new tokens that a LoRA file was trained with: of diffusers' file those in its folder, if there
    is one such file; of any other those of its name (`dog.safetensors`, `dog-000200.safetensors`: `dog_emb`), there or
    in the folder above."""
    if lora.name in (DIFFUSERS_FILE, PEFT_FILE):
        found = [path for path in sorted(lora.parent.glob(f"*{SUFFIX}")) if is_embeddings(path)]
        return found[0] if len(found) == 1 else None
    names = (lora.stem, re.sub(r"-(step)?\d+$", "", lora.stem))
    places = (folder / f"{name}{SUFFIX}" for folder in (lora.parent, lora.parent.parent) for name in names)
    return next((path for path in places if path.is_file() and is_embeddings(path)), None)


def beside_note(lora: Path) -> list[str]:
    """A line on the new tokens that a LoRA was trained with."""
    path = embeddings_beside(lora)
    if path is None:
        return []
    try:
        tokens = spelled(read_embeddings_header(path).tokens)
    except ValueError as error:
        return [f"its new tokens cannot be read: {error}"]
    return [f"{printable(path.name)} beside it has the new tokens that it was trained with: {tokens}"]
