"""Places for what a file has beside the factors.

    <layer>.lora_A_calibration.<adapter>        C [r, in]
    <layer>.lora_{A,B}_frozen.<adapter>.<link>  the factors of a finished link

Loaders put a tensor where the model has a buffer of its name, and drop the others. So there are buffers of these names
while an adapter is loaded, and the adapter takes what has arrived in them when it is used first. They are made by what
a saved configuration says (`calibrated`, `frozen_links`), as transformers' `load_adapter` shows a file to nobody, and
by the names in a file where PEFT loads one (`ResLoraModel`).
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Adapter = Any  # `core.adapter.Adapter`, which takes what arrives

CALIBRATION = "lora_A_calibration"
FROZEN = {"A": "lora_A_frozen", "B": "lora_B_frozen"}
BESIDE = re.compile(rf"(?:base_model\.model\.)?(.+)\.({CALIBRATION}|{'|'.join(FROZEN.values())})(?:\.(\d+))?")


def make_places(adapter: Adapter) -> None:
    """Buffers for what the configuration says; NaN until something arrives."""
    links = range(adapter.config.frozen_links)
    for name, layer in adapter.layers.items():
        A, B = adapter.factors(name)
        if adapter.config.calibrated:
            place(layer, A, CALIBRATION, adapter.adapter_name)
        for link in links:
            place(layer, A, FROZEN["A"], adapter.adapter_name, str(link))
            place(layer, B, FROZEN["B"], adapter.adapter_name, str(link))
    if adapter.config.calibrated or links:
        adapter.awaits = True


def make_places_for(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Buffers for what a file holds beside the factors; the frozen links that an adapter has give way to those."""
    adapter.frozen = {}
    for key in sorted(tensors, key=lambda key: (len(key), key)):  # links by number
        found = BESIDE.fullmatch(key)
        if found and found[1] in adapter.layers:
            like = tensors[key].to(adapter.lora_A(found[1]).device)
            place(adapter.layers[found[1]], like, found[2], adapter.adapter_name, *filter(None, [found[3]]))
            adapter.awaits = True


def place(layer: Any, like: Tensor, *names: str) -> None:
    """A buffer of a tensor's shape in a layer, at a name of several parts."""
    *path, leaf = names
    for name in path:
        if name not in layer._modules:
            layer.add_module(name, nn.Module())
        layer = layer.get_submodule(name)
    layer.register_buffer(leaf, torch.full_like(like.detach(), torch.nan))


def taken(layer: Any, first: str, adapter_name: str) -> Iterator[Tensor]:
    """The buffers of an adapter under a name, which go from the layer; those into which nothing came are left out."""
    holder = layer._modules.get(first)
    if holder is None:
        return
    found = holder._buffers.pop(adapter_name, None)
    inner = holder._modules.pop(adapter_name, None)
    values = [found] if found is not None else list(inner._buffers.values()) if inner is not None else []
    if not holder._buffers and not holder._modules:
        del layer._modules[first]
    yield from (value for value in values if value is not None and not (value.is_meta or value.isnan().any()))


def settle(adapter: Adapter) -> None:
    """Give the adapter what a loader has put into its places, and take the places away."""
    if not adapter.awaits:
        return
    adapter.awaits = False
    calibration, frozen = {}, False
    for name, layer in adapter.layers.items():
        for value in taken(layer, CALIBRATION, adapter.adapter_name):
            calibration[name] = value
        pairs = zip(*(list(taken(layer, FROZEN[side], adapter.adapter_name)) for side in "AB"), strict=True)
        for pair in pairs:
            frozen = True
            adapter.add_frozen({name: pair})
    adapter.calibration = calibration or adapter.calibration
    adapter.lacks_links = adapter.config.frozen_links > 0 and not frozen


def warn_of_lost_links(adapter: Adapter) -> None:
    """Frozen links are a part of what was trained: an adapter that was loaded without them says so once."""
    if adapter.lacks_links and not adapter.frozen:
        warnings.warn(
            f"adapter {adapter.adapter_name!r} was saved with {adapter.config.frozen_links} frozen links beside its "
            "factors, and they were not loaded: load it by PeftModel.from_pretrained or model.load_adapter",
            stacklevel=2,
        )
    adapter.lacks_links = False
