"""Weighted sums of several LoRAs of one base: sum_k w_k delta_k, module by module."""

from collections.abc import Sequence
from pathlib import Path

from ..utils.problems import listing
from .factors import Components, delta_norm, summed_factors
from .geometry import GEOMETRIES, family_of
from .reader import LoraFile
from .writer import carried_facts

ROUNDING = 1e-6  # of a sum in float32, relative to its terms


def weighted_sum(terms: Sequence[Components], weights: Sequence[float]) -> Components:
    """Module by module; one that a term lacks counts as zero there."""
    total: Components = {}
    names = dict.fromkeys((c, path) for components in terms for c, modules in components.items() for path in modules)
    for component, path in names:
        having = [
            (components[component][path], weight)
            for components, weight in zip(terms, weights, strict=True)
            if path in components.get(component, {})
        ]
        summed = summed_factors(*zip(*having, strict=True))
        single = summed._replace(lora_A=summed.lora_A.float(), lora_B=summed.lora_B.float())
        total.setdefault(component, {})[path] = single
    return total


def cancels(total: Components, terms: Sequence[Components], weights: Sequence[float]) -> bool:
    """Return whether a weighted sum is no more than rounding in every module."""
    return all(
        delta_norm(left)
        <= ROUNDING
        * sum(
            abs(weight) * delta_norm(components[component][path])
            for components, weight in zip(terms, weights, strict=True)
            if path in components.get(component, {})
        )
        for component, modules in total.items()
        for path, left in modules.items()
    )


def unlike_problems(loras: Sequence[LoraFile]) -> list[str]:
    """Return why files do not fit one base."""
    families = {str(lora.path): family_of(lora.components) for lora in loras}
    known = {family for family in families.values() if family in GEOMETRIES}
    problems = []
    if len(known) > 1:
        problems.append("; ".join(f"{path} is for {family}" for path, family in families.items()))
    shapes: dict[tuple[str, str], tuple[list[int], Path]] = {}
    unlike = []
    for lora in loras:
        for component, modules in lora.components.items():
            for path, f in modules.items():
                shape = [f.lora_B.shape[0], *f.lora_A.shape[1:]]
                first, where = shapes.setdefault((component, path), (shape, lora.path))
                if shape != first:
                    unlike.append(f"{component}.{path} is {first} in {where.name} and {shape} in {lora.path.name}")
    if unlike:
        problems.append(f"{len(unlike)} modules have different shapes: {listing(unlike, 2)}")
    return problems


def combined_facts(loras: Sequence[LoraFile], weights: Sequence[float]) -> dict[str, str]:
    """The base if the headers agree on it, all trigger words, and what was combined."""
    stated = [carried_facts(lora.metadata) for lora in loras]
    facts = {}
    for key in ("base_model", "prediction_type", "resolution"):
        first, *others = (headers.get(key) for headers in stated)
        if first is not None and all(other == first for other in others):
            facts[key] = first
    if triggers := dict.fromkeys(headers["trigger_words"] for headers in stated if headers.get("trigger_words")):
        facts["trigger_words"] = ", ".join(triggers)
    terms = " + ".join(f"{weight:g} x {lora.path.name}" for lora, weight in zip(loras, weights, strict=True))
    return facts | {"combined_from": terms}
