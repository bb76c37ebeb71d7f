"""One call that makes training a diffusion model with adapters faster or smaller and leaves the numbers alone.

    attention processors   projections that read one tensor share a down-projection (`attn_processor`): fewer launches
    memory saving          frozen layers keep less for backward (`frozen`): about a quarter less memory

On a GPU both save launches and bytes, by count (docs/performance.md). On a CPU the first costs more than it saves, and
the second costs time, so there nothing is changed unless it is asked for.
"""

from torch import nn

from ...rules import DEFAULT_ADAPTER
from .attn_processor import set_attn_processors, unset_attn_processors
from .memory import restore_memory, save_memory

# Hooks of diffusers that change a layer's weights after its forward pass, and what a backward pass then finds.
MOVED = {
    "group_offloading": "enable_group_offload takes weights away before backward, whose gradients are not finite",
    "layerwise_casting": "enable_layerwise_casting leaves fp8 weights to backward, which cannot multiply by them",
}


def optimize_for_training(
    model: nn.Module,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    attention: bool | None = None,
    memory: bool | None = None,
) -> dict[str, int]:
    """Switch both on where they pay.

    >>> unet.add_adapter(ResLoraConfig(...))
    >>> optimize_for_training(unet.to("cuda"))

    Args:
        model: a denoiser of diffusers, on the device that it will be trained on.
        attention, memory: True or False decides; by default, whether the model is on a GPU does.

    Returns:
        The number of attentions and of frozen layers that compute in another form than before.

    Raises:
        ValueError: the model has no ResLoRA adapter of that name, or diffusers moves or casts its weights by layer.
    """
    refuse_moved_weights(model)
    on_gpu = next(model.parameters()).device.type == "cuda"
    return {
        "attention": len(set_attn_processors(model, adapter_name)) if choose(attention, on_gpu) else 0,
        "memory": save_memory(model) if choose(memory, on_gpu) else 0,
    }


def refuse_moved_weights(model: nn.Module) -> None:
    """Raise `ValueError` where weights come and go with the forward pass of their layer (diffusers' `hooks`): backward
    needs them once more, when they are gone."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook, fault in MOVED.items():
            if registry is not None and registry.get_hook(hook) is not None:
                raise ValueError(f"{fault}; see --quantization and gradient checkpointing")


def restore_after_training(model: nn.Module) -> None:
    """Inverse of `optimize_for_training`."""
    unset_attn_processors(model)
    restore_memory(model)


def choose(wanted: bool | None, on_gpu: bool) -> bool:
    return on_gpu if wanted is None else wanted
