"""Putting a ResLoRA adapter on a model, finding it again, and taking it off.

`attach` is PEFT's `inject_adapter_in_model` for any torch model with linear layers; `get_peft_model(model, config)` and
the `add_adapter` of diffusers and transformers do the same on the models that they know. `detach` is its inverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..rules import DEFAULT_ADAPTER
from .adapter import Adapter
from .config import ResLoraConfig
from .explanations import Explanation, KernelReport
from .peft.variant import find_adapter


@dataclass(frozen=True)
class AdaptedModel:
    """A model and the name of an adapter on it, which `attach` returns; other functions take the two apart."""

    model: nn.Module
    adapter_name: str = DEFAULT_ADAPTER

    @property
    def adapter(self) -> Adapter:
        return get_adapter(self.model, self.adapter_name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters of the model, for an optimizer."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def explain(self) -> Explanation:
        return explain(self.model, self.adapter_name)

    def explain_kernels(self) -> KernelReport:
        return explain_kernels(self.model, self.adapter_name)

    def detach(self) -> None:
        detach(self.model, self.adapter_name)

    def __str__(self) -> str:
        return f"{type(self.model).__name__}, adapter {self.adapter_name!r}: {str(self.explain()).splitlines()[0]}"


def attach(model: nn.Module, config: ResLoraConfig, adapter_name: str = DEFAULT_ADAPTER) -> AdaptedModel:
    """Freeze `model` and put a trainable adapter on it, in place.

    >>> adapted = attach(unet, ResLoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    >>> optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-4)

    Raises:
        ValueError: the configuration does not fit the model, or the name is taken.
    """
    if find_adapter(model, adapter_name) is not None:
        raise ValueError(f"adapter {adapter_name!r} is on this model already; wanted another name, or detach it first")
    inject_adapter_in_model(config, model, adapter_name)
    return AdaptedModel(model, adapter_name)


def detach(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Take the adapter off; PEFT's layers go with the last one. The base stays frozen.

    Raises:
        ValueError: there is no such adapter.
    """
    adapter = get_adapter(model, adapter_name)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A):
            layer.delete_adapter(adapter_name)
            if not layer.lora_A and not layer.lora_embedding_A:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    adapter.remove_hooks()
    own = model.__dict__
    own.get("peft_config", {}).pop(adapter_name, None)
    if own.get("peft_config") == {}:
        del own["peft_config"]
        if "_hf_peft_config_loaded" in own:
            own["_hf_peft_config_loaded"] = False


def get_adapter(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> Adapter:
    """The `Adapter` of `model`, or of any module around it.

    Raises:
        ValueError: there is no such ResLoRA adapter.
    """
    adapter = find_adapter(model, adapter_name)
    if adapter is None:
        raise ValueError(f"{type(model).__name__} has no ResLoRA adapter {adapter_name!r}; see attach")
    return adapter


get_controller = get_adapter  # its name in version 0.1


def explain(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> Explanation:
    """Report which layers of an adapted model are joined: `print` the report, or take its `.to_dict()`."""
    return get_adapter(model, adapter_name).explain()


def explain_kernels(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> KernelReport:
    """Report which kernel computed each layer in the last forward, and why: `print` it, or take its `.layers`."""
    return get_adapter(model, adapter_name).explain_kernels()
