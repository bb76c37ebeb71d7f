"""Hollow models: real architectures without memory, into which `loaders` load a LoRA.

A loader looks at a model's class, its configuration, and the names and shapes of its modules, never at the values of
its weights. So a proof needs none of the base's gigabytes: every parameter is one zero, expanded to its shape.

    like(model)                  the same architecture, hollow
    base_models(name, wanted)    of a pipeline or language model on disk or on the hub, from its configurations alone
    placeholders(components)     where no base is at hand: models with the adapted modules and nothing else
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PretrainedConfig

from reslora_diffusion.core.functional import LoraFactors

from ..utils.problems import listing, printable
from .base import check_base_name, misfits, unfit
from .factors import Components
from .keys import CLIP_COMPONENTS, DENOISERS, LAYERS_PER_BLOCK, projects

Models = dict[str, nn.Module]
MOST_LAYERS = 100  # of a CLIP text encoder; the largest one has 32
CLIP_MODULE = re.compile(r"text_model\.encoder\.layers\.(\d{1,9})\.(self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")


# -------------------------------------------------------------------------------------------------- hollow models


def hollow(model: nn.Module) -> nn.Module:
    """Replace every tensor by a zero of no size to speak of, expanded to its shape; in place. Biases are small, and
    loaders write into them: they have memory of their own."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=torch.float32, device="cpu").expand(parameter.shape)
                value = zero.clone() if name == "bias" else zero
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
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


# ------------------------------------------------------------------------------------------------------ placeholders


class PlaceholderDenoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The adapted modules of a UNet or transformer, at their places, and nothing else."""

    @register_to_config
    def __init__(self, layers_per_block: int = LAYERS_PER_BLOCK):
        super().__init__()


class Place(nn.Module):
    """Holds placeholders; numbered ones are found as in a list, of which some elements may not be there."""

    def __getitem__(self, number: int) -> nn.Module:
        return cast(nn.Module, self._modules[str(number)])  # no placeholder is None


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


def clip_placeholder(component: str, modules: Mapping[str, LoraFactors], projected: bool) -> nn.Module:
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


def placeholders(components: Components) -> Models:
    """A model for each component, with the adapted modules in it."""
    models: Models = {}
    for component, modules in components.items():
        if component in CLIP_COMPONENTS:
            models[component] = clip_placeholder(component, modules, projects(component, components))
        else:
            models[component] = planted(PlaceholderDenoiser() if component in DENOISERS else nn.Module(), modules)
    return models
