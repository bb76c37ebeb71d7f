"""The one configuration: PEFT's `LoraConfig` and what a shortcut adds to it.

    r, lora_alpha, target_modules, lora_dropout, use_rslora, rank_pattern, ...   as in PEFT
    shortcut, num_previous, merge_method, ...                                    see `reslora_diffusion.rules`

Everything is checked when the configuration is made, and every fault is in one message.
"""

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from peft import LoraConfig

from ..registration import register_with_peft
from ..rules import MergeMethod, Shortcut, ShortcutFields, faults


class PeftType(str, Enum):  # noqa: UP042 (`str()` of it is "PeftType.RESLORA", as PEFT's status takes it apart)
    """Our key in PEFT's tables of methods, whose own enumeration is closed."""

    RESLORA = "RESLORA"


@dataclass
class ResLoraConfig(ShortcutFields, LoraConfig):
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

    def __post_init__(self) -> None:
        if self.peft_type == "LORA":  # what `to_dict` made of a plain one
            self.shortcut = Shortcut.NONE
        if found := faults(vars(self)):
            raise ValueError("\n".join(["ResLoraConfig:", *(f"  - {fault}" for fault in found)]))
        self.shortcut, self.merge_method = Shortcut(self.shortcut), MergeMethod(self.merge_method)
        super().__post_init__()
        self.peft_type = PeftType.RESLORA

    def to_dict(self) -> dict[str, Any]:
        """All fields; where the adapter is a plain LoRA, those of `LoraConfig`, as diffusers takes them for
        `*_lora_adapter_metadata` and its loader hands them to `LoraConfig`."""
        found = super().to_dict()
        if self.effective_shortcut is not Shortcut.NONE or self.frozen_links or self.__dict__.get("_is_written"):
            return found
        ours = {item.name for item in fields(ShortcutFields)}
        return {name: value for name, value in found.items() if name not in ours} | {"peft_type": "LORA"}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` with all fields, also of a plain one."""
        self._is_written = True
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            del self._is_written

    @property
    def effective_shortcut(self) -> Shortcut:
        """`none` if no block is reached back to."""
        return Shortcut.NONE if self.num_previous == 0 else Shortcut(self.shortcut)


register_with_peft()  # the import of PEFT above came too early
