"""The layers that kohya's scripts train, and the number of steps."""

from collections.abc import Mapping
from typing import Any

from ..adapter import KOHYA
from .translation import Translation, is_off

# `network_args`: those that are translated or change nothing here, and those that are not, with the reason.
RATIOS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio")
TRANSLATED = (*RATIOS, "conv_dim", "conv_alpha", "algo", "preset", "verbose", "split_qkv", "dora_wd")
OF_LAYERS = "ranks of single layers are --rank_pattern, learning rates --lr_pattern"
OF_BLOCKS = "--target_modules names layers, --lora_blocks blocks of SD3"
DROPOUT = "--lora_dropout is the one dropout"
NOT_TRANSLATED = {
    "rank_dropout": DROPOUT,
    "module_dropout": DROPOUT,
    "loraplus_text_encoder_lr_ratio": "--loraplus_lr_ratio is for all adapters",
    "train_t5xxl": "T5 is never trained",
    "ggpo_beta": "gradients are not perturbed",
    "ggpo_sigma": "gradients are not perturbed",
    **dict.fromkeys(
        ("train_blocks", "train_block_indices", "train_double_block_indices", "train_single_block_indices"), OF_BLOCKS
    ),
    **dict.fromkeys(
        "block_dims block_alphas conv_block_dims conv_block_alphas down_lr_weight mid_lr_weight up_lr_weight "
        "block_lr_zero_threshold in_dims emb_dims network_reg_dims network_reg_lrs img_attn_dim img_mlp_dim "
        "img_mod_dim txt_attn_dim txt_mlp_dim txt_mod_dim single_dim single_mod_dim context_attn_dim context_mlp_dim "
        "context_mod_dim x_attn_dim x_mlp_dim x_mod_dim".split(),
        OF_LAYERS,
    ),
}
NO_ARGUMENT = "no such argument is known of kohya's networks"
MORE = "it also adapts conv_in, conv_out and time_embedding; name them in --target_modules beside kohya"
UNKNOWN = "the number of all steps is not known from max_train_steps; see --train_text_encoder_frac"


def adapted_layers(pairs: Mapping[str, str], given: Mapping[str, Any], lycoris: bool, out: Translation) -> None:
    """Translate which layers are adapted: in kohya's modules those of its list, in LyCORIS's those of a preset. LyCORIS
    adapts convolutions unless it is told not to, at the rank of all other layers.

    Args:
        pairs: `network_args` by name.

    Raises:
        ValueError: a rank or an alpha is no number.
    """
    preset = pairs.get("preset", "full") if lycoris else "attn-mlp"
    if preset == "attn-only":
        return
    out.assume(target_modules=[KOHYA])
    rank, alpha = (None if is_off(pairs.get(name)) else pairs[name] for name in ("conv_dim", "conv_alpha"))
    if lycoris and preset == "full":
        rank, alpha = rank or given.get("network_dim", 4), alpha or given.get("network_alpha", 1)
        out.not_used["network_args, preset full"] = MORE
    elif lycoris and preset not in ("attn-mlp", "unet-transformer-only"):
        out.not_used["network_args, preset"] = f"got {preset}; the layers of attn-mlp are adapted"
    if rank is not None and preset in ("full", "attn-mlp"):
        out.take("network_args, conv_dim", conv_rank=int(float(rank)))
        out.take("network_args, conv_alpha", conv_alpha=float(alpha or 1))


def last_step_of_encoders(given: Mapping[str, Any], out: Translation) -> None:
    """Translate `stop_text_encoder_training`: steps in the scripts, a percentage in the graphical program."""
    name = "stop_text_encoder_training"
    value = given.get(name)
    if is_off(value):
        return
    percent = str(value).endswith("%")
    total = 100 if percent else given.get("max_train_steps")
    if is_off(total) or (not percent and not is_off(given.get("max_train_epochs"))):
        out.not_used[name] = UNKNOWN
        return
    try:
        share = float(str(value).removesuffix("%")) / float(total or 1)
    except ValueError as error:
        out.problems.append(f"{name}: {error}")
        return
    if 0 < share < 1:
        out.take(name, train_text_encoder_frac=share)
    else:
        out.not_needed.append(name)
