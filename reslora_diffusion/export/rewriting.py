"""Copy a model with some of its weights changed, file by file: every other tensor keeps its bytes and its precision.

    component_weights(folder, variant)   the files that `from_pretrained` would load of one component
    rewritten(...)                       write them again, tensor by tensor
    differences(...)                     read both copies, and say where they differ though they should not

Loading and saving would not do: they take one precision for a whole pipeline, and drop what they do not know.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..utils.documents import parse_json
from ..utils.problems import listing
from .header import open_safetensors, reading

STEMS = ("diffusion_pytorch_model", "model")
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf", ".tflite", ".ot")
INDEX = ".safetensors.index.json"
Change = Callable[[str, Tensor], Tensor]  # name in the file and the stored tensor -> what to store


@dataclass(frozen=True)
class WeightFiles:
    """One component's weights: a file, or shards with an index. `names` maps each to its name in a copy."""

    folder: Path
    names: dict[str, str]
    index: str | None = None

    def tensors(self) -> Iterator[tuple[Path, str]]:
        """(file, tensor's name) of all of them."""
        for name in self.names:
            with reading(self.folder / name), open_safetensors(self.folder / name) as file:
                for tensor in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield self.folder / name, tensor


def component_weights(folder: Path, variant: str | None) -> WeightFiles:
    """The files that are loaded of a component's folder: of the variant if there are some, else without one.

    Raises:
        ValueError: there are none that can be used.
    """
    problems: list[str] = []
    for stem in STEMS:
        for suffix in dict.fromkeys((f".{variant}" if variant else "", "")):
            single = f"{stem}{suffix}.safetensors"
            if (folder / single).is_file():
                return WeightFiles(folder, {single: f"{stem}.safetensors"})
            for index in (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}{INDEX}"):  # now, and before 2024
                if (folder / index).is_file():
                    return sharded(folder, stem, index, problems)
    found = sorted(path.name for path in folder.glob("*") if path.suffix in WEIGHTS)
    problems.append(f"{folder} holds no safetensors weights that would be loaded; it holds {listing(found) or 'none'}")
    if any(name.endswith(".safetensors") for name in found):
        problems.append("give the variant, such as --variant fp16")
    raise ValueError("; ".join(problems))


def sharded(folder: Path, stem: str, index: str, problems: list[str]) -> WeightFiles:
    """The shards that an index names, under the names of today and without a variant in a copy.

    Raises:
        ValueError: a shard is not there.
    """
    with reading(folder / index):
        shards = sorted(set(parse_json((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
        plain = [Path(shard).name == shard for shard in shards]
    if missing := [
        shard for shard, name in zip(shards, plain, strict=True) if not (name and (folder / shard).is_file())
    ]:
        raise ValueError(f"{folder / index} names shards that are not there: {listing(missing)}")
    count = len(shards)
    names = {shard: f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n, shard in enumerate(shards, 1)}
    return WeightFiles(folder, names, index)


def other_files(folder: Path) -> list[Path]:
    """Return a component's files besides its weights: configurations, vocabularies, templates."""
    indices = (INDEX.removesuffix(".json"), ".bin.index")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix not in WEIGHTS
        and not any(part in path.name for part in indices)
        and not path.name.startswith(("README", ".git"))
    ]


def copy_others(folder: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy them; a configuration that states a precision states the one of the copy."""
    target.mkdir(parents=True, exist_ok=True)
    for path in other_files(folder):
        shutil.copyfile(path, target / path.name)
    config = target / "config.json"
    if dtype is not None and config.is_file():
        with reading(config):
            stated = parse_json(config.read_text(encoding="utf-8"))
            kind = str(dtype).removeprefix("torch.")
            stated |= {name: kind for name in ("dtype", "torch_dtype") if name in stated}
        config.write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rewritten(files: WeightFiles, target: Path, change: Change, dtype: torch.dtype | None) -> None:
    """Write a component's weights again, one file after the other.

    Args:
        files: what to read.
        target: a new folder.
        change: called for every tensor that is not only cast.
        dtype: precision of all floating-point tensors; each keeps its own if not given.
    """
    total, weight_map = 0, dict[str, str]()
    for name, copied in files.names.items():
        with reading(files.folder / name), open_safetensors(files.folder / name) as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {"format": "pt"}
        tensors = {key: cast(change(key, stored.pop(key)), dtype).contiguous() for key in list(stored)}
        save_file(tensors, target / copied, metadata=metadata)
        weight_map |= dict.fromkeys(tensors, copied)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if files.index:
        stem = next(iter(files.names.values())).rpartition("-of-")[0].rpartition("-")[0]
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (target / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def size_of(files: Iterable[WeightFiles]) -> int:
    """Bytes of weights."""
    return sum((weights.folder / name).stat().st_size for weights in files for name in weights.names)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def differences(files: WeightFiles, target: Path, change: Change, dtype: torch.dtype | None) -> list[str]:
    """Tensors of a copy that are not, bit for bit, what they should be."""
    unlike = []
    for name, copied in files.names.items():
        with open_safetensors(files.folder / name) as before, open_safetensors(target / copied) as after:
            names = set(before.keys())
            unlike += sorted(names ^ set(after.keys()))
            for key in names & set(after.keys()):
                wanted, got = cast(change(key, before.get_tensor(key)), dtype), after.get_tensor(key)
                same = wanted.dtype == got.dtype and wanted.shape == got.shape
                if not (same and torch.equal(wanted.flatten().view(torch.uint8), got.flatten().view(torch.uint8))):
                    unlike.append(key)
    return unlike


def precisions(files: Mapping[str, WeightFiles]) -> dict[str, str]:
    """Component -> the precisions that its weights are stored in."""
    found = {}
    for component, weights in files.items():
        kinds = set()
        for name in weights.names:
            with open_safetensors(weights.folder / name, framework="np") as file:
                kinds |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        found[component] = ", ".join(sorted(kinds))
    return found
