"""`--optimizer` on every command line: those that see both factors of a LoRA, and what they do not go with. The methods
themselves are `methods.optimizers`.

Known without torch.
"""

from collections.abc import Iterable

PAIR_OPTIMIZERS = {
    "rite": "steps that do not depend on how B A is split (LoRA-RITE)",
    "pro": "gradients nearest to that of the whole matrix (LoRA-Pro)",
    "scaled_adamw": "AdamW on preconditioned gradients (Riemannian)",
    "reflora": "AdamW on the gradients that balanced factors would have (RefLoRA)",
}
SHARDED = "products of whole factors are needed, and each process has parts of them; wanted DDP or one process"
CONFLICTS = {  # of all of them, by the names of `methods.table.FEATURES`
    "loraplus": "LoRA+ trains lora_A and lora_B at two rates, and a pair is moved as one; wanted no LoRA+",
    "cuda_graph": "a step looks at values on the host, which a recording would not do again; wanted no --cuda_graph",
    "deepspeed": SHARDED,
    "fsdp": SHARDED,
    "middle": "with `middle` one lora_B multiplies the lora_A of several layers, so a pair is not the matrix that is "
    "learned; wanted shortcut none, input or block",
    "dora": "DoRA's magnitude scales the pair's product, which this update takes for the whole change; wanted no DoRA",
}


def optimizer_conflicts(optimizer: str | None, features: Iterable[str]) -> list[str]:
    """Return why an optimizer cannot be combined with features of a run."""
    reasons = CONFLICTS if optimizer in PAIR_OPTIMIZERS else {}
    return [f"--optimizer {optimizer}: {reasons[name]}" for name in features if name in reasons]
