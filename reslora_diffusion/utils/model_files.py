"""A model's files on this machine: configurations, and shapes from the headers of weights. No weight is read, no torch.

    Files("folder", None).shapes("unet")                   {"conv_in.weight": (320, 4, 3, 3), ...}
    Files("owner/name", "main").json("unet/config.json")   of the hub's local cache; nothing is fetched

Where they do not tell, or hold something else than they should, `Unknown` is raised, and the caller asks the libraries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .documents import parse_json
from .problems import BAD_DATA

LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it


class Unknown(Exception):
    """The files on this machine do not tell."""


@dataclass(frozen=True)
class Files:
    """The files of a folder, or of a model of the hub as far as they are in its local cache."""

    name: str
    revision: str | None

    def path(self, file: str) -> Path | None:
        found: Path | None = Path(self.name, file)
        if not Path(self.name).is_dir():
            from huggingface_hub import try_to_load_from_cache  # folders need not wait for it

            cached = try_to_load_from_cache(self.name, file, revision=self.revision)
            found = Path(cached) if isinstance(cached, str) else None
        return found if found and found.is_file() else None

    def json(self, file: str) -> dict[str, Any]:
        """The object in a JSON file."""
        if (path := self.path(file)) is None:
            raise Unknown(file)
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Unknown(file) from error
        if not isinstance(found, dict):
            raise Unknown(file)
        return found

    def shapes(self, folder: str, variant: str | None = None) -> dict[str, tuple[int, ...]]:
        """Shapes of a component's tensors by name; of a whole transformers model under "". Every precision that it is
        there in has the same."""
        stem = "model" if folder.startswith("text_encoder") or not folder else "diffusion_pytorch_model"
        folder = folder and f"{folder}/"
        for suffix in dict.fromkeys((f".{variant}" if variant else "", "", ".fp16")):
            if path := self.path(f"{folder}{stem}{suffix}.safetensors"):
                return shapes_in(path)
            names = (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json")
            if index := self.path(f"{folder}{names[0]}") or self.path(f"{folder}{names[1]}"):  # now, and before 2024
                shards = shards_in(index)
                paths = [path for shard in shards if (path := self.path(f"{folder}{shard}"))]
                if len(paths) == len(shards):
                    return {name: shape for path in paths for name, shape in shapes_in(path).items()}
        raise Unknown(folder)


def shards_in(index: Path) -> set[str]:
    """The files that the weights of a model are spread over, as its index names them."""
    try:
        return {str(shard) for shard in parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, *BAD_DATA) as error:
        raise Unknown(index.name) from error


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes from the header of a safetensors file. Weights that are packed, as quantised ones are, tell none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(LARGEST_HEADER, path.stat().st_size):
                raise Unknown(path.name)
            header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        if any(entry["dtype"].startswith(("U", "I")) for name, entry in header.items() if name.endswith(".weight")):
            raise Unknown(path.name)
        return {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
    except (OSError, *BAD_DATA) as error:
        raise Unknown(path.name) from error
