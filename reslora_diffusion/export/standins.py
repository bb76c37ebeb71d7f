"""Models without memory, for the loaders of diffusers, transformers and PEFT to load a LoRA into.

A loader looks at a model's class, its configuration, and the names and shapes of its modules, never at the values of
its weights. So a proof needs none of the base's gigabytes: every parameter is one zero, expanded to its shape.

    like(model)                  the same architecture, hollow
    base_models(name, wanted)    of a pipeline or language model on disk or on the hub, from its configurations alone
    stand_ins(components)        only the modules that a LoRA adapts, where no base is at hand
    load_diffusers, load_peft    the real loaders, and what arrived in the layers afterwards
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import (
    FluxLoraLoaderMixin,
    PeftAdapterMixin,
    SD3LoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
)
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PretrainedConfig

from reslora_diffusion.core.functional import LoraFactors

from ..utils.problems import listing, printable
from .base import check_base_name, misfits, unfit
from .factors import Components, computable
from .keys import CLIP_COMPONENTS, DENOISERS, LAYERS_PER_BLOCK, Naming, classic_path, projects

Models = dict[str, nn.Module]
ADAPTER = "proof"
MOST_LAYERS = 100  # of a CLIP text encoder; the largest one has 32
CLIP_MODULE = re.compile(r"text_model\.encoder\.layers\.(\d{1,9})\.(self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")


# -------------------------------------------------------------------------------------------------- hollow models


def hollow(model: nn.Module) -> nn.Module:
    """Replace every tensor by a zero of no size to speak of, expanded to its shape; in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=torch.float32, device="cpu").expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zero, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype, device="cpu").expand(buffer.shape)
    return model


def like(model: nn.Module) -> nn.Module:
    """A hollow model of the same class and configuration, without adapters."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    with torch.device("meta"):
        if isinstance(model, ModelMixin):
            return hollow(type(model).from_config(model.config))
        return hollow(type(model)(model.config))


def base_models(name: str, wanted: Iterable[str]) -> Models:
    """Hollow components of a base model, from its configurations.

    Args:
        name: a folder, or a name on the hub.
        wanted: components to make; "model" is a language model.

    Raises:
        ValueError: there is no such model, or it has no such component.
    """
    index = pipeline_index(name)
    if index is None:
        config = transformers_config(name)
        cls = model_class(name, "transformers", (config.architectures or [""])[0])
        with torch.device("meta"):
            return {"model": hollow(cls(config))}
    models = {}
    for component in wanted:
        library, kind = index.get(component) or (None, None)
        if library is None or kind is None:
            continue  # said by `base_problems`, with what the LoRA is for
        cls = model_class(name, library, kind)
        if library == "diffusers":
            config = cls.load_config(name, subfolder=component)
            with torch.device("meta"):
                models[component] = hollow(cls.from_config(config))
        else:
            config = AutoConfig.from_pretrained(name, subfolder=component)
            with torch.device("meta"):
                models[component] = hollow(cls(config))
    return models


def fitting_models(components: Components, name: str) -> Models:
    """The hollow models of a base that a LoRA is for.

    Raises:
        ValueError: there is no such base, or the LoRA is for another; with what it is for.
    """
    problems = check_base_name(name)
    models = {} if problems else base_models(name, components)
    problems += misfits(components, models, name) if not problems else []
    if problems:
        raise unfit(name, problems)
    return models


def pipeline_index(name: str) -> dict | None:
    """`model_index.json` of a diffusers pipeline; None if `name` is none."""
    if Path(name).is_dir() and not (Path(name) / DiffusionPipeline.config_name).is_file():
        return None
    try:
        return DiffusionPipeline.load_config(name)
    except OSError:
        return None


def model_class(name: str, library: str, kind: str) -> type[Any]:
    """The class that a configuration names, if it is a model of diffusers or transformers."""
    bases = {"diffusers": (diffusers, ModelMixin), "transformers": (transformers, transformers.PreTrainedModel)}
    module, base = bases.get(library, (None, object))
    cls = getattr(module, kind, None) if module and kind.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{name} has a {library} {kind!r}, which is no model that this version knows")
    return cls


def transformers_config(name: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "" if Path(name).is_dir() else "is no folder here and "
        raise ValueError(f"{name} {where}is neither a diffusers pipeline nor a transformers model: {reason}") from None


# ------------------------------------------------------------------------------------------------------ stand-ins


class DenoiserStandIn(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The adapted modules of a UNet or transformer, at their places, and nothing else."""

    @register_to_config
    def __init__(self, layers_per_block: int = LAYERS_PER_BLOCK):
        super().__init__()


class Place(nn.Module):
    """Holds stand-ins; numbered ones are found as in a list, of which some elements may not be there."""

    def __getitem__(self, number: int) -> nn.Module:
        return cast(nn.Module, self._modules[str(number)])  # no stand-in is None


def planted(root: nn.Module, modules: Mapping[str, LoraFactors]) -> nn.Module:
    """Put a hollow layer at every path."""
    for path, factors in modules.items():
        *parents, leaf = path.split(".")
        parent = root
        for name in parents:
            if name not in parent._modules:
                put(parent, name, Place())
            parent = parent.get_submodule(name)
        (_, width, *kernel), out = factors.lora_A.shape, factors.lora_B.shape[0]
        with torch.device("meta"):
            layer = nn.Conv2d(width, out, (kernel[0], kernel[1])) if kernel else nn.Linear(width, out)
        put(parent, leaf, hollow(layer))
    return root


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Add a module, if such a name can be one.

    Raises:
        ValueError: it cannot, as `forward` cannot.
    """
    try:
        parent.add_module(name, module)
    except KeyError as error:
        raise ValueError(f"{printable(name)} cannot be the name of a module: {error}") from None


def clip_stand_in(component: str, modules: Mapping[str, LoraFactors], projected: bool) -> nn.Module:
    """A CLIP text encoder in the installed transformers' own layout, of the widths that the factors have.

    Args:
        projected: whether it ends in a projection.

    Raises:
        ValueError: the paths are not those of a CLIP text encoder.
    """
    layers = {path: int(match[1]) for path in modules if (match := CLIP_MODULE.fullmatch(path))}
    strange = [path for path in modules if layers.get(path, MOST_LAYERS) >= MOST_LAYERS]
    if strange:
        raise ValueError(f"{component} has modules that are not of a CLIP text encoder: {listing(strange)}")
    sizes: dict[str, int] = {}
    for path, factors in modules.items():
        width, out = factors.lora_A.shape[1], factors.lora_B.shape[0]
        inner = {"fc1": ("hidden", "inner"), "fc2": ("inner", "hidden")}.get(path[-3:], ("hidden", "hidden"))
        sizes |= dict(zip(inner, (width, out), strict=True))
    hidden = sizes.get("hidden", sizes.get("inner", 1))
    config = CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=sizes.get("inner", 4 * hidden),
        num_hidden_layers=1 + max(layers.values()),
        num_attention_heads=1,
        projection_dim=1,
        vocab_size=8,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.device("meta"):
        return hollow((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def stand_ins(components: Components) -> Models:
    """A model for each component, with the adapted modules in it."""
    models: Models = {}
    for component, modules in components.items():
        if component in CLIP_COMPONENTS:
            models[component] = clip_stand_in(component, modules, projects(component, components))
        else:
            models[component] = planted(DenoiserStandIn() if component in DENOISERS else nn.Module(), modules)
    return models


# ---------------------------------------------------------------------------------------------------- the loaders


@contextmanager
def quiet() -> Iterator[None]:
    """Loaders' remarks and progress bars belong to their own users."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.set_verbosity(100)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def arrived(model: nn.Module, component: str) -> dict[str, LoraFactors]:
    """What a model's LoRA layers hold, by classic path; a layer that the loader left without values holds nothing."""
    found = {
        classic_path(component, name): LoraFactors(
            layer.lora_A[ADAPTER].get_parameter("weight").detach(),
            layer.lora_B[ADAPTER].get_parameter("weight").detach(),
            layer.scaling[ADAPTER],
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A
    }
    return {
        path: f._replace(lora_A=computable(f.lora_A), lora_B=computable(f.lora_B))
        for path, f in found.items()
        if not (f.lora_A.is_meta or f.lora_B.is_meta)
    }


def load_diffusers(path: Path, models: Models, naming: Naming) -> Components:
    """`load_lora_weights` of the pipeline that `models` are of, and what is in them afterwards.

    Raises:
        ValueError: the loader refuses the file.
    """
    denoiser = "transformer" if "transformer" in models else "unet"
    mixin: type = StableDiffusionLoraLoaderMixin if naming is Naming.SD else StableDiffusionXLLoraLoaderMixin
    if denoiser == "transformer":
        flux = naming is Naming.FLUX or hasattr(models[denoiser], "single_transformer_blocks")
        mixin = FluxLoraLoaderMixin if flux else SD3LoraLoaderMixin

    class Pipeline(DiffusionPipeline, mixin):  # type: ignore[misc, valid-type]  # a base chosen as the program runs
        def __init__(
            self,
            unet: nn.Module | None = None,
            transformer: nn.Module | None = None,
            text_encoder: nn.Module | None = None,
            text_encoder_2: nn.Module | None = None,
        ) -> None:
            super().__init__()
            self.register_modules(
                unet=unet, transformer=transformer, text_encoder=text_encoder, text_encoder_2=text_encoder_2
            )

    with quiet():
        pipeline = Pipeline(**{denoiser: DenoiserStandIn()} | models)
        try:
            pipeline.load_lora_weights(
                str(path.parent),
                weight_name=path.name,
                adapter_name=ADAPTER,
                local_files_only=True,
                use_safetensors=True,
            )
        except Exception as error:  # whatever a loader raises, it is its verdict on the file
            raise ValueError(f"diffusers {diffusers.__version__} does not load {path.name}: {error}") from error
    return {component: found for component, model in models.items() if (found := arrived(model, component))}


def load_peft(
    folder: Path, model: nn.Module, component: str, targets: list[str] | None = None, factors_alone: bool = False
) -> dict[str, LoraFactors]:
    """`PeftModel.from_pretrained`, and what is in the model afterwards.

    Args:
        folder: of PEFT.
        model: to load into; it is changed.
        component: of which pipeline part, or "model".
        targets: the modules that `target_modules` means, where PEFT shall not find out itself.
        factors_alone: leave out what was trained beside them, which a stand-in has no place for.

    Raises:
        ValueError: PEFT refuses the folder.
    """
    with quiet():
        try:
            config = PeftConfig.from_pretrained(str(folder))
            config.task_type = None  # a stand-in has no generation methods
            config.target_modules = config.target_modules if targets is None else targets
            if factors_alone:
                config.modules_to_save = config.trainable_token_indices = None
            PeftModel.from_pretrained(model, str(folder), adapter_name=ADAPTER, config=config)
        except Exception as error:
            raise ValueError(f"PEFT does not load {folder.name}: {error}") from error
    return arrived(model, component)
