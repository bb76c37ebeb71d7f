"""Putting a ResLoRA adapter on a model, finding it again, and taking it off.

`attach` is PEFT's `inject_adapter_in_model` for any torch model with linear layers; `get_peft_model(model, config)` and
the `add_adapter` of diffusers and transformers do the same on the models that they know. `detach` is its inverse.
"""

from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from .chains import Explanation
from .config import ResLoraConfig
from .controller import Controller
from .peft_bridge import find_controller

DEFAULT_ADAPTER = "default"


def attach(model: nn.Module, config: ResLoraConfig, adapter_name: str = DEFAULT_ADAPTER) -> Controller:
    """Freeze `model` and put a trainable adapter on it, in place.

    >>> attach(unet, ResLoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], shortcut="block"))

    Raises:
        ValueError: the configuration does not fit the model, or the name is taken.
    """
    if find_controller(model, adapter_name) is not None:
        raise ValueError(f"adapter {adapter_name!r} is on this model already; wanted another name, or detach it first")
    inject_adapter_in_model(config, model, adapter_name)
    return get_controller(model, adapter_name)


def detach(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Take the adapter off; PEFT's layers go with the last one. The base stays frozen.

    Raises:
        ValueError: there is no such adapter.
    """
    controller = get_controller(model, adapter_name)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A):
            layer.delete_adapter(adapter_name)
            if not layer.lora_A and not layer.lora_embedding_A:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    controller.remove_hooks()
    own = model.__dict__
    own.get("peft_config", {}).pop(adapter_name, None)
    if own.get("peft_config") == {}:
        del own["peft_config"]
        if "_hf_peft_config_loaded" in own:
            own["_hf_peft_config_loaded"] = False


def get_controller(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> Controller:
    """The controller of an adapter of `model`, or of any module around it.

    Raises:
        ValueError: there is no such ResLoRA adapter.
    """
    controller = find_controller(model, adapter_name)
    if controller is None:
        raise ValueError(f"{type(model).__name__} has no ResLoRA adapter {adapter_name!r}; see attach")
    return controller


def explain(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> Explanation:
    """Which layers of an adapted model are joined: `print` it, or take `.to_dict()`."""
    return get_controller(model, adapter_name).explain()
