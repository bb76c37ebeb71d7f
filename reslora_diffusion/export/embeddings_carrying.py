"""New tokens go where their LoRA goes: beside a copy of it, and into a model that it is merged into.

A LoRA that was trained with new tokens computes something else without them.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..utils.documents import parse_json
from ..utils.files import atomic_write
from ..utils.problems import listing
from .embeddings import OLD_END, key_of, read_embeddings
from .embeddings_header import SUFFIX
from .embeddings_inspection import embeddings_beside
from .header import locate, reading
from .report import ExportReport
from .rewriting import Change

TABLES = {"t5": ("shared.weight", "embed_tokens.weight")}  # names of a text encoder's table end so
TABLE_OF_CLIP = ("token_embedding.weight",)


def with_new_tokens(
    reports: list[ExportReport], sources: Sequence[str | Path], output: str | Path, name: str
) -> list[ExportReport]:
    """Copy the embeddings beside LoRAs to what was made of these, a folder or a file; of one LoRA under the name of the
    copy. Returns the reports with a note on each."""
    found = [path for path in (embeddings_beside(locate(Path(source))) for source in sources) if path is not None]
    output = Path(output)
    folder = output.parent if output.suffix == ".safetensors" else output
    for path in dict.fromkeys(found):
        target = folder / (f"{name}{SUFFIX}" if len(found) == 1 else path.name)
        if target.resolve() != path.resolve():
            with atomic_write(target) as fresh:
                shutil.copyfile(path, fresh)
        whose = "it" if len(found) == 1 else "one of them"
        reports[0].notes.append(f"wrote {target}, the new tokens that {whose} was trained with")
    return reports


class TaughtTokens:
    """The new tokens beside a LoRA, for a copy of its base.

    Args:
        lora: the LoRA's file or folder.
        folder: the copy of a pipeline, with its configurations and tokenizers and yet without weights; these learn of
            the tokens.

    Raises:
        ValueError: the tokens do not go with the base.
    """

    def __init__(self, lora: Path, folder: Path) -> None:
        self.path = embeddings_beside(locate(lora))
        self.changed: set[tuple[str, str]] = set()
        self.rows: dict[str, tuple[Tensor, int, tuple[str, ...]]] = {}  # by component: rows, first id, names of tables
        if self.path is None:
            return
        embeddings = read_embeddings(self.path)
        names = embeddings.names
        index = json_of(folder / "model_index.json")
        kinds = {part: str(kind[1]) for part, kind in index.items() if isinstance(kind, list)}
        for key, rows in embeddings.rows.items():
            component = next((part for part, kind in kinds.items() if key_of(part, kind) == key), None)
            config = json_of(folder / str(component) / "config.json") if component else {}
            if component is None or config.get("d_model" if key == "t5" else "hidden_size") != rows.shape[1]:
                raise ValueError(f"{self.path} has {key} {rows.shape[1]} wide, and the base has no such text encoder")
            place = folder / component.replace("text_encoder", "tokenizer")
            tokenizer = getattr(transformers, kinds[place.name]).from_pretrained(place)
            if known := [name for name in names if name in tokenizer.get_vocab()]:
                raise ValueError(f"the tokenizer of the base has {listing(known)} of {self.path} already")
            tokenizer.add_tokens(names)
            tokenizer.save_pretrained(place)
            first = tokenizer.convert_tokens_to_ids(names[0])
            config["vocab_size"] = max(config["vocab_size"], first + len(names))
            if config.get("eos_token_id") == OLD_END and key != "t5":
                config["eos_token_id"] = tokenizer.eos_token_id
            (folder / component / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            self.rows[component] = (rows, first, TABLES.get(key, TABLE_OF_CLIP))

    @property
    def tables(self) -> int:
        """Return how many tensors of the copy have new rows; T5's table may be stored twice."""
        return len(self.changed)

    def change(self, component: str, others: Change) -> Change:
        """Change a component's tensors: its table gets the rows, and the others are left to `others`."""
        if component not in self.rows:
            return others
        rows, first, tables = self.rows[component]

        def changed(name: str, weight: Tensor) -> Tensor:
            if not name.endswith(tables):
                return others(name, weight)
            missing = max(0, first + len(rows) - len(weight))
            longer = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
            longer[first : first + len(rows)] = rows.to(weight)
            self.changed.add((component, name))
            return longer

        return changed

    def __str__(self) -> str:
        return f"new tokens of {self.path.name} are in its tokenizers and in {listing(self.rows)}" if self.path else ""


def json_of(path: Path) -> dict[str, Any]:
    """A configuration."""
    with reading(path):
        return dict(parse_json(path.read_text(encoding="utf-8")))
