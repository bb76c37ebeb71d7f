"""ResLoRA as a method of PEFT: injection, merging, deletion, and what is saved of an adapter.

This module is imported as soon as `peft` is, which any module of the core may be the first to import. It may therefore
import none of them but `config`: the methods below import what they need when they are called.
"""

import copy
import warnings
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, LoraModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn

from ...rules import UNMERGED_KEY
from ...utils.names import adapter_name_problem
from ..config import PeftType, ResLoraConfig

UNMERGED = (
    "the factors of adapter {adapter!r} ({model}) are those of an unmerged ResLoRA, shortcut {shortcut!r}, and no "
    "plain LoRA: diffusers' load_lora_weights refuses a file of them. For a LoRA file use "
    "reslora_diffusion.merged_state_dict(model) in the place of get_peft_model_state_dict(model), or "
    "reslora_diffusion.export_pipeline(pipe, folder); to train on, save them as they are"
)


class ResLoraModel(LoraModel):
    """PEFT's LoRA model whose layers compute with shortcuts."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        from .install import install
        from .refusals import naming_near_targets

        config: Any = self.peft_config[adapter_name]
        if problem := adapter_name_problem(adapter_name):
            raise ValueError(problem)
        with naming_near_targets(model, config):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        install(model, adapter_name, self.peft_config)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Refuse what PEFT refuses for LoRA: Mamba's kernels read some weights past their layers."""
        as_lora = copy.copy(peft_config)
        as_lora.peft_type = "LORA"
        super()._check_target_module_compatiblity(as_lora, model, target_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        from ..merging.corrections import corrections_of
        from .refusals import refuse_shared_weights
        from .variant import find_adapter

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
        from .refusals import refuse_combination

        refuse_combination(self.model, adapters, combination_type)
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **options)

    def delete_adapter(self, adapter_name: str) -> None:
        from .variant import find_adapter

        adapter = find_adapter(self.model, adapter_name)
        super().delete_adapter(adapter_name)
        if adapter is not None:
            adapter.remove_hooks()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        from .refusals import refuse_shared_weights
        from .variant import find_adapter

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
        from ..arrivals import CALIBRATION, FROZEN
        from .variant import find_adapter

        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        adapter = find_adapter(model, adapter_name)
        if adapter is None:
            return tensors
        config.calibrated = bool(adapter.calibration)
        config.frozen_links = max(map(len, adapter.frozen.values()), default=0)
        names = {id(module): name for name, module in model.named_modules()}
        for name, correction in adapter.calibration.items():
            tensors[f"{names[id(adapter.layers[name])]}.{CALIBRATION}"] = correction.contiguous()
        for name, links in adapter.frozen.items():
            for link, pair in enumerate(links):
                for side, factor in zip("AB", pair, strict=True):
                    tensors[f"{names[id(adapter.layers[name])]}.{FROZEN[side]}.{link}"] = factor.contiguous()
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
        from ..arrivals import make_places_for
        from .variant import find_adapter

        if (adapter := find_adapter(model, adapter_name)) is not None:
            make_places_for(adapter, state_dict)
        rest = {key: tensor for key, tensor in state_dict.items() if not is_mark(key)}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)


def is_mark(key: str) -> bool:
    """Return whether a name among an adapter's tensors says that they are no plain LoRA."""
    return key.rpartition(".")[2] == UNMERGED_KEY


# `get_peft_model`, `PeftModel.from_pretrained` and every `add_adapter` look here.
PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RESLORA] = ResLoraConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RESLORA] = ResLoraModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RESLORA] = LoraModel.prefix  # type: ignore[index]
