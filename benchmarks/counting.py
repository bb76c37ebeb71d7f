"""Counts of one forward and backward, in place of times: they are the same on every machine, in every run.

A model on the `meta` device computes shapes and nothing else, so the real UNets fit a laptop. While it runs,

    operations   dispatched aten operations that are not views: about one kernel launch each
    bytes        operands and results of those operations: an upper bound on memory traffic
    saved        distinct storages that autograd keeps for backward
    peak         most bytes alive at once, parameters and inputs excluded

`as_cuda` makes the operations those of a GPU: flash attention, native dropout, and autocast's casts where asked.

    python -m benchmarks.counting [--model sd15 sdxl] [--batch_size 4] [--json FILE]
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GIGA = 1e9
LOW_PRECISION = {F.linear, F.conv2d, F.bilinear, torch.conv2d, torch.matmul, torch.bmm, torch.addmm, torch.baddbmm}
FULL_PRECISION = {F.layer_norm, F.group_norm, F.softmax, F.mse_loss, torch.exp, torch.pow}


@dataclass
class Counts:
    """Operations, bytes and peak memory of one forward and backward."""

    operations: int = 0
    bytes: int = 0
    saved: int = 0
    peak: int = 0
    by_name: Counter = field(default_factory=Counter)

    def to_dict(self) -> dict[str, float]:
        gigabytes = {name: round(getattr(self, name) / GIGA, 4) for name in ("bytes", "saved", "peak")}
        return {"operations": self.operations, **gigabytes}


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class CountOperations(TorchDispatchMode):
    """Fills in `Counts` while it is entered."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self.alive = 0
        self.known: dict[int, weakref.ref] = {}

    def follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def gone(_: object) -> None:
            self.alive -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.counts.peak = max(self.counts.peak, self.alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in tree_iter(result) if isinstance(value, Tensor)]
        storages = {id(value.untyped_storage()) for value in given}
        fresh = any(id(value.untyped_storage()) not in storages for value in made)
        name = func.__name__.partition(".")[0]
        if (fresh or func._schema.is_mutable) and not name.startswith(("empty", "new_empty")):
            self.counts.operations += 1
            self.counts.by_name[name] += 1
            self.counts.bytes += sum(map(size_of, given)) + sum(map(size_of, made))
        for value in made:
            if id(value.untyped_storage()) not in storages:
                self.follow(value)
        return result


class AsCuda(TorchFunctionMode):
    """Functions that mean other operations on a GPU than on `meta`."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self.cast_weights: dict[int, Tensor] = {}

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if value.is_leaf and value.requires_grad and dtype is torch.bfloat16:  # autocast keeps what it made of weights
            return self.cast_weights.setdefault(id(value), value.to(dtype))
        return value.to(dtype)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast and func in LOW_PRECISION | {F.scaled_dot_product_attention}:
            args = tuple(self.cast(value, torch.bfloat16) for value in args)
            kwargs = {name: self.cast(value, torch.bfloat16) for name, value in kwargs.items()}
        elif self.autocast and func in FULL_PRECISION:
            args = tuple(self.cast(value, torch.float32) for value in args)
            kwargs = {name: self.cast(value, torch.float32) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            scale = kwargs.get("scale")
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(*args[:3], 0.0, kwargs.get("is_causal", False), False, scale=scale)[0]
        if func is F.dropout:
            x, p, training = args[0], kwargs.get("p", 0.5), kwargs.get("training", True)
            p, training = (*args[1:], *(p, training)[len(args) - 1 :])[:2]
            return torch.native_dropout(x, p, training)[0] if training and p else x
        return func(*args, **kwargs)


@contextmanager
def as_cuda(autocast: bool = False) -> Iterator[None]:
    """Inside, `meta` tensors go through the operations that CUDA tensors would go through."""
    with AsCuda(autocast):
        yield


def count(model: nn.Module, inputs: dict[str, Any], *, autocast: bool = False, backward: bool = True) -> Counts:
    """Count one forward and backward of a model on `meta`, to the gradients of what is trained in it."""
    counts = Counts()
    saved: dict[int, Tensor] = {}
    weights = {id(value.untyped_storage()) for value in [*model.parameters(), *model.buffers()]}

    def pack(value: Tensor) -> Tensor:
        key = id(value.untyped_storage())
        if key not in weights:
            saved.setdefault(key, value)
        return value

    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.enter_context(CountOperations(counts))
        stack.enter_context(as_cuda(autocast))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            output = model(**inputs, return_dict=False)[0]
        counts.saved = sum(value.untyped_storage().nbytes() for value in saved.values())
        saved.clear()
        if backward:
            gradient = torch.empty_like(output)
            torch.autograd.backward(output, gradient)
    for parameter in model.parameters():
        parameter.grad = None
    return counts


# --------------------------------------------------------------------------------------------------- the table

COLUMNS = ("operations", "bytes", "saved", "peak")


def counts_of(variant: str, subject: str, batch: int) -> Counts:
    """Counts of one variant on one model with a bf16 base, as they are on a GPU."""
    from .models import SUBJECTS
    from .variants import VARIANTS

    chosen, of = VARIANTS[variant], SUBJECTS[subject]
    with torch.device("meta"):
        model = of.make().train().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        chosen.adapt(model, of.targets, True)
        inputs = of.inputs(batch, torch.device("meta"), torch.bfloat16)
    with torch.no_grad(), as_cuda(chosen.autocast):
        model(**inputs)  # groups of layers are known after a first forward
    return count(model, inputs, autocast=chosen.autocast)


def table(counts: dict[str, Counts]) -> str:
    """Counts beside their ratio to PEFT's."""
    yardstick = counts["peft"]
    lines = [f"{'':20}" + "".join(f"{name:>18}" for name in ("operations", "GB", "saved GB", "peak GB"))]
    for name, of in counts.items():
        cells = []
        for column in COLUMNS:
            value, ratio = getattr(of, column), getattr(of, column) / getattr(yardstick, column)
            cells.append(f"{value if column == 'operations' else f'{value / GIGA:.2f}'} ({ratio:.2f}x)")
        lines.append(f"{name:20}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    import argparse

    from .models import SUBJECTS
    from .results import write_results
    from .variants import VARIANTS

    parser = argparse.ArgumentParser(description="Count the operations, bytes and memory of one training step.")
    parser.add_argument("--model", nargs="+", default=["sd15", "sdxl"], choices=SUBJECTS)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    found = {}
    for subject in args.model:
        batch = args.batch_size if subject != "sdxl" else 1
        counts = {name: counts_of(name, subject, batch) for name in dict.fromkeys(["peft", *args.variant])}
        print(f"\n{subject}, batch {batch}, bf16 base, rank 16\n{table(counts)}", flush=True)
        found[f"{subject}, batch {batch}"] = {name: value.to_dict() for name, value in counts.items()}
    if args.json:
        write_results(args.json, "counting", found)


if __name__ == "__main__":
    main()
