"""Frozen layers that keep less for backward: the same outputs and gradients, about a quarter less memory.

PyTorch keeps what gradients of the weights would need, though frozen weights have none. Kept, before -> after:

    convolution          its input                                  ->  nothing (its gradient needs weight and shape)
    GroupNorm -> SiLU    x, GroupNorm(x)                            ->  x; GroupNorm(x) is computed again
    GEGLU                [h, gate], gelu(gate)                      ->  [h, gate]; gelu(gate) is computed again
    LayerNorm -> LoRA    x, LayerNorm(x)                            ->  x; LayerNorm(x) is computed again

No matrix product or convolution is computed twice. `save_memory` puts these forms on a model, `restore_memory` takes
them off; neither touches a weight. A layer whose weights are trained, or that runs under autocast or torch.compile
(whose partitioner saves as much), computes as it did. Divisions by 1 in residual blocks are left out as well.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reslora_diffusion.core.kernels.fused import can_be_remade

from .attn_processor import WithoutDivisionByOne

# By their overloads: to look one up takes a small layer longer than to compute.
convolution_backward = torch.ops.aten.convolution_backward.default
group_norm = torch.ops.aten.native_group_norm.default
group_norm_backward = torch.ops.aten.native_group_norm_backward.default
silu_backward = torch.ops.aten.silu_backward.default
ONLY_X = (True, False, False)  # of the gradients with respect to x, weight and bias


class FrozenConv2d(torch.autograd.Function):
    """y = W * x + b with constant W and b: dx = W^T * dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        x = gradient.new_empty(1).expand(ctx.shape)  # of which only the shape is read
        settings = (stride, padding, dilation, False, (0, 0), groups, ONLY_X)
        return convolution_backward(gradient, x, weight, None, *settings)[0], None, None, None


class FrozenNormSiLU(torch.autograd.Function):
    """y = silu(GroupNorm(x)) with constant weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
        shape = (x.shape[0], x.shape[1], x[0, 0].numel(), groups)
        h, mean, rstd = group_norm(x, weight, bias, *shape, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.sizes, ctx.eps = shape, eps
        return F.silu(h, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        h = group_norm(x, weight, bias, *ctx.sizes, ctx.eps)[0]
        dh = silu_backward(gradient, h)
        del h
        return group_norm_backward(dh, x, mean, rstd, weight, *ctx.sizes, ONLY_X)[0], None, None, None, None


class HalfGelu(torch.autograd.Function):
    """y = h gelu(gate) of [..., h | gate]."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        h, gate = both.chunk(2, dim=-1)
        return F.gelu(gate).mul_(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        h, gate = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        dh, dgate = result.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gate), out=dh)
        torch.ops.aten.gelu_backward.grad_input(gradient * h, gate, grad_input=dgate)
        return result


# -------------------------------------------------------------------------------------------------- on a model


def is_plain(module: nn.Module, x: Tensor) -> bool:
    """Return whether a module has to compute as it did."""
    return (
        torch.compiler.is_compiling()
        or not x.requires_grad
        or not torch.is_grad_enabled()
        or any([p is not None and p.requires_grad for p in module._parameters.values()])
        or (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
    )


class LowMemoryForward:
    """A callable that replaces the `forward` of a module."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def usual(self, *args: Any, **kwargs: Any) -> Tensor:
        return type(self.module).forward(self.module, *args, **kwargs)


class LowMemoryConv2d(LowMemoryForward):
    def __call__(self, x: Tensor) -> Tensor:
        conv = self.module
        if is_plain(conv, x):
            return self.usual(x)
        settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return FrozenConv2d.apply(x, conv.weight, conv.bias, settings)


class LowMemoryNorm(LowMemoryForward):
    """A group norm with the SiLU that follows it, which `SkippedSiLU` then leaves out."""

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.module
        if is_plain(norm, x):
            return F.silu(self.usual(x))
        return FrozenNormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


class SkippedSiLU(LowMemoryForward):
    """SiLU of the timestep embedding [B, C]; images pass unchanged, since `LowMemoryNorm` has applied it to them."""

    def __call__(self, x: Tensor) -> Tensor:
        return x if x.ndim == 4 else self.usual(x)


class LowMemoryGEGLU(LowMemoryForward):
    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        both = self.module.proj(hidden_states)
        if is_plain(self.module, both):
            h, gate = both.chunk(2, dim=-1)
            return h * F.gelu(gate)
        return HalfGelu.apply(both)


class LowMemoryLayerNorm(LowMemoryForward):
    """Whose output adapted layers need not keep."""

    def __call__(self, x: Tensor) -> Tensor:
        y = self.usual(x)
        return y if is_plain(self.module, x) else can_be_remade(y, self.usual, x)


class LowMemoryResnet(LowMemoryForward):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self.usual(*args, **kwargs)
        with WithoutDivisionByOne(self.module, "output_scale_factor"):
            return self.usual(*args, **kwargs)


FORMS = {GEGLU: LowMemoryGEGLU, nn.LayerNorm: LowMemoryLayerNorm, ResnetBlock2D: LowMemoryResnet}


def norm_and_activation(module: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """GroupNorms of a module whose output goes into its SiLU and nowhere else, and that SiLU."""
    norms: list[Any]
    activation: Any
    if type(module) is ResnetBlock2D and module.time_embedding_norm == "default":
        norms, activation = [module.norm1, module.norm2], module.nonlinearity
    elif isinstance(getattr(module, "conv_norm_out", None), nn.GroupNorm):
        norms, activation = [module.get_submodule("conv_norm_out")], getattr(module, "conv_act", None)
    else:
        return [], None
    fits = type(activation) is nn.SiLU and all(type(norm) is nn.GroupNorm for norm in norms)
    return (norms, activation) if fits else ([], None)


def put(form: type[LowMemoryForward], *modules: nn.Module) -> bool:
    """Give modules a form, unless one of them has a forward of its own already (offloading, another wrapper)."""
    if any("forward" in module.__dict__ for module in modules):
        return False
    for module in modules:
        module.forward = form(module)  # type: ignore[method-assign, assignment]
    return True


def save_memory(model: nn.Module) -> int:
    """Let the frozen layers of `model` keep less for backward; returns how many do.

    >>> save_memory(unet)  # before or after adapters are added; exact to rounding
    """
    before = count(model)
    for module in list(model.modules()):
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            put(LowMemoryConv2d, module)
        elif type(module) in FORMS:
            put(FORMS[type(module)], module)
        norms, activation = norm_and_activation(module)
        if activation is not None and "forward" not in activation.__dict__ and put(LowMemoryNorm, *norms):
            put(SkippedSiLU, activation)
    return count(model) - before


def restore_memory(model: nn.Module) -> None:
    """Inverse of `save_memory`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), LowMemoryForward):
            del module.forward


def count(model: nn.Module) -> int:
    return sum(isinstance(module.__dict__.get("forward"), LowMemoryForward) for module in model.modules())
