"""A CUDA graph on the CPU: a tape of operators, played again on the memory that they had.

As with a graph, recording changes nothing; a replay runs no Python of the recorded function; arguments that are numbers
stay what they were when it was recorded; tensors stay where they are, and only what is written into them differs; and
random operators draw from the default generator. A value that reaches Python while recording is an error.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}


def waits_for_device(func, args) -> bool:
    """Whether the host needs a value that the device computes, or a shape that depends on one."""
    masked = func.overloadpacket._qualified_op_name in ("aten::index", "aten::index_put_") and any(
        part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]
    )
    return masked or func.overloadpacket.__name__ in WAITS


class Tape(TorchDispatchMode):
    """What was called, with tensors by reference."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []
        self.before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not waits_for_device(func, args), f"{func} waits for the device"
        schema = func._schema
        for argument, value in [*zip(schema.arguments, args, strict=False), *self.named(schema, kwargs)]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_flatten(value)[0]:
                    storage = tensor.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        output = func(*args, **kwargs)
        if not schema.returns or any(r.alias_info is None or r.alias_info.is_write for r in schema.returns):
            inputs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            self.calls.append((func, *inputs, tree_map_only(torch.Tensor, torch.Tensor.detach, output)))
        return output

    @staticmethod
    def named(schema, kwargs):
        by_name = {argument.name: argument for argument in schema.arguments}
        return [(by_name[name], value) for name, value in kwargs.items()]

    def undo(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, output in self.calls:
            mine, fresh = tree_flatten(output)[0], tree_flatten(func(*args, **kwargs))[0]
            for old, new in zip(mine, fresh, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """A `Recorder`; `recorded` and `replayed` count."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.forgotten = 0

    def as_recorded(self):
        return nullcontext()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        seeded = torch.get_rng_state()
        with Tape() as tape:
            function()
        tape.undo()
        torch.set_rng_state(seeded)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.play()

        return replay

    def forget(self) -> None:
        self.forgotten += 1
