"""ResLoRA as a method of PEFT: injection, merging, deletion, and what is saved of an adapter."""

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, LoraModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn

from ...rules import UNMERGED_KEY
from ...utils.names import adapter_name_problem
from ..adapter import Adapter
from ..config import PeftType, ResLoraConfig
from ..merging.corrections import corrections_of
from .install import install
from .refusals import refuse_combination, refuse_shared_weights, refuse_unmatched_targets
from .variant import find_adapter

UNMERGED = (
    "the factors of adapter {adapter!r} ({model}) are those of an unmerged ResLoRA, shortcut {shortcut!r}, and no "
    "plain LoRA: diffusers' load_lora_weights refuses a file of them. For a LoRA file use "
    "reslora_diffusion.merged_state_dict(model) in the place of get_peft_model_state_dict(model), or "
    "reslora_diffusion.export_pipeline(pipe, folder); to train on, save them as they are"
)
CALIBRATION_KEY = "lora_A_calibration"  # beside `lora_A.weight`: what merging adds to A, and to what
FROZEN = re.compile(r"(.*)\.lora_([AB])_frozen\.(\d+)")  # beside them too: finished links, by number


class ResLoraModel(LoraModel):
    """PEFT's LoRA model whose layers compute with shortcuts."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        if problem := adapter_name_problem(adapter_name):
            raise ValueError(problem)
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
        for name in adapter_names or self.active_adapters:
            if (adapter := find_adapter(self.model, name)) is not None:
                corrections_of(adapter)  # raises, if it does, before the first layer is changed
                refuse_shared_weights(self.model, [name])
        super().merge_adapter(adapter_names, safe_merge)

    def add_weighted_adapter(  # type: ignore[override]
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        **options: Any,
    ) -> None:
        """PEFT's method, where one ResLoRA adapter can be the combination that is asked for.

        Raises:
            ValueError: the adapters are joined differently, or the combination does not keep what the shortcut needs.
        """
        refuse_combination(self.model, adapters, combination_type)
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **options)

    def delete_adapter(self, adapter_name: str) -> None:
        adapter = find_adapter(self.model, adapter_name)
        super().delete_adapter(adapter_name)
        if adapter is not None:
            adapter.remove_hooks()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        adapters = [find_adapter(self.model, name) for name in self.peft_config]
        if (args[0] if args else kwargs.get("merge", True)) and any(adapters):
            refuse_shared_weights(self.model, kwargs.get("adapter_names") or self.active_adapters)
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[func-returns-value]
        for adapter in filter(None, adapters):
            adapter.remove_hooks()
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict, unwanted_adapter_names: list[str]
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        adapter = find_adapter(model, adapter_name)
        if adapter is None:
            return tensors
        config.calibrated = bool(adapter.calibration)
        config.frozen_links = max(map(len, adapter.frozen.values()), default=0)
        names = {id(module): name for name, module in model.named_modules()}
        for name, correction in adapter.calibration.items():
            tensors[f"{names[id(adapter.layers[name])]}.{CALIBRATION_KEY}"] = correction.contiguous()
        for name, links in adapter.frozen.items():
            for link, pair in enumerate(links):
                for side, factor in zip("AB", pair, strict=True):
                    tensors[f"{names[id(adapter.layers[name])]}.lora_{side}_frozen.{link}"] = factor.contiguous()
        if not adapter.is_plain:
            name, layer = next(iter(adapter.layers.items()))
            tensors[names[id(layer)].removesuffix(name) + UNMERGED_KEY] = torch.ones(1)
            if not isinstance(model, PeftModel):  # whose files have the type RESLORA beside them
                shortcut, kind = str(adapter.shortcut), type(model).__name__
                message = UNMERGED.format(adapter=adapter_name, model=kind, shortcut=shortcut)
                warnings.warn(message, stacklevel=3)
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        stored = {k: v for k, v in state_dict.items() if k.endswith(f".{CALIBRATION_KEY}")}
        frozen = {k: v for k, v in state_dict.items() if FROZEN.fullmatch(k)}
        rest = {k: v for k, v in state_dict.items() if not (k in stored or k in frozen or is_mark(k))}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
        adapter = find_adapter(model, adapter_name)
        if adapter is not None:
            names = {name: site for site in adapter.layers for name in (site, f"base_model.model.{site}")}
            put_frozen(adapter, names, frozen)
            for key, correction in stored.items():
                name = names.get(key.removesuffix(f".{CALIBRATION_KEY}"))
                if name is not None:
                    adapter.calibration[name] = correction
        return remapped


def put_frozen(adapter: Adapter, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter the frozen factors of a file, in the place of any that it has. `names`: layers by their name
    there."""
    adapter.frozen = {}
    for key in sorted(tensors, key=lambda key: int(key.rpartition(".")[2])):
        name, side, link = FROZEN.fullmatch(key).groups()  # type: ignore[union-attr]
        if side == "A" and name in names:
            site = names[name]
            device = adapter.lora_A(site).device
            pair = tensors[key], tensors[f"{name}.lora_B_frozen.{link}"]
            if device.type != "meta":
                pair = pair[0].to(device), pair[1].to(device)
            adapter.add_frozen({site: pair})


def is_mark(key: str) -> bool:
    """Whether a name among an adapter's tensors says that they are no plain LoRA."""
    return key.rpartition(".")[2] == UNMERGED_KEY


def register() -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained` and every `add_adapter` know `ResLoraConfig`."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RESLORA] = ResLoraConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RESLORA] = ResLoraModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RESLORA] = LoraModel.prefix  # type: ignore[index]
