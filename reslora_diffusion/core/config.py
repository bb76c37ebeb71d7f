"""The one configuration: PEFT's `LoraConfig` and what a shortcut adds to it.

    r, lora_alpha, target_modules, lora_dropout, use_rslora, rank_pattern, ...   as in PEFT
    shortcut       which residual path joins the blocks of a chain while training
    num_previous   m, how many earlier blocks it reaches back to; None for all of them
    merge_method   how `input` and `middle`, which no plain LoRA equals, are turned into one

Everything is checked when the configuration is made, and every fault is in one message.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from peft import LoraConfig

FORMAT_VERSION = 1  # of saved configurations and calibrations; a newer one is refused


class PeftType(StrEnum):
    """Our key in PEFT's tables of methods, whose own enumeration is closed."""

    RESLORA = "RESLORA"


class Shortcut(StrEnum):
    """Where the residual path of a block starts (arXiv 2402.18039, section 3.2); see `core.functional`."""

    NONE = "none"
    INPUT = "input"
    BLOCK = "block"
    MIDDLE = "middle"


class MergeMethod(StrEnum):
    """How a shortcut that depends on activations becomes a plain LoRA; see `core.merging`."""

    LEAST_SQUARES = "least_squares"
    PAPER_INPUT = "paper_input"
    PAPER_WEIGHT = "paper_weight"
    DROP = "drop"


# Options of PEFT that change what one block computes, in a way that a shortcut between blocks does not share.
VARIANTS = (
    "use_dora",
    "use_qalora",
    "arrow_config",
    "use_bdlora",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# Initialisations with B A != 0 that take the difference out of the base weights of the same layer.
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "mica")


@dataclass
class ResLoraConfig(LoraConfig):
    """Configuration of ResLoRA adapters, for `get_peft_model`, `model.add_adapter` and `attach`.

    Args:
        shortcut: `input`, `block`, `middle`, or `none` for plain LoRA on the same code path.
        num_previous: how many earlier blocks of its chain a block reaches back to; 0 is plain LoRA, None is all.
            `input` reaches back one block.
        merge_method: `least_squares`, `paper_input`, `paper_weight` or `drop`; `block` and `none` merge exactly.
        same_resolution_only: cut `block` chains where the number of tokens changes. The other shortcuts always are.

    Raises:
        ValueError: one message with every fault.
    """

    shortcut: Shortcut | str = field(
        default=Shortcut.INPUT, metadata={"help": "Residual path between blocks: input, block, middle or none."}
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
    reslora_version: int = field(default=FORMAT_VERSION, metadata={"help": "Format of this configuration."})

    def __post_init__(self) -> None:
        if faults := self._faults():
            raise ValueError("\n".join(["ResLoraConfig:", *(f"  - {fault}" for fault in faults)]))
        self.shortcut, self.merge_method = Shortcut(self.shortcut), MergeMethod(self.merge_method)
        super().__post_init__()
        self.peft_type = PeftType.RESLORA

    @property
    def effective_shortcut(self) -> Shortcut:
        """`none` if no block is reached back to."""
        return Shortcut.NONE if self.num_previous == 0 else Shortcut(self.shortcut)

    def _faults(self) -> list[str]:
        faults = []
        for name, kind in (("shortcut", Shortcut), ("merge_method", MergeMethod)):
            if (value := getattr(self, name)) not in set(kind):
                faults.append(f"{name}: got {value!r}, wanted {', '.join(kind)}")
        count = self.num_previous
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            faults.append(f"num_previous: got {count!r}, wanted 0, 1, 2, ... or None for all")
        elif self.shortcut == Shortcut.INPUT and count not in (0, 1):
            faults.append(f"num_previous: got {count!r}, wanted 1 or 0: shortcut 'input' reaches back one block")
        if not isinstance(self.r, int) or self.r < 1:
            faults.append(f"r: got {self.r!r}, wanted 1 or more")
        if not 0 <= self.lora_dropout < 1:
            faults.append(f"lora_dropout: got {self.lora_dropout!r}, wanted 0 or more and below 1")
        if bad := {name: rank for name, rank in (self.rank_pattern or {}).items() if rank < 1}:
            faults.append(f"rank_pattern: got {bad}, wanted ranks of 1 or more")
        faults += [
            f"{name}: got {getattr(self, name)!r}, which does not combine with a shortcut; use PEFT's LoraConfig"
            for name in VARIANTS
            if getattr(self, name, None)
        ]
        if self.lora_bias:
            faults.append("lora_bias: got True, wanted False: a bias has no place in the merged factors")
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE):
            faults.append(f"init_lora_weights: got {init!r}, which changes the base weights; wanted True or 'gaussian'")
        if self.reslora_version > FORMAT_VERSION:
            faults.append(
                f"reslora_version: got {self.reslora_version}, this package reads up to {FORMAT_VERSION}; update it"
            )
        return faults
