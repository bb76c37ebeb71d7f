"""`--network_weights`: training starts from a LoRA that there is, of any program, and computes at first what it does.

    the file      s' B' A', rank r'
    the adapter   s B A, rank r >= r':     A = [A' ; fresh rows]     B = [s'/s B', 0]

The rows that the file does not fill are as fresh as without it. Plain LoRA only: under a shortcut the same factors
compute something else.
"""

from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer

from reslora_diffusion.export import read_lora
from reslora_diffusion.export.factors import Components, rank_of
from reslora_diffusion.export.keys import classic_path
from reslora_diffusion.export.proof import finiteness_problems

from ...utils.problems import listing
from ..options import DreamBoothOptions
from .adapters import ADAPTER, Adapters
from .architecture import Architecture
from .architecture import rank_of as rank_asked


def read_weights(source: str) -> Components:
    """The modules of a file that do something: exports hold zeros where loaders want to see a module."""
    return {
        component: {path: f for path, f in modules.items() if f.lora_A.any() and f.lora_B.any()}
        for component, modules in read_lora(source).components.items()
    }


def weights_problems(options: DreamBoothOptions, architecture: Architecture) -> Iterator[str]:
    """Return reasons why this run cannot start from the file."""
    where = f"--network_weights {options.network_weights}"
    try:
        components = read_weights(str(options.network_weights))
    except (OSError, ValueError) as error:
        yield f"{where}: {error}"
        return
    yield from (f"{where}: {problem}" for problem in finiteness_problems(components))
    adapted = {
        (component, classic_path(component, name)): (layer, rank_asked(options, name, layer))
        for component, name, layer in architecture.adapted(options)
    }
    foreign, unlike, larger = [], [], {}
    for component, modules in components.items():
        for path, factors in modules.items():
            layer, rank = adapted.get((component, path), (None, 0))
            if layer is None:
                foreign.append(f"{component}.{path}")
            elif (len(factors.lora_B), *factors.lora_A.shape[1:]) != layer.shape:
                unlike.append(f"{component}.{path}")
            elif rank_of(factors) > rank:
                larger[f"{component}.{path}"] = rank_of(factors)
    if foreign:
        hint = (
            ""
            if options.train_text_encoder or not foreign[0].startswith("text_encoder")
            else " (--train_text_encoder?)"
        )
        yield f"{where} has {len(foreign)} modules that this run does not train{hint}: {listing(foreign)}"
    if unlike:
        title = architecture.family.title
        yield f"{where} has {len(unlike)} modules of other shapes than {title} here: {listing(unlike)}"
    if larger:
        most = max(larger.values())
        yield (
            f"{where} is of rank {most} in {listing(larger)}; wanted --rank {most} or more, or the file cut down first "
            f"(reslora resize {options.network_weights} --rank {options.rank})"
        )


@torch.no_grad()
def start_from(source: str, adapters: Adapters) -> int:
    """Put a LoRA into fresh adapters; returns how many layers it fills."""
    filled = 0
    components = read_weights(source)
    for component, model in adapters.models.items():
        for name, layer in model.named_modules():
            factors = components.get(component, {}).get(classic_path(component, name))
            if isinstance(layer, LoraLayer) and factors is not None:
                rank = rank_of(factors)
                A, B = (half[ADAPTER].get_parameter("weight") for half in (layer.lora_A, layer.lora_B))
                A[:rank] = factors.lora_A
                B[:, :rank] = factors.lora_B * (factors.scaling / layer.scaling[ADAPTER])
                filled += 1
    return filled
