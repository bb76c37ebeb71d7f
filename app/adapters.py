"""LoRA files on one pipeline: each loaded once under a name of its own, switched by name, read back after each switch.

What an image was really generated with is taken from the layers: the adapters that are enabled, present and active, and
each one's strength as its scaling now over its scaling when it was loaded. A switch that leaves anything else behind
is an error, not an image. Likewise for loading: what the layers hold is compared with the file, module by module.

Files are read by `reslora_diffusion.export`, which opens nothing but safetensors and checks header and structure first;
diffusers' loader gets the factors that were read, and never sees the file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from reslora_diffusion.core.dora import magnitude_of
from reslora_diffusion.core.functional import LoraFactors, with_magnitude
from reslora_diffusion.export.base import base_problems
from reslora_diffusion.export.factors import common_rank, relative_error
from reslora_diffusion.export.inspection import Inspection, inspect_lora
from reslora_diffusion.export.keys import flat_path
from reslora_diffusion.export.reader import LoraFile, read_lora
from reslora_diffusion.export.writer import diffusers_tensors, uniform

from .foreign import name_of
from .new_tokens import NewTokens
from .request import Adapter, Column, Limits, joined

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
MAX_LOADED = 16  # adapters kept in memory; beyond it the one unused for longest goes
MAX_BYTES = 2 * 2**30
MAX_LABEL = Limits().label_characters
STRENGTH_TOLERANCE = 1e-6
LOADING_TOLERANCE = 2e-2  # of a module's difference: room for a pipeline in bfloat16, none for a module left out


@dataclass(frozen=True)
class FileCard:
    """The facts that `reslora inspect` knows of a file, and what keeps it from the loaded base."""

    adapter: Adapter
    inspection: Inspection
    mismatches: list[str]

    @property
    def fits(self) -> bool:
        return not self.mismatches


class AdapterShelf:
    """The adapters of one pipeline."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.models: dict[str, nn.Module] = {
            name: model for name in COMPONENTS if isinstance(model := getattr(pipe, name, None), nn.Module)
        }
        self.tokens = NewTokens(pipe)
        self.loaded: dict[str, dict[nn.Module, float]] = {}  # adapter name -> scaling of each layer at strength 1

    def card(self, path: Path, label: str | None = None) -> FileCard:
        """Read a file without loading it.

        Raises:
            ValueError: it is no LoRA file, with everything that is wrong with it.
        """
        if not path.is_file():
            raise ValueError(f"{path.name} is no file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path.name} has {size / 2**30:.1f} GiB; LoRA files of at most 2 GiB are read")
        inspection = inspect_lora(path)
        adapter = Adapter(name_of(label or default_label(path), MAX_LABEL), str(path), inspection.sha256[0])
        found = mismatches(inspection, read_lora(path, dora=True), self.models) + self.tokens.problems(path)
        return FileCard(adapter, inspection, found)

    def load(self, adapter: Adapter) -> str:
        """Bring a file into the pipeline unless it is there; returns its name."""
        name = adapter_name(adapter)
        if name in self.loaded:
            self.loaded[name] = self.loaded.pop(name)  # most recently used last
            return name
        card = self.card(Path(adapter.path), adapter.label)
        if card.adapter.sha256 != adapter.sha256:
            raise ValueError(f"{adapter.label}: the file at {Path(adapter.path).name} has changed since it was chosen")
        if not card.fits:
            raise ValueError(joined(f"{adapter.label} does not fit the loaded base", card.mismatches))
        if len(self.loaded) >= MAX_LOADED:
            self.unload(next(iter(self.loaded)))
        lora = read_lora(Path(adapter.path), dora=True)
        self.tokens.load(name, Path(adapter.path))
        try:
            self.pipe.load_lora_weights(tensors_of(lora), adapter_name=name)
        except Exception:
            self.pipe.delete_adapters(name)  # some components may hold it already
            raise
        self.loaded[name] = {layer: layer.scaling[name] for layer in self.layers() if name in layer.scaling}
        if unlike := self.differences(name, lora):
            self.unload(name)
            raise ValueError(joined(f"{adapter.label} did not arrive in the pipeline as its file has it", unlike))
        return name

    def differences(self, name: str, lora: LoraFile) -> list[str]:
        """Modules in which a loaded adapter is not what its file says: loaders skip what they do not know."""
        found = []
        for component, paths in lora.components.items():
            modules = dict(self.models[component].named_modules())
            for path, factors in paths.items():
                layer = modules.get(path, modules.get(flat_path(path)))
                if name not in getattr(layer, "lora_A", {}):
                    found.append(f"{component}.{path} was left out")
                    continue
                A, B = (side[name].weight.detach().cpu() for side in (layer.lora_A, layer.lora_B))
                held = with_magnitude(LoraFactors(A, B, layer.scaling[name]), magnitude_of(layer, name))
                if (error := relative_error(held, factors)) > LOADING_TOLERANCE:
                    found.append(f"{component}.{path} differs by {error:.1%}")
        return found

    def unload(self, name: str) -> None:
        self.pipe.delete_adapters(name)
        del self.loaded[name]

    def switch(self, column: Column) -> str:
        """Make the pipeline generate with one column and nothing else; returns what was read back.

        Raises:
            RuntimeError: the layers do not hold what was asked.
        """
        if column.adapter is None:
            wanted = {}
            self.pipe.disable_lora()
        else:
            name = self.load(column.adapter)
            wanted = {name: column.strength}
            self.pipe.enable_lora()
            self.pipe.set_adapters([name], [column.strength])
        found = self.read_back()
        if found.keys() != wanted.keys() or any(abs(found[n] - s) > STRENGTH_TOLERANCE for n, s in wanted.items()):
            raise RuntimeError(f"the pipeline was to hold {wanted or 'no adapter'} and holds {found or 'none'}")
        return Column(column.adapter, found[name]).held if column.adapter else column.held

    def worded(self, column: Column, prompt: str) -> str:
        """A prompt with the new tokens that a column's adapter was trained with, in place of their words."""
        return self.tokens.worded(adapter_name(column.adapter) if column.adapter else None, prompt)

    def layers(self) -> list[nn.Module]:
        return [m for model in self.models.values() for m in model.modules() if isinstance(m, BaseTunerLayer)]

    def read_back(self) -> dict[str, float]:
        """Adapter -> strength that the next forward will really use.

        Raises:
            RuntimeError: layers disagree about a strength.
        """
        strengths: dict[str, set[float]] = {}
        for layer in self.layers():
            if layer.disable_adapters:
                continue
            for name in layer.active_adapters:
                full = self.loaded[name].get(layer)  # absent where the file does not reach, zero where its alpha is
                if full:
                    strengths.setdefault(name, set()).add(layer.scaling[name] / full)
        if uneven := {n: s for n, s in strengths.items() if max(s) - min(s) > STRENGTH_TOLERANCE}:
            raise RuntimeError(f"layers disagree about the strength of {', '.join(uneven)}")
        return {name: max(values) for name, values in strengths.items()}


def tensors_of(lora: LoraFile) -> dict[str, Tensor]:
    """A file's factors as diffusers' loader takes them, without the file's header: it may hold regular expressions
    that never end, and whoever runs them holds the whole process."""
    return diffusers_tensors(uniform(lora.components, common_rank(lora.components), torch.float32))


def mismatches(inspection: Inspection, lora: LoraFile, models: dict[str, nn.Module]) -> list[str]:
    """Name what keeps a file from working on these models; first of all, which family it is for."""
    found = base_problems(lora.components, models)
    if foreign := lora.components.keys() - models.keys():
        found.append(f"the base has no {', '.join(sorted(foreign))}")
    if found and inspection.family.is_named:
        found.insert(0, f"this file is for {inspection.family}")
    return found + inspection.problems


def default_label(path: Path) -> str:
    """A file's own name, or its folder's where the file is called what every diffusers file is called."""
    generic = path.stem in ("pytorch_lora_weights", "adapter_model")
    return path.parent.name if generic and path.parent.name else path.stem


def adapter_name(adapter: Adapter) -> str:
    """Goes by content: two files never share it, whatever they are called, and one file is never loaded twice."""
    return f"file_{adapter.sha256[:16]}"
