"""`--use_dora` on every command line: what DoRA does not go with. The method itself is `core.dora`.

Known without torch.
"""

from collections.abc import Iterable

from ..rules import WITHOUT_DORA

SHARDED = "DoRA takes norms of whole rows of the base, of which each process holds a part; wanted DDP or one process"
CONFLICTS = WITHOUT_DORA | {
    "max_norm": "--scale_weight_norms bounds the norm of B A, and DoRA's change of the weight is not B A; wanted none",
    "network_weights": "a LoRA's file has no magnitudes, and its norms would not be those that training starts with; "
    "wanted none",
    **dict.fromkeys(("sharded_base", "fsdp"), SHARDED),
    "deepspeed": "it has not been tried with DeepSpeed; wanted DDP or one process",
}


def dora_problems(features: Iterable[str]) -> list[str]:
    """Return why DoRA cannot be combined with options of a run; `rules.faults` does so for shortcuts."""
    return [f"--use_dora: {CONFLICTS[name]}" for name in features if name in CONFLICTS.keys() - WITHOUT_DORA.keys()]
