"""Says which configurations of PEFT's LoRA are plain: W' = W + scaling * lora_B @ lora_A, with W the base as released.

Factors alone do not tell. `init_lora_weights="pissa"` takes the adapter's start out of the base weights, aLoRA adds the
product only after some tokens, and so on. `FIELDS` gives every field of `peft.LoraConfig` (0.21) its meaning, and
whoever reads factors or puts a shortcut on them asks here. Known without torch and PEFT.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from .utils.problems import printable, shortened


class Meaning(StrEnum):
    """The meaning of a configuration's field for factors that are read from a file."""

    SCALING = "read with the factors"
    NO_EFFECT = "describes the training, or which modules are adapted, which the file's tensors say themselves"
    TENSORS = "trains more than factors; the file's tensors say whether there is more"
    INITIAL = "one of the initialisations below"
    NOT_PLAIN = "another computation than plain LoRA, unless it is not set"


FIELDS = {
    **dict.fromkeys(("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"), Meaning.SCALING),
    **dict.fromkeys(
        """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
        exclude_modules layers_to_transform layers_pattern lora_dropout fan_in_fan_out megatron_core runtime_config
        loftq_config eva_config corda_config lora_ga_config qalora_group_size ensure_weight_tying""".split(),
        Meaning.NO_EFFECT,
    ),
    **dict.fromkeys(("bias", "lora_bias", "modules_to_save", "trainable_token_indices"), Meaning.TENSORS),
    "init_lora_weights": Meaning.INITIAL,
    **dict.fromkeys(
        """use_dora use_qalora use_bdlora alora_invocation_tokens arrow_config velora_config monteclora_config
        kasa_config layer_replication target_parameters megatron_config""".split(),
        Meaning.NOT_PLAIN,
    ),
}
# What `ResLoraConfig` adds. With the shortcut "none" nothing of it matters.
SHORTCUT_FIELDS = (
    *("shortcut", "num_previous", "merge_method", "same_resolution_only"),
    *("calibrated", "frozen_links", "reslora_version"),
)

# Initialisations after which lora_B @ lora_A = 0; "mica" too, but it freezes lora_B by a layer of its own.
STARTS_AT_THE_BASE = ("gaussian", "eva", "orthogonal")
KEEPS_THE_BASE = (*STARTS_AT_THE_BASE, "mica")
# Initialisations with lora_B @ lora_A != 0 that take the difference out of the base weights of the same layer.
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
CONVERTED_BY_PEFT = ("pissa", "olora", "corda", "lora_ga")
UNMERGED = "is an unmerged ResLoRA; merge it (merged_factors), or take its run's export"


def changes_the_base(init: object) -> bool:
    """Return whether an `init_lora_weights` moves the base weights away from the released ones."""
    return isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE)


def keeps_the_base(init: object) -> bool:
    """Return whether an `init_lora_weights` is known to leave the base weights as they are."""
    return init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in KEEPS_THE_BASE)


def not_plain(config: Mapping[str, Any], where: str, dora: bool = False) -> Iterator[str]:
    """Return the reasons why a stored PEFT configuration means more than its factors, each with field and value.

    Args:
        config: the fields, as PEFT or diffusers wrote them.
        where: the name of what they stand in.
        dora: whether a DoRA may be there.
    """
    kind = config.get("peft_type", "LORA")
    if is_unmerged(config):
        yield UNMERGED
        return
    if kind not in ("LORA", "RESLORA") or (is_set(config.get("use_dora")) and not dora):
        yield f"is {'DoRA' if is_set(config.get('use_dora')) else printable(kind)} by its {where}; wanted plain LORA"
        return
    init = config.get("init_lora_weights", True)
    if changes_the_base(init):
        yield f"{where}: init_lora_weights is {shortened(init)}, {remedy(str(init).lower())}"
    elif not keeps_the_base(init):
        wanted = f"true, false or one of {', '.join(KEEPS_THE_BASE)}"
        yield f"{where}: init_lora_weights is {shortened(init)}, wanted {wanted}"
    for name, value in config.items():
        meaning = FIELDS.get(name, Meaning.NO_EFFECT if name in SHORTCUT_FIELDS else Meaning.NOT_PLAIN)
        if meaning is Meaning.NOT_PLAIN and is_set(value) and not (dora and name == "use_dora"):
            what = "makes it no plain LoRA" if name in FIELDS else "is no field that this version knows"
            found = f"{where}: {printable(name, 80)} is {shortened(value)}"
            yield f"{found}, which {what}; use it in PEFT"


def remedy(init: str) -> str:
    """Return advice on factors that belong to changed base weights."""
    why = "which changes the base weights: added to the released base, the factors mean something else"
    if init.startswith(CONVERTED_BY_PEFT):
        return (
            f"{why}. Make a plain LoRA of it by PEFT's save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...), or merge it with PEFT's merge_and_unload"
        )
    return f"{why}. Merge it with PEFT's merge_and_unload"


def is_unmerged(config: Mapping[str, Any]) -> bool:
    """Return whether its layers compute with a shortcut, which factors alone do not hold."""
    return config.get("shortcut", "none") != "none" and config.get("num_previous") != 0


def is_set(value: object) -> bool:
    return value is not None and value is not False and value not in ({}, [], "")
