"""Fuse a LoRA into its base: W' = W + scale * delta_weight, added in float32, stored in the precision W has. Of a DoRA,
delta_weight is what it makes of W less W itself (`core.dora.decomposed_weight`).

A base is a diffusers pipeline or a transformers model, in a folder or on the hub. What can be checked from its
configurations is checked before its weights are read. Its files are copied tensor by tensor (`rewriting`), and read
back: the fused weights are what was computed, and all others are the base's, bit for bit.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from reslora_diffusion.core.dora import decomposed_weight
from reslora_diffusion.core.functional import LoraFactors

from ..utils.documents import parse_json
from ..utils.files import partial_name, replace_folder
from ..utils.problems import listing
from .base import base_layer, check_merge, is_transposed
from .embeddings_carrying import TaughtTokens
from .factors import Components, matrices
from .generation import take_generation
from .header import open_safetensors, reading
from .hollow import Models, fitting_models, pipeline_index
from .keys import flat_path
from .limits import CheckFailed
from .peft_folder import MODEL
from .products import ProductFactors
from .progress import progress
from .proof import health_problems
from .reader import LoraFile, read_lora
from .rewriting import Change, WeightFiles, component_weights, copy_others, differences, precisions, rewritten, size_of
from .single_file import as_folder

QUANTISED = "quantization_config"


@dataclass(frozen=True)
class FuseReport:
    """A fused model. `rounding` is the largest share of a module's delta that the base's precision swallowed;
    `untouched` counts the other tensors, which are the base's bit for bit, or cast if a precision was asked for."""

    path: Path
    base: str
    modules: int
    scale: float
    dtype: str
    rounding: float
    untouched: int = 0
    precisions: dict[str, str] = field(default_factory=dict)
    is_cast: bool = False
    stops: str | None = None
    tokens: str = ""

    def __str__(self) -> str:
        same = "are the base's in that precision" if self.is_cast else "are the base's, bit for bit"
        kinds = ", ".join(f"{component} {kind}" for component, kind in self.precisions.items())
        return (
            f"{self.modules} modules of {self.base} fused at scale {self.scale:g}; storing them as {self.dtype} cost "
            f"at most {self.rounding:.1e} of a module's delta\n"
            f"the other {self.untouched} tensors {same}; stored as {kinds}\n"
            + (f"generation stops where the LoRA was taught to: {self.stops}\n" if self.stops else "")
            + (f"{self.tokens}\n" if self.tokens else "")
            + f"wrote {self.path}"
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
    base_config: str | None = None,
) -> FuseReport:
    """Write the base with a LoRA in it, as a model of its own.

    Args:
        source: any LoRA file or folder.
        base: folder or hub name of a diffusers pipeline or transformers model, with safetensors weights; or one file.
        output: a new folder; one that holds something is replaced only with `overwrite`.
        scale: strength of the LoRA.
        dtype: precision of the result; every tensor keeps the base's own if not given.
        variant: of the base's weight files, such as "fp16".
        base_config: of a base that is one file: the pipeline whose configurations it has.

    >>> fuse("my_lora.safetensors", "stable-diffusion-v1-5/stable-diffusion-v1-5", "fused")
    >>> StableDiffusionPipeline.from_pretrained("fused")

    Raises:
        ValueError: the LoRA is broken or for another base, or the output is taken.
        CheckFailed: a ValueError too; the result overflows, or was not written as computed.
    """
    output = Path(output)
    lora = read_lora(source, dora=True, products=True)
    check_merge(source, base, output, overwrite, health_problems(lora.components), scale)
    with as_folder(base, base_config, output.absolute().parent) as folder:
        report = fuse_into(lora, source, folder, output, scale=scale, dtype=dtype, variant=variant)
    return replace(report, base=base)


def fuse_into(
    lora: LoraFile,
    source: str | Path,
    base: str,
    output: Path,
    *,
    scale: float,
    dtype: torch.dtype | None,
    variant: str | None,
) -> FuseReport:
    """`fuse` for a base in diffusers' layout, once both were checked."""
    models = fitting_models(lora.components, base)
    if tied := tied_weights(lora.components, models):
        raise ValueError(f"{source} cannot be merged into {base}: {tied_problem(tied)}")
    folder = snapshot(base, variant)
    files = weight_files(folder, variant)
    free = shutil.disk_usage(next(place for place in output.absolute().parents if place.exists())).free
    if (size := size_of(files.values())) > free:
        raise ValueError(f"{output} needs {size / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free there")
    fusion = Fusion(lora.components, models, files, scale, dtype)
    fresh = partial_name(output)
    try:
        copy_others(folder, fresh, dtype)
        for name in components_in(folder):
            copy_others(folder / name, fresh / name, dtype)
        stops = take_generation(Path(source), fresh) if MODEL in files else None
        taught = TaughtTokens(Path(source), fresh)
        for component, weights in progress(list(files.items()), "fusing"):
            change = taught.change(component, fusion.change(component))
            place = fresh if component == MODEL else fresh / component
            rewritten(weights, place, change, dtype)
            if unlike := differences(weights, place, change, dtype):
                what = f"{len(unlike)} tensors of {component} were not written as computed"
                raise CheckFailed(f"{what}: {listing(unlike)}")
        replace_folder(fresh, output)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    copies = {c: component_weights(output if c == MODEL else output / c, None) for c in files}
    return FuseReport(
        output,
        base,
        modules=len(fusion.stored),
        scale=scale,
        dtype=", ".join(sorted(set(fusion.stored.values()))),
        rounding=max(fusion.rounding.values()),
        untouched=sum(1 for weights in files.values() for _ in weights.tensors()) - len(fusion.stored) - taught.tables,
        precisions=precisions(copies),
        is_cast=dtype is not None,
        stops=stops,
        tokens=str(taught),
    )


class Fusion:
    """Knows which tensors of which files a LoRA changes, and computes their new values.

    Raises:
        ValueError: a module's weight is not in the files under a name that is known, or is quantised.
    """

    def __init__(
        self,
        components: Components,
        models: Models,
        files: Mapping[str, WeightFiles],
        scale: float,
        dtype: torch.dtype | None,
    ) -> None:
        self.scale, self.dtype = scale, dtype
        self.factors: dict[tuple[str, str], tuple[str, LoraFactors, bool]] = {}
        self.rounding: dict[tuple[str, str], float] = {}
        self.stored: dict[tuple[str, str], str] = {}
        missing = []
        for component, modules in components.items():
            names = {name for _, name in files[component].tensors()}
            layers = dict(models[component].named_modules())
            prefix = getattr(models[component], "base_model_prefix", "")
            for path, factors in modules.items():
                bare = (path, flat_path(path), path.removeprefix(f"{prefix}."), f"{prefix}.{path}")
                name = next((f"{place}.weight" for place in bare if f"{place}.weight" in names), None)
                if name is None:
                    missing.append(f"{component}.{path}")
                else:
                    transposed = is_transposed(base_layer(layers, path))
                    self.factors[component, name] = (path, factors, transposed)
        if missing:
            raise ValueError(f"the base's files have no weight of that name for {listing(missing)}")

    def change(self, component: str) -> Change:
        """The change of one component's tensors, for `rewriting`."""

        def changed(name: str, weight: Tensor) -> Tensor:
            key = component, name
            if key not in self.factors:
                return weight
            path, factors, transposed = self.factors[key]
            if not weight.is_floating_point() or weight.dtype.itemsize == 1:
                kind = f"{weight.dtype}, which is no precision to add in"
                raise ValueError(f"{component}.{path} of the base is stored as {kind}; merge into the original weights")
            delta = self.scale * dense(factors, weight, transposed)
            exact = weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta
            fused = exact.to(self.dtype or weight.dtype)
            if not fused.isfinite().all():
                raise CheckFailed(
                    f"{component}.{path} overflows {fused.dtype} with the LoRA in it; nothing was written"
                )
            size = delta.norm().item()
            self.rounding[key] = ((fused.to(exact.dtype) - exact).norm() / size).item() if size else 0.0
            self.stored[key] = str(fused.dtype).removeprefix("torch.")
            return fused

        return changed


def snapshot(name: str, variant: str | None, revision: str | None = None) -> Path:
    """The folder of a base, downloaded if it is on the hub."""
    if Path(name).is_dir():
        return Path(name)
    if pipeline_index(name) is not None:
        return Path(DiffusionPipeline.download(name, variant=variant))
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]
    doubled = ["*/*", "consolidated*"]  # the same weights in another form
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=doubled))


def weight_files(folder: Path, variant: str | None) -> dict[str, WeightFiles]:
    """The weights of every model of a base, by component.

    Raises:
        ValueError: one has none that can be used, with what there is.
    """
    places = [folder / name for name in components_in(folder)]
    if not places:
        refuse_quantised(folder)
        return {MODEL: component_weights(folder, variant)}
    problems, found = [], {}
    for path in (place for place in places if (place / "config.json").is_file()):
        try:
            refuse_quantised(path)
            found[path.name] = component_weights(path, variant)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return found


def refuse_quantised(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        return
    with reading(config):
        quantised = parse_json(config.read_text(encoding="utf-8")).get(QUANTISED)
    if quantised:
        raise ValueError(f"{folder} is quantised ({QUANTISED} in its config.json); merge into the original weights")


def components_in(folder: Path) -> list[str]:
    """The components of a pipeline's folder; none of another folder."""
    if not (folder / DiffusionPipeline.config_name).is_file():
        return []
    stated = pipeline_index(str(folder)) or {}
    named = [name for name, kind in stated.items() if isinstance(kind, list | tuple) and kind[0] is not None]
    return sorted(name for name in named if (folder / name).is_dir())


def filled(models: Models, components: Components, base: str, variant: str | None = None) -> Models:
    """Hollow models of a base, with the weights of the adapted modules as they are in its files."""
    files = weight_files(snapshot(base, variant), variant)
    found = Fusion(components, models, files, 1.0, None).factors
    for component in components:
        layers = dict(models[component].named_modules())
        for file, name in files[component].tensors():
            if (component, name) in found:
                layer = base_layer(layers, found[component, name][0])
                assert layer is not None, "`fitting_models` has found it"
                with open_safetensors(file) as tensors:
                    layer.weight = nn.Parameter(tensors.get_tensor(name), requires_grad=False)
    return models


def dense(factors: LoraFactors, weight: Tensor, transposed: bool) -> Tensor:
    """Float32 delta_weight in the shape of a layer's weight."""
    shape = weight.shape
    if isinstance(factors, ProductFactors):
        delta = factors.update().float()
        return delta.T if transposed else delta.reshape(shape)
    if factors.magnitude is not None:
        exact = (weight.T if transposed else weight).double()
        delta = (decomposed_weight(exact, factors) - exact).float()
        return delta.T if transposed else delta
    A, B = matrices(factors)
    delta = (B @ A).float()
    return delta.T if transposed else delta.reshape(shape)


def tied_weights(components: Components, models: Models) -> list[str]:
    """Modules whose weight is also another's, by component."""
    return [f"{name}.{path}" for name, modules in components.items() for path in tied_paths(models[name], modules)]


def tied_paths(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the modules whose weight is also another's, such as an output layer's that is the embedding: a merge
    would change both."""
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    names = {*pairs, *pairs.values()}
    return [path for path in paths if {f"{path}.weight", f"{flat_path(path)}.weight"} & names]


def tied_problem(tied: list[str]) -> str:
    """The one message about them."""
    return (
        f"{listing(tied)} share their weight with other layers, which a merge would change too; use the LoRA unmerged, "
        "or untie the base first (tie_word_embeddings=False, and a copy of the embedding as output layer)"
    )
