"""Encoded images and prompts are stored from run to run: `--encoding_cache_dir`.

An entry is a safetensors file named by the hash of its key, and a key is everything that went into the entry: the
bytes of an image and of its mask, how it was cut, the weights of the autoencoder; a prompt's tokens and the weights of
the text encoders. The key is also written into the file, with a checksum of the tensors. An entry that does not say
exactly this of itself is encoded anew, so a pairing can be missing but never wrong.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...utils.files import atomic_write

FORMAT = 2  # of entries, and of how images are cut and encoded: counts up when either changes

Key = Mapping[str, Any]


def update(digest: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)


def identity(*models: nn.Module | None) -> str:
    """A hash of the weights."""
    digest = hashlib.sha256()
    for model in models:
        digest.update(type(model).__name__.encode())
        update(digest, model.state_dict() if model is not None else {})
    return digest.hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    update(digest, tensors)
    return digest.hexdigest()


class DiskCache:
    """Tensors by key, in a folder that several runs may use at once.

    >>> cache = DiskCache(Path("cache"))
    >>> cache.store({"kind": "text", "prompt": "a dog"}, {"hidden": hidden})
    >>> cache.load({"kind": "text", "prompt": "a dog"})["hidden"]
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.added = 0

    def place(self, key: Key) -> tuple[Path, str]:
        text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors", text

    def load(self, key: Key) -> dict[str, Tensor] | None:
        """The tensors of an entry; None if there is none, or none that is whole."""
        path, text = self.place(key)
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError):
            tensors, facts = {}, {}
        whole = facts.get("key") == text and facts.get("checksum") == checksum(tensors)
        return tensors if whole else None

    def store(self, key: Key, tensors: Mapping[str, Tensor]) -> None:
        path, text = self.place(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with atomic_write(path) as fresh:
            save_file(tensors, fresh, metadata={"key": text, "checksum": checksum(tensors)})
        self.added += 1
