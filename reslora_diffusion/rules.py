"""The fields that a shortcut adds to LoRA's configuration, and the checks of them, without torch and PEFT.

    shortcut       which residual path joins the blocks of a chain while training
    num_previous   m, how many earlier blocks it reaches back to; None for all of them
    merge_method   how `input` and `middle`, which no plain LoRA equals, are turned into one

`core.config.ResLoraConfig` is PEFT's configuration with these fields. Programs ask `faults` before they import it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from .plain_lora import STARTS_AT_THE_BASE, changes_the_base

DEFAULT_ADAPTER = "default"  # PEFT's name of an adapter that was given none
FORMAT_VERSION = 1  # of saved configurations and calibrations; a newer one is refused
# Stands among the factors of an adapter whose layers are linked. diffusers refuses a LoRA file that has a name without
# "lora" in it, vLLM one with a name that is no factor's: nobody takes these factors for a plain LoRA.
UNMERGED_KEY = "shortcut_not_merged"


class Shortcut(StrEnum):
    """The residual path that joins blocks (arXiv 2402.18039, section 3.2); see `core.shortcuts`."""

    NONE = "none"
    INPUT = "input"
    BLOCK = "block"
    MIDDLE = "middle"


MERGE_EXACTLY = frozenset({Shortcut.NONE, Shortcut.BLOCK})  # into a plain LoRA, whatever the data; also as strings


class MergeMethod(StrEnum):
    """The way in which a shortcut that depends on activations becomes a plain LoRA; see `core.merging`."""

    LEAST_SQUARES = "least_squares"
    PAPER_INPUT = "paper_input"
    PAPER_WEIGHT = "paper_weight"
    DROP = "drop"


# Options of PEFT that change what one block computes, in a way that a shortcut between blocks does not share.
VARIANTS = (
    "use_qalora",
    "arrow_config",
    "use_bdlora",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)


CROSSES = (
    "DoRA takes norms of W + B A, and shortcut {shortcut!r} adds what other layers have computed, which is no part of "
    "a weight; wanted shortcut none or block"
)
WITHOUT_DORA = {str(each): CROSSES.format(shortcut=str(each)) for each in Shortcut if each not in MERGE_EXACTLY}


@dataclass
class ShortcutFields:
    """The fields and their defaults."""

    shortcut: Shortcut | str = field(
        default=Shortcut.BLOCK, metadata={"help": "Residual path between blocks: input, block, middle or none."}
    )
    num_previous: int | None = field(
        default=1, metadata={"help": "Earlier blocks that a shortcut reaches back to; 0 is plain LoRA, None is all."}
    )
    merge_method: MergeMethod | str = field(
        default=MergeMethod.LEAST_SQUARES,
        metadata={"help": "How input and middle become a plain LoRA: least_squares, paper_input, paper_weight, drop."},
    )
    same_resolution_only: bool = field(
        default=False, metadata={"help": "Cut block chains where the number of tokens changes."}
    )
    calibrated: bool = field(
        default=False, metadata={"help": "Written when saved: whether the file has a calibration."}
    )
    frozen_links: int = field(
        default=0, metadata={"help": "Written when saved: how many frozen links the file has beside the factors."}
    )
    reslora_version: int = field(default=FORMAT_VERSION, metadata={"help": "Format of this configuration."})


def faults(given: Mapping[str, Any]) -> list[str]:
    """Everything wrong with keyword arguments of a configuration; what is not given has its default."""
    values: dict[str, Any] = {item.name: item.default for item in fields(ShortcutFields)} | dict(given)
    found = []
    for name, kind in (("shortcut", Shortcut), ("merge_method", MergeMethod)):
        if (value := values[name]) not in set(kind):
            found.append(f"{name}: got {value!r}, wanted {', '.join(kind)}")
    count = values["num_previous"]
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        found.append(f"num_previous: got {count!r}, wanted 0, 1, 2, ... or None for all")
    elif values["shortcut"] == Shortcut.INPUT and count not in (0, 1):
        found.append(f"num_previous: got {count!r}, wanted 1 or 0: shortcut 'input' reaches back one block")
    rank, dropout = values.get("r", 1), values.get("lora_dropout", 0.0)
    if not isinstance(rank, int) or rank < 1:
        found.append(f"r: got {rank!r}, wanted 1 or more")
    if not 0 <= dropout < 1:
        found.append(f"lora_dropout: got {dropout!r}, wanted 0 or more and below 1")
    if bad := {name: rank for name, rank in (values.get("rank_pattern") or {}).items() if rank < 1}:
        found.append(f"rank_pattern: got {bad}, wanted ranks of 1 or more")
    if values.get("use_dora") and values["shortcut"] not in MERGE_EXACTLY and count != 0:
        found.append(f"use_dora: {WITHOUT_DORA.get(values['shortcut'], 'wanted shortcut none or block')}")
    found += [
        f"{name}: got {values[name]!r}, which does not combine with a shortcut; use PEFT's LoraConfig"
        for name in VARIANTS
        if values.get(name)
    ]
    if values.get("lora_bias"):
        found.append("lora_bias: got True, wanted False: a bias has no place in the merged factors")
    found += initialisation_faults(values)
    if values["reslora_version"] > FORMAT_VERSION:
        found.append(
            f"reslora_version: got {values['reslora_version']}, this package reads up to {FORMAT_VERSION}; update it"
        )
    return found


def initialisation_faults(values: Mapping[str, Any]) -> list[str]:
    """Problems with `init_lora_weights` beside the shortcut."""
    init = values.get("init_lora_weights")
    if not isinstance(init, str):
        return []
    linked = values["shortcut"] != Shortcut.NONE and values["num_previous"] != 0
    good = [name for name in STARTS_AT_THE_BASE if name != "orthogonal" or values["shortcut"] != Shortcut.MIDDLE]
    wanted = f"wanted True, False or {', '.join(map(repr, good))}"
    if init.lower() == "mica":
        return ["init_lora_weights: got 'mica', which trains lora_A alone by a layer of its own; use PEFT's LoraConfig"]
    if init.lower() not in STARTS_AT_THE_BASE and not changes_the_base(init):
        return [f"init_lora_weights: got {init!r}; {wanted}"]
    if linked and changes_the_base(init):
        return [
            f"init_lora_weights: got {init!r}, which changes the base weights by B A of the same layer alone; a "
            f"shortcut adds more than that, so training would not start at the base; {wanted}, or shortcut 'none'"
        ]
    if linked and init.lower() not in good:
        return [
            f"init_lora_weights: got {init!r}, where B A = 0 within a layer alone; shortcut 'middle' adds B_n A_(n-1) "
            f"too, so training would not start at the base; {wanted}"
        ]
    return []
