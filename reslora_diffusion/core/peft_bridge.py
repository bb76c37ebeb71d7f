"""All of PEFT that is not its public interface, in one place; written for PEFT 0.21.

    PEFT_TYPE_TO_{CONFIG,TUNER,PREFIX}_MAPPING   where a method is looked up by the name in `adapter_config.json`
    LoraModel.inject_adapter                     what `get_peft_model` and every `add_adapter` come to
    LoraModel._get_adapter_state_dict, _remap_adapter_state_dict_for_load   what is saved of an adapter
    LoraLayer.lora_variant, LoraVariant          what a LoRA layer calls instead of `lora_B(lora_A(x))`
    LoraLayer._cast_input_dtype                  casts x to the adapter's precision, at full width

A process without this package does not know the type RESLORA and says so, rather than load the adapter as plain LoRA.
"""

import copy
import difflib
import logging
import warnings
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import LoraVariant, MultiheadAttention
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from ..problems import listing
from ..rules import UNMERGED_KEY
from .chains import Site, runs_twice
from .config import PeftType, ResLoraConfig, Shortcut
from .controller import Controller, Unjoined
from .functional import delta_weight
from .sharding import placed_like

LOGGER = logging.getLogger(__name__)
WITHOUT_VARIANTS = ("aqlm", "awq", "eetq", "inc", "te", "tp_layer")  # layers of PEFT that never ask for one
CALIBRATION_KEY = "lora_A_calibration"  # beside `lora_A.weight`: what merging adds to A, and to what
UNMERGED = (
    "the factors of adapter {adapter!r} ({model}) are those of an unmerged ResLoRA, shortcut {shortcut!r}, and no "
    "plain LoRA: diffusers' load_lora_weights refuses a file of them. For a LoRA file use "
    "reslora_diffusion.merged_state_dict(model) in the place of get_peft_model_state_dict(model), or "
    "reslora_diffusion.export_pipeline(pipe, folder); to train on, save them as they are"
)


class ResLoraVariant(LoraVariant):
    """What one adapted layer computes; everything it needs to know of others is in the controller."""

    def __init__(self, controller: Controller, name: str) -> None:
        self.controller = controller
        self.name = name
        self.merged_delta: Tensor | None = None

    @property
    def site(self) -> Site:
        """The layer's place in the chains as they are now."""
        return self.controller.sites[self.name]

    def supports_lora_conversion(self) -> bool:
        return False  # B A alone is not what was trained; `export` writes the plain LoRA that is

    def init(self, module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Nothing: the layer's factors are PEFT's own."""

    def forward(  # type: ignore[override]
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        return self.controller.forward(self.site, module, x, result)

    def delta(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """What merging adds to `orig_weight`, in its precision, orientation and placement."""
        from .merging import merged_factors_of

        factors = merged_factors_of(self.controller, self.site)
        factors = factors._replace(scaling=module.scaling[active_adapter])
        delta = delta_weight(factors).to(torch.promote_types(factors.lora_A.dtype, orig_weight.dtype))
        delta = delta.T if getattr(module, "fan_in_fan_out", False) else delta
        return placed_like(delta.to(orig_weight.dtype), orig_weight)

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        self.merged_delta = self.delta(module, active_adapter, orig_weight)
        return orig_weight + self.merged_delta

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """In place, as FSDP goes on gathering the storage that it knows."""
        self.merged_delta = self.delta(module, active_adapter, orig_weight)
        orig_weight.data.add_(self.merged_delta)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Inverse of `merge_unsafe`: takes away what was added, whatever the factors are by now."""
        assert self.merged_delta is not None
        delta, self.merged_delta = self.merged_delta, None
        return orig_weight.data.sub_(delta.to(orig_weight.device))


class KeepInputDtype:
    """In place of `LoraLayer._cast_input_dtype`: our layers cast the small factors to x, not x to the factors."""

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        active = [name for name in self.layer.active_adapters if name in self.layer.lora_A]
        if all(isinstance(self.layer.lora_variant.get(name), ResLoraVariant) for name in active):
            return x
        return type(self.layer)._cast_input_dtype(self.layer, x, dtype)


class FastForward:
    """In place of a layer's `forward`: the fused form where that is possible (`core.fast_forward`), or PEFT's own."""

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.layer
        if not (torch.compiler.is_compiling() or args or kwargs):
            active = layer.active_adapters
            variant = layer.lora_variant.get(active[0]) if len(active) == 1 else None
            if isinstance(variant, ResLoraVariant):
                output = variant.controller.fusion.forward(variant.controller, variant.site, x)
                if output is not None:
                    return output
        return type(layer).forward(layer, x, *args, **kwargs)


class ResLoraModel(LoraModel):
    """PEFT's LoRA model whose layers compute with shortcuts."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        if kwargs.get("state_dict") is None:
            refuse_unmatched_targets(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        install(model, adapter_name, self.peft_config)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Refuse what PEFT refuses for LoRA: Mamba's kernels read some weights past their layers."""
        as_lora = copy.copy(peft_config)
        as_lora.peft_type = "LORA"
        super()._check_target_module_compatiblity(as_lora, model, target_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        from .merging import corrections_of

        for name in adapter_names or self.active_adapters:
            if (controller := find_controller(self.model, name)) is not None:
                corrections_of(controller)  # raises, if it does, before the first layer is changed
        super().merge_adapter(adapter_names, safe_merge)

    def add_weighted_adapter(  # type: ignore[override]
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        **options: Any,
    ) -> None:
        """As PEFT's, where one adapter of this method can be what is asked for.

        Raises:
            ValueError: the adapters are joined differently, or the combination does not keep what the shortcut needs.
        """
        refuse_combination(self.model, adapters, combination_type)
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **options)

    def delete_adapter(self, adapter_name: str) -> None:
        controller = find_controller(self.model, adapter_name)
        super().delete_adapter(adapter_name)
        if controller is not None:
            controller.remove_hooks()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        controllers = [find_controller(self.model, name) for name in self.peft_config]
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[func-returns-value]
        for controller in filter(None, controllers):
            controller.remove_hooks()
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict, unwanted_adapter_names: list[str]
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        controller = find_controller(model, adapter_name)
        if controller is None:
            return tensors
        names = {id(module): name for name, module in model.named_modules()}
        for name, correction in controller.calibration.items():
            tensors[f"{names[id(controller.layers[name])]}.{CALIBRATION_KEY}"] = correction.contiguous()
        if not controller.is_plain:
            name, layer = next(iter(controller.layers.items()))
            tensors[names[id(layer)].removesuffix(name) + UNMERGED_KEY] = torch.ones(1)
            if not isinstance(model, PeftModel):  # whose files have the type RESLORA beside them
                shortcut, kind = str(controller.shortcut), type(model).__name__
                message = UNMERGED.format(adapter=adapter_name, model=kind, shortcut=shortcut)
                warnings.warn(message, stacklevel=3)
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        stored = {k: v for k, v in state_dict.items() if k.endswith(f".{CALIBRATION_KEY}")}
        rest = {k: v for k, v in state_dict.items() if k not in stored and not is_mark(k)}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
        controller = find_controller(model, adapter_name)
        if controller is not None and stored:
            names = {name: site for site in controller.layers for name in (site, f"base_model.model.{site}")}
            for key, correction in stored.items():
                name = names.get(key.removesuffix(f".{CALIBRATION_KEY}"))
                if name is not None:
                    controller.calibration[name] = correction
        return remapped


def is_mark(key: str) -> bool:
    """Whether a name among an adapter's tensors says that they are no plain LoRA."""
    return key.rpartition(".")[2] == UNMERGED_KEY


def refuse_unmatched_targets(model: nn.Module, config: LoraConfig) -> None:
    """Raise `ValueError` if no module is meant by `target_modules`, naming those that come close."""
    targets = config.target_modules
    if not targets or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    if any(check_target_module_exists(config, name) for name in names) or config.target_parameters:
        return
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", module), nn.Linear) and ".lora_" not in name
    }
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    near = {name for target in wanted for name in difflib.get_close_matches(target, linear, n=3)}
    offered = f"the nearest are {', '.join(sorted(near))}" if near else f"it has {', '.join(sorted(linear)[:12])}"
    raise ValueError(
        f"Target modules {targets} not found in the base model ({type(model).__name__}): no module has such a name; "
        f"{offered}. Please check the target modules and try again."
    )


def install(model: nn.Module, adapter_name: str, configs: dict[str, Any]) -> None:
    """Give every linear layer of a freshly injected adapter its variant, and the adapter its controller.

    Args:
        configs: `peft_config` of the model.

    Convolutions, embeddings, `nn.MultiheadAttention` and `target_parameters` (fused experts) stay PEFT's plain LoRA; an
    adapter of nothing else has no controller.
    """
    config: ResLoraConfig = configs[adapter_name]
    layers: dict[str, LoraLayer] = {}
    names: dict[int, list[str]] = {}
    silent = []
    unjoined: dict[str, Unjoined] = {}
    by_merging: list[str] = []  # torch's own attention computes from merged weights, its output projection included
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, MultiheadAttention):
            by_merging.append(f"{name}.")
        if not isinstance(layer, LoraLayer) or adapter_name not in {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        if other := beside_chains(layer, adapter_name, f"{name}.".startswith(tuple(by_merging))):
            unjoined[name] = other
            continue
        if type(layer).__module__.rpartition(".")[2] in WITHOUT_VARIANTS:
            silent.append(f"{name} ({type(layer).__name__})")
        names.setdefault(id(layer), []).append(name)
        layers.setdefault(names[id(layer)][0], layer)
    if silent and config.effective_shortcut is not Shortcut.NONE:
        raise ValueError(
            f"{len(silent)} layers are of kinds that cannot carry a shortcut, such as {', '.join(silent[:3])}; "
            "use LoraConfig, or a base quantised by bitsandbytes, GPTQ, HQQ or torchao"
        )
    if not layers:
        if config.effective_shortcut is not Shortcut.NONE:
            LOGGER.warning("no linear layer is adapted, so no shortcut joins anything: this is plain LoRA")
        return
    unlinked = {known[0]: f"also known as {known[1]}" for known in names.values() if len(known) > 1}
    if config.effective_shortcut in (Shortcut.INPUT, Shortcut.MIDDLE):
        unlinked |= {name: "runs more than once in a forward" for name in layers if runs_twice(model, name)}
    controller = Controller(model, adapter_name, configs, layers, unlinked, unjoined)
    say_what_is_alone(controller)
    for name, layer in layers.items():
        layer.lora_variant[adapter_name] = ResLoraVariant(controller, name)
        layer._cast_input_dtype = KeepInputDtype(layer)  # type: ignore[method-assign, assignment]
        if type(layer).__name__ == "Linear":
            layer.forward = FastForward(layer)  # type: ignore[attr-defined]


def refuse_combination(model: nn.Module, adapters: list[str], combination_type: str) -> None:
    """Raise `ValueError` if adapters cannot be combined into one of the same shortcut.

    Side by side (`cat`) they can, where their links are the same. By SVD of each layer's own B A they cannot for
    `middle`, whose B_n A_{n-1} x needs the factors of neighbours in one basis.
    """
    controllers = {name: find_controller(model, name) for name in adapters}
    ours = {name: one for name, one in controllers.items() if one is not None and not one.is_plain}
    ways = [(one.shortcut, one.config.num_previous, one.joined) for one in ours.values()]
    problems = []
    if ours and (len(ours) < len(controllers) or any(way != ways[0] for way in ways)):
        kinds = ", ".join(f"{name!r} by {str(ours[name].shortcut) if name in ours else 'none'}" for name in controllers)
        problems.append(f"the layers of the adapters are joined differently ({kinds}), and one adapter has one way")
    elif len(ours) > 1 and ways[0][0] is Shortcut.MIDDLE:
        if combination_type.endswith("svd"):
            problems.append(
                f"combination_type {combination_type!r} takes each layer's B A apart anew, and shortcut 'middle' "
                "multiplies factors of several layers; wanted 'cat' or 'linear'"
            )
        elif any(not one.scales_chains_evenly() for one in ours.values()):
            problems.append("shortcut 'middle' multiplies factors of several layers, whose scalings differ here")
    if problems:
        raise ValueError(
            "add_weighted_adapter: " + "; ".join(problems) + ". Or combine the plain LoRAs that they merge into "
            "(merged_factors, reslora_diffusion.export.combine)"
        )


def say_what_is_alone(controller: Controller) -> None:
    """Log which layers the shortcut joins to no other; as a warning where that is all of a role."""
    found = controller.explain()
    if not (kinds := found.joined_to_nothing) or found.shortcut is Shortcut.NONE:
        return
    joined = {chain.role for chain in found.chains if len(chain.sites) > 1}
    expected = not found.unjoined and {site.role for site in found.alone} <= joined
    what = listing([f"{count} x {kind}" for kind, count in kinds.items()])
    LOGGER.log(
        logging.INFO if expected else logging.WARNING,
        f"shortcut {str(found.shortcut)!r} joins {sum(kinds.values())} of {found.sites + len(found.unjoined)} adapted "
        f"layers to no other; they compute plain LoRA: {what}",
    )


def beside_chains(layer: Any, adapter_name: str, by_merging: bool) -> Unjoined | None:
    """What an adapted layer is that no shortcut can join; None for a linear layer."""
    if adapter_name in layer.lora_embedding_A:
        return Unjoined(layer, "embedding", has_factors=False)
    if isinstance(layer, ParamWrapper):
        return Unjoined(layer, f"parameter {layer.parameter_name!r} (target_parameters)", has_factors=False)
    if by_merging:
        return Unjoined(layer, "torch.nn.MultiheadAttention", has_factors=True)
    if not isinstance(layer.lora_A[adapter_name], nn.Linear):
        return Unjoined(layer, type(layer.get_base_layer()).__name__, has_factors=True)
    return None


def find_controller(model: nn.Module, adapter_name: str) -> Controller | None:
    for module in model.modules():
        variant = getattr(module, "lora_variant", {}).get(adapter_name)
        if isinstance(variant, ResLoraVariant):
            variant.controller.refresh()
            return variant.controller
    return None


def register() -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained` and every `add_adapter` know `ResLoraConfig`."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RESLORA] = ResLoraConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RESLORA] = ResLoraModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RESLORA] = LoraModel.prefix  # type: ignore[index]
