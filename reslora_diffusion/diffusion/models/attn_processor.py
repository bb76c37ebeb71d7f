"""ResLoRA inside diffusers' attention: the projections of one attention that read the same x share one down-projection.

    self-attention     [A_q; A_k; A_v] x           one product of rank 3 r instead of three of rank r
    cross-attention    [A_k; A_v] prompt
    joint attention    [A_q; A_k; A_v] x and [A_add_q; A_add_k; A_add_v] prompt       (SD3, Flux)

`ResLoRAAttnProcessor` wraps whatever processor an attention has. It owns no weights: it computes bottlenecks ahead, the
adapted layers pick them up when the wrapped processor calls them, and a layer that is called with something else
computes its own. So swapping processors (slicing, xFormers, IP-Adapter) can lose speed, never training, and outputs and
gradients are those of the layers by themselves. What it saves is launches, so it pays on a GPU; for the same reason a
division by a `rescale_output_factor` of 1 is left out.
"""

import inspect
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from reslora_diffusion import get_adapter
from reslora_diffusion.core.adapter import Adapter
from reslora_diffusion.core.grouping import prepare, prepare_nothing
from reslora_diffusion.rules import DEFAULT_ADAPTER

OWN = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


class ResLoRAAttnProcessor:
    """Prepares the bottlenecks of one attention, then runs the processor it wraps. Made by `wrap_processor`."""

    def __init__(self, inner: Any, adapter: Adapter, name: str) -> None:
        self.inner, self.adapter, self.name = inner, adapter, name

    def prepare(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> None:
        joint = getattr(attn, "add_k_proj", None) is not None
        context = hidden_states if joint or encoder_hidden_states is None else encoder_hidden_states
        if context is hidden_states:
            self.prepare_group(OWN, hidden_states)
        else:
            self.prepare_group(OWN[1:], context)
        if joint and encoder_hidden_states is not None:
            self.prepare_group(ADDED, encoder_hidden_states)

    def prepare_group(self, leaves: tuple[str, ...], x: Tensor) -> None:
        prepare(self.adapter, [f"{self.name}.{leaf}" for leaf in leaves], x)


class One:
    """Divides a tensor without touching it."""

    def __rtruediv__(self, other: Tensor) -> Tensor:
        return other


class WithoutDivisionByOne(AbstractContextManager):
    """Inside, `tensor / module.<name>` launches nothing if the attribute is 1."""

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name = module, name
        self.factor = getattr(module, name, None)

    def __enter__(self) -> None:
        if self.factor == 1:
            setattr(self.module, self.name, One())

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.factor == 1:
            setattr(self.module, self.name, self.factor)


def wrap_processor(inner: Any, adapter: Adapter, name: str) -> ResLoRAAttnProcessor:
    """A `ResLoRAAttnProcessor` whose `__call__` has the signature of `inner`'s.

    diffusers drops every keyword that it does not find in the signature of a processor, so the wrapper must show the
    signature of what it wraps.
    """

    def call(self: ResLoRAAttnProcessor, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler does better with the layers by themselves
            return self.inner(attn, hidden_states, *args, **kwargs)
        self.prepare(attn, hidden_states, args[0] if args else kwargs.get("encoder_hidden_states"))
        with WithoutDivisionByOne(attn, "rescale_output_factor"):
            return self.inner(attn, hidden_states, *args, **kwargs)

    def reduce(self: ResLoRAAttnProcessor) -> tuple:
        return wrap_processor, (self.inner, self.adapter, self.name)

    call.__signature__ = inspect.signature(type(inner).__call__)  # type: ignore[attr-defined]
    kind = type("ResLoRAAttnProcessor", (ResLoRAAttnProcessor,), {"__call__": call, "__reduce__": reduce})
    return kind(inner, adapter, name)


def set_attn_processors(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> list[str]:
    """Wrap the processor of every attention of `model` that the adapter is on; returns their names.

    >>> unet.add_adapter(ResLoraConfig(...))
    >>> if unet.device.type == "cuda":  # on a CPU, slicing the stacked product costs more than it saves
    ...     set_attn_processors(unet)
    """
    adapter = get_adapter(model, adapter_name)
    wrapped = []
    for name, module in model.named_modules():
        adapted = any(f"{name}.{leaf}" in adapter.layers for leaf in OWN + ADDED)
        if adapted and hasattr(module, "set_processor"):
            current = module.processor
            inner = current.inner if isinstance(current, ResLoRAAttnProcessor) else current
            module.set_processor(wrap_processor(inner, adapter, name))
            wrapped.append(name)
    return wrapped


def unset_attn_processors(model: nn.Module) -> None:
    """Inverse of `set_attn_processors`."""
    for module in model.modules():
        current = getattr(module, "processor", None)
        if isinstance(current, ResLoRAAttnProcessor):
            cast(Any, module).set_processor(current.inner)  # whatever has a processor of ours has it
            prepare_nothing(current.adapter)
