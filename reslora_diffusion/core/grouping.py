"""Layers that are about to be called with one x, such as q, k and v of an attention, are computed together.

`prepare` has `kernels.grouped` compute them before the first is called; each then takes its output when its turn comes
(`AdaptedLayer.take_prepared`). From the next forward on their factors lie side by side (`core.packed`). Attention
processors call it (`diffusion.models.attn_processor`), and it saves launches on a GPU.
"""

from collections.abc import Sequence

from torch import Tensor

from .adapter import Adapter
from .functional import version_of
from .kernels import KERNELS, Choice, can_be_grouped, grouped_linears, plain_reason
from .layer import Prepared


def prepare(adapter: Adapter, names: Sequence[str], x: Tensor) -> None:
    """Compute several layers that are about to be called with the same `x` [..., in], where that saves work.

    Args:
        names: of the layers, in the order of their calls; those that are not adapted are left out.
    """
    together = tuple(name for name in names if name in adapter.sites)
    if len(together) < 2 or adapter.is_idle() or adapter.merged is not None or adapter.observer is not None:
        return
    layers = [adapter.layer(name) for name in together]
    if x.ndim > 3 or adapter.transform is not None or len(layers[0].module.active_adapters) > 1:
        return  # images, channels first; adapters one by one
    if any(layer.own_output_reason() or plain_reason(x, *layer.frozen()) for layer in layers):
        return
    if adapter.groups.get(together[0]) != together:  # they are packed together from the next forward on
        adapter.groups.update(dict.fromkeys(together, together))
        adapter.packer.forget()
    layers = [layer for layer in layers if not layer.closed]  # which compute nothing that could be shared
    if len(layers) < 2:
        return
    ops, version = [layer.path.op(layer, x) for layer in layers], version_of(x)
    choice = Choice("grouped", f"{len(layers)} layers read one tensor", KERNELS["grouped"])
    if not can_be_grouped(ops):
        for layer in layers:
            adapter.context.retract(layer.name)
        return
    for layer, (y, value) in zip(layers, grouped_linears(ops), strict=True):
        layer.choice = choice
        if value is not None:
            layer.publish(value, projected=True)
        adapter.prepared[layer.name] = Prepared(x, version, y)


def prepare_nothing(adapter: Adapter) -> None:
    """Inverse of `prepare`: layers are packed one by one again."""
    adapter.groups.clear()
    adapter.packer.forget()
