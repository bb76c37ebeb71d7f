"""Operations of PEFT that ResLoRA refuses, and the reasons."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ...rules import Shortcut
from .variant import find_adapter

NOT_FOUND = "not found in the base model"  # in PEFT's message


@contextmanager
def naming_near_targets(model: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Inside, PEFT's error for `target_modules` that are no module's name is raised with the nearest names there are.

    Modules that exist and are left out by `exclude_modules`, `layers_to_transform` or `layers_pattern` have PEFT's own.
    """
    try:
        yield
    except ValueError as error:
        if NOT_FOUND not in str(error) or config.layers_to_transform is not None or config.layers_pattern is not None:
            raise
        raise type(error)(unknown_targets(model, config.target_modules or ())) from None


def unknown_targets(model: nn.Module, targets: str | Iterable[str]) -> str:
    """Describe targets that no module has the name of, with the nearest names of linear layers."""
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", module), nn.Linear) and ".lora_" not in name
    }
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    near = {name for target in wanted for name in difflib.get_close_matches(target, linear, n=3)}
    offered = f"the nearest are {', '.join(sorted(near))}" if near else f"it has {', '.join(sorted(linear)[:12])}"
    return (
        f"Target modules {targets} {NOT_FOUND} ({type(model).__name__}): no module has such a name; {offered}. Please "
        "check the target modules and try again."
    )


def refuse_combination(model: nn.Module, adapters: list[str], combination_type: str) -> None:
    """Raise `ValueError` if adapters cannot be combined into one of the same shortcut.

    Side by side (`cat`) they can, where their links are the same. By SVD of each layer's own B A they cannot for
    `middle`, whose B_n A_{n-1} x needs the factors of neighbours in one basis.
    """
    found = {name: find_adapter(model, name) for name in adapters}
    ours = {name: one for name, one in found.items() if one is not None and not one.is_plain}
    ways = [(one.shortcut, one.config.num_previous, one.joined) for one in ours.values()]
    problems = []
    if decomposed := [name for name, one in found.items() if one is not None and one.dora]:
        problems.append(f"{', '.join(map(repr, decomposed))} are DoRA, whose magnitudes have no weighted sum")
    if linked := [name for name, one in ours.items() if one.frozen]:
        problems.append(f"{', '.join(map(repr, linked))} have frozen factors beside those that are trained")
    elif ours and (len(ours) < len(found) or any(way != ways[0] for way in ways)):
        kinds = ", ".join(f"{name!r} by {str(ours[name].shortcut) if name in ours else 'none'}" for name in found)
        problems.append(f"the layers of the adapters are joined differently ({kinds}), and one adapter has one way")
    elif len(ours) > 1 and ways[0][0] is Shortcut.MIDDLE:
        if combination_type.endswith("svd"):
            problems.append(
                f"combination_type {combination_type!r} takes each layer's B A apart anew, and shortcut 'middle' "
                "multiplies factors of several layers; wanted 'cat' or 'linear'"
            )
        elif any(len({one.layers[n].scaling[a] for n in chain}) > 1 for a, one in ours.items() for chain in one.joined):
            problems.append("shortcut 'middle' multiplies factors of several layers, whose scalings differ here")
    if problems:
        raise ValueError(
            "add_weighted_adapter: " + "; ".join(problems) + ". Or combine the plain LoRAs that they merge into "
            "(merged_factors, reslora_diffusion.export.combine)"
        )


def refuse_shared_weights(model: nn.Module, adapters: Iterable[str]) -> None:
    """Raise `ValueError` if a merge would add what several layers have learned to the one weight that they share, as
    the copies of `layer_replication` do."""
    users: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and any(one in {*layer.lora_A, *layer.lora_embedding_A} for one in adapters):
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is not None:  # a module of fused experts has none of this name
                users.setdefault(id(weight), []).append(name)
    if shared := [names for names in users.values() if len(names) > 1]:
        raise ValueError(
            f"{', '.join(shared[0][:3])} share one weight, and merging would add to it what each of them has learned; "
            "use the adapter unmerged, or train with layers of their own"
        )
