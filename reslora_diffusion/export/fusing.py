"""Fuse a LoRA into its base: W' = W + scale * delta_weight, added in float32, stored in the base's precision.

A base is a diffusers pipeline or a transformers model, in a folder or on the hub. What can be checked from its
configurations is checked before its weights are loaded; what was written is read back and compared.
"""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from reslora_diffusion.core.functional import LoraFactors

from ..problems import listing
from ..utils.files import partial_name, replace_folder
from .base import base_layer, check_merge, is_transposed
from .factors import Components, matrices
from .header import open_safetensors
from .keys import DENOISERS, flat_path
from .limits import CheckFailed
from .peft_folder import MODEL
from .progress import progress
from .proof import health_problems
from .reader import read_lora
from .standins import fitting_models, model_class, pipeline_index, transformers_config

STORED = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class FuseReport:
    """A fused model. `rounding` is the largest share of a module's delta that the base's precision swallowed."""

    path: Path
    base: str
    modules: int
    scale: float
    dtype: str
    rounding: float

    def __str__(self) -> str:
        return (
            f"{self.modules} modules of {self.base} fused at scale {self.scale:g}; storing them as {self.dtype} cost "
            f"at most {self.rounding:.1e} of a module's delta\nwrote {self.path}"
        )


def fuse(
    source: str | Path,
    base: str,
    output: str | Path,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    overwrite: bool = False,
) -> FuseReport:
    """Write the base with a LoRA in it, as a model of its own.

    Args:
        source: any LoRA file or folder.
        base: folder or hub name of a diffusers pipeline or transformers model.
        output: a new folder; one that holds something is replaced only with `overwrite`.
        scale: strength of the LoRA.
        dtype: precision of the result; the base's own if not given.
        variant: of the base's weight files, such as "fp16".

    >>> fuse("my_lora.safetensors", "stable-diffusion-v1-5/stable-diffusion-v1-5", "fused")
    >>> StableDiffusionPipeline.from_pretrained("fused")

    Raises:
        ValueError: the LoRA is broken or for another base, or the output is taken.
        CheckFailed: a ValueError too; the result overflows, or was not written as computed.
    """
    output = Path(output)
    lora = read_lora(source)
    check_merge(source, base, output, overwrite, health_problems(lora.components))
    fitting_models(lora.components, base)
    model, parts = load_whole(base, dtype, variant)
    rounding, written = 0.0, {}
    if tied := tied_weights(lora.components, parts):
        raise ValueError(f"{source} cannot be merged into {base}: {listing(tied)} share their weight with other layers")
    layers = {component: dict(parts[component].named_modules()) for component in lora.components}
    todo = [(c, path, f) for c, modules in lora.components.items() for path, f in modules.items()]
    for component, path, factors in progress(todo, "fusing"):
        layer = base_layer(layers[component], path)
        delta = scale * dense(factors, layer)
        exact = layer.weight.data.float() + delta
        fused = exact.to(layer.weight.dtype)
        if not fused.isfinite().all():
            raise CheckFailed(f"{component}.{path} overflows {fused.dtype} with the LoRA in it; nothing was written")
        if size := delta.norm().item():
            rounding = max(rounding, ((fused.float() - exact).norm() / size).item())
        layer.weight.data = fused
        written[component, path] = fused
    fresh = partial_name(output)
    try:
        save_whole(model, base, fresh)
        if unlike := [f"{c}.{path}" for (c, path), w in written.items() if not is_stored(fresh, c, path, w)]:
            raise CheckFailed(f"{len(unlike)} fused modules were not written as computed: {listing(unlike)}")
        replace_folder(fresh, output)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    kinds = sorted({str(w.dtype).removeprefix("torch.") for w in written.values()})
    return FuseReport(output, base, len(written), scale, ", ".join(kinds), rounding)


def dense(factors: LoraFactors, layer: nn.Module) -> Tensor:
    """Float32 delta_weight in the shape of a layer's weight."""
    A, B = matrices(factors)
    delta = (B @ A).float()
    return delta.T if is_transposed(layer) else delta.reshape(layer.weight.shape)


def tied_weights(components: Components, parts: dict[str, nn.Module]) -> list[str]:
    """Modules whose weight is also another's, such as an output layer's that is the embedding: both would change."""
    tied = []
    for component, modules in components.items():
        model = parts[component]
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        layers = dict(model.named_modules())
        tied += [f"{component}.{path}" for path in modules if uses[id(base_layer(layers, path).weight)] > 1]
    return tied


def load_whole(base: str, dtype: torch.dtype | None, variant: str | None) -> tuple[object, dict[str, nn.Module]]:
    """The base with its weights, and its models by component."""
    if pipeline_index(base) is None:
        config = transformers_config(base)
        cls = model_class(base, "transformers", config.architectures[0])
        model = cls.from_pretrained(base, dtype=dtype or "auto")
        return model, {MODEL: model}
    folder = base if Path(base).is_dir() else DiffusionPipeline.download(base, variant=variant)
    dtype = dtype or stored_dtype(Path(folder))
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, variant=variant)
    return pipeline, {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def stored_dtype(folder: Path) -> torch.dtype:
    """Precision of a pipeline's denoiser on disk."""
    for component in DENOISERS:
        for path in sorted((folder / component).glob("*.safetensors")):
            with open_safetensors(path, framework="np") as file:
                kinds = {file.get_slice(name).get_dtype() for name in list(file.keys())[:8]}
            return STORED.get(kinds.pop(), torch.float32)
    return torch.float32


def save_whole(model: object, base: str, folder: Path) -> None:
    """Everything that is needed to load it again, tokenizer included."""
    model.save_pretrained(folder, safe_serialization=True)
    if isinstance(model, transformers.PreTrainedModel):
        try:
            transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        except (OSError, ValueError):
            pass  # a model without a tokenizer of its own


def is_stored(folder: Path, component: str, path: str, weight: Tensor) -> bool:
    """Whether a written model holds exactly this weight, under either of CLIP's names."""
    place = folder if component == MODEL else folder / component
    names = {f"{path}.weight", f"{flat_path(path)}.weight"}
    for file_path in place.glob("*.safetensors"):
        with open_safetensors(file_path) as file:
            for name in names & set(file.keys()):
                return torch.equal(file.get_tensor(name), weight)
    return False
