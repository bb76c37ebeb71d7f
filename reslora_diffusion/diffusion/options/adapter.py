"""Options on the adapters: which layers they are put on, their size, their shortcut and its merge."""

from dataclasses import dataclass
from typing import Literal

from ...methods.schedules.settings import SCHEDULES
from ...rules import MergeMethod, Shortcut
from ...utils.options import option
from .model import FLUX, FROZEN_TEXT, LUMINA_2

KOHYA = "kohya"  # as a target module: the layers that kohya's scripts train


@dataclass
class AdapterOptions:
    """Adapters."""

    method: str = option(
        "reslora",
        "reslora, or lora: plain LoRA in the same training loop.",
        choices=("lora", "reslora"),
        binds=True,
    )
    shortcut: str | None = option(
        None, "Residual path between the adapters of consecutive layers.", choices=tuple(map(str, Shortcut)), binds=True
    )
    num_previous: int | Literal["all"] | None = option(
        None, "Earlier layers of a chain that a shortcut reaches back to, or all.", at_least=0, binds=True
    )
    merge_method: str | None = option(
        None, "How input and middle become a plain LoRA.", choices=tuple(map(str, MergeMethod))
    )
    calibration_batches: int = option(16, "Training batches that the merge is fitted on.", at_least=1)
    distillation_steps: int | None = option(
        None, "Steps in which the merged model is trained to predict what the unmerged one does.", at_least=1
    )
    handover: float | None = option(
        None,
        "Share of the steps after which the shortcut is folded into plain LoRA, such as 0.85.",
        above=0,
        below=1,
        binds=True,
    )
    schedule: str | None = option(
        None,
        f"What changes while training: {', '.join(SCHEDULES)}; with settings as in restart:stages=3 (docs/methods.md).",
        binds=True,
        in_header=True,
    )
    compare: list[str] | None = option(
        None, "Train each of lora, lora+rite, reslora-block+coto, ... on the same draws and compare them."
    )
    rank: int = option(4, "Rank of the adapters.", at_least=1, binds=True, kohya={"network_dim": ""})
    lora_alpha: float | None = option(
        None,
        "The adapters are scaled by lora_alpha / rank (default: the rank).",
        above=0,
        binds=True,
        families={kind: 4.0 for kind in (FLUX, *FROZEN_TEXT) if kind != LUMINA_2},
        kohya={"network_alpha": "whose default is 1 in kohya's scripts and --rank here"},
    )
    use_rslora: bool = option(False, "Scale the adapters by lora_alpha / sqrt(rank).", binds=True)
    use_dora: bool = option(
        False,
        "Train the length of each row of the adapted weights apart from its direction (DoRA; shortcuts none, block).",
        binds=True,
        in_header=True,
    )
    lora_dropout: float = option(
        0.0,
        "Dropout on the input of the adapters.",
        at_least=0,
        below=1,
        binds=True,
        kohya={"network_dropout": "which drops inputs of lora_A; kohya's drops its outputs"},
    )
    target_modules: list[str] | None = option(
        None,
        "Names of adapted layers of the UNet or transformer, as in PEFT (default: projections of attention, and some "
        "layers of FLUX.1's feed-forward blocks); kohya stands for those that kohya's scripts train.",
        aliases=("lora_layers",),
        binds=True,
    )
    conv_rank: int | None = option(
        None,
        "UNets: adapt residual blocks and samplers too (LoCon), their convolutions of more than a pixel at this rank.",
        at_least=1,
        binds=True,
        in_header=True,
    )
    conv_alpha: float | None = option(
        None,
        "lora_alpha of the layers that have --conv_rank (default: that rank).",
        above=0,
        binds=True,
        in_header=True,
    )
    lora_blocks: list[int] | None = option(
        None, "SD3: adapters in these transformer blocks alone, such as 12,30.", binds=True
    )
    train_text_encoder: bool = option(False, "Put adapters on the CLIP text encoders too.", binds=True)
    train_text_encoder_frac: float = option(
        1.0,
        "Share of the steps in which the text encoders are trained, from the first step on.",
        above=0,
        at_most=1,
        binds=True,
        in_header=True,
    )
    text_encoder_target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        "Names of adapted layers of the text encoders; kohya stands for attention and feed-forward blocks.",
        binds=True,
    )
    rank_pattern: dict[str, int] = option({}, "Rank of the layers that match a regular expression.", binds=True)
    alpha_pattern: dict[str, float] = option(
        {}, "lora_alpha of the layers that match a regular expression.", above=0, binds=True
    )
    lr_pattern: dict[str, float] = option(
        {}, "Factor on the learning rate of the layers that match a regular expression.", at_least=0
    )
    network_weights: str | None = option(None, "Start from this LoRA, written by any program (with --method lora).")
    scale_weight_norms: float | None = option(None, "Largest norm of the update of a layer; 1.0 is usual.", above=0)
    use_ema: bool = option(False, "Validate and export a moving average of the adapters.", binds=True)
    ema_decay: float = option(0.99, "Decay of the moving average.", at_least=0, below=1, binds=True)
