"""Apple's GPU, imitated on a CPU by what it refuses: float64, and operands that lie on different devices.

    with imitated_mps():
        model.to("mps")         # its tensors say device "mps", and compute on the CPU
        model.weight.double()   # TypeError, as on the device

A tensor of it is a `Tensor` subclass around one of the CPU. PyTorch's own code is not imitated: which operations a Mac
lacks, and what its kernels compute, is not seen by this.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

aten = torch.ops.aten
MPS = torch.device("mps", 0)
REFUSED = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"


def is_mps(device: Any) -> bool:
    return device is not None and torch.device(device).type == "mps"


class OnMps(Tensor):
    """A tensor of the imitated device; `held` is what it computes with. To C++ it is one of the CPU."""

    held: Tensor
    float64 = False

    @staticmethod
    def __new__(cls: type, held: Tensor) -> "OnMps":
        if held.dtype == torch.float64 and not cls.float64:
            raise TypeError(REFUSED)
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, requires_grad=held.requires_grad
        )
        made.held = held
        return made

    device = property(lambda self: MPS)  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on mps"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, meta: None, size: Any, stride: Any) -> "OnMps":
        return OnMps(inner["held"])

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.tolist, Tensor.numpy):
            if func is Tensor.numpy:
                raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")
            return args[0].detach().held.tolist()
        if func is Tensor.get_device:
            return 0
        with torch._C.DisableTorchFunctionSubclass():  # results of the CPU stay plain tensors
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Moved(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.detach().held.clone() if isinstance(x, OnMps) else OnMps(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return Moved.apply(g)


def moved(x: Tensor, words: list, kwargs: dict) -> Tensor:
    """`x.to(*words, **kwargs)`: a change of precision happens on the device that knows both."""
    kwargs, there = dict(kwargs), isinstance(x, OnMps)
    other = next((word for word in words if isinstance(word, Tensor)), kwargs.pop("other", None))
    named = [word for word in (*words, kwargs.pop("device", None)) if isinstance(word, str | torch.device)]
    dtypes = [word for word in (*words, kwargs.pop("dtype", None)) if isinstance(word, torch.dtype)]
    if other is not None:
        named, dtypes = [other.device], [other.dtype]
    goes = is_mps(named[0]) if named else there
    rest = [word for word in words if not isinstance(word, str | torch.device | torch.dtype | Tensor)]
    if there and not goes:
        x = Moved.apply(x)
    if dtypes:
        x = x.to(dtypes[0], *rest, **kwargs)
    elif not named:
        x = x.to(*rest, **kwargs)
    return Moved.apply(x) if goes and not there else x


def tensors_in(args: Iterable) -> list[Tensor]:
    """The tensors among an operation's arguments: they stand there, or in a list."""
    values = [x for value in args for x in (value if isinstance(value, list | tuple) else (value,))]
    return [value for value in values if isinstance(value, Tensor)]


def compute(func: Any, args: Any, kwargs: dict) -> Any:
    given = tensors_in((*args, *kwargs.values()))
    there = [value for value in given if isinstance(value, OnMps)]
    asked = kwargs.get("device")
    if not there and not is_mps(asked):
        return func(*args, **kwargs)
    copies = func.overloadpacket in (aten.copy_, aten._to_copy)
    elsewhere = [value for value in given if type(value) is Tensor and value.ndim]
    indexed = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_)  # these take indices of the CPU
    if there and elsewhere and not copies and not indexed:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found mps:0 and cpu")
    kwargs = {**kwargs, "device": "cpu"} if is_mps(asked) else kwargs
    inner = tree_map(lambda value: value.held if isinstance(value, OnMps) else value, (args, kwargs))
    result = func(*inner[0], **inner[1])
    if func is aten.copy_.default:
        return args[0]
    casts = bool(there) and func.overloadpacket is aten._to_copy  # autograd's own: it names the device that C++ knows
    if not casts and asked is not None and not is_mps(asked):
        return result
    wrapped = tree_map(lambda value: OnMps(value) if type(value) is Tensor else value, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


class Transfers(TorchFunctionMode):
    """PyTorch without such a device refuses to move a tensor to it before anything is dispatched."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cpu and isinstance(args[0], OnMps):
            return Moved.apply(args[0])
        words = [*args[1:], *kwargs.values()]
        if func is Tensor.to and any(isinstance(word, str | torch.device | Tensor) for word in words):
            return moved(args[0], list(args[1:]), kwargs)
        if func in (torch.tensor, torch.as_tensor) and is_mps(kwargs.get("device")):
            return Moved.apply(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class Imitation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


@contextmanager
def imitated_mps(float64: bool = False) -> Iterator[None]:
    """Inside, the device "mps" is there; with `float64`, it computes with that too, as other GPUs do."""
    OnMps.float64 = float64
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter becomes one of the other device
    try:
        with Imitation(), Transfers():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
