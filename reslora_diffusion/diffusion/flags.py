"""The flags of DreamBooth training: those of diffusers' `train_dreambooth_lora.py`, of its siblings, and ours.

Names of a feature are diffusers' where one of its scripts has it, else kohya's. The defaults of the method itself live
in `ResLoraConfig`; `None` here means "not given".
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

SWITCH = argparse.BooleanOptionalAction  # --flag, --no-flag, so that the command line can win over a file
NOT_SUPPORTED = {
    "use_dora": "its norms of whole weights do not go together with a path between layers; --use_rslora does",
    "do_edm_style_training": "the noise levels are those of the model's own schedule",
    "enable_npu_flash_attention": "no such device was ever tested",
    "text_encoder_use_attention_mask": "only DeepFloyd's T5 uses one; Stable Diffusion's pipelines never pass it",
    "class_labels_conditioning": "only DeepFloyd's upscaler has class labels",
    "validation_images": "it serves DeepFloyd's upscaler; Stable Diffusion is validated by --validation_prompt",
}
KOHYA_NAMES = {  # of kohya's flags, what says the same here
    "train_data_dir": "--instance_data_dir",
    "reg_data_dir": "--with_prior_preservation --class_data_dir",
    "dataset_config": "--concepts",
    "enable_bucket": "--aspect_ratio_buckets auto",
    "flip_aug": "--random_flip",
    "masked_loss": "--mask_data_dir, or --alpha_mask",
    "cache_latents_to_disk": "--encoding_cache_dir",
    "cache_text_encoder_outputs_to_disk": "--encoding_cache_dir",
    "max_data_loader_n_workers": "--dataloader_num_workers",
    "vae": "--pretrained_vae_model_name_or_path",
    "xformers": "--enable_xformers_memory_efficient_attention",
    "network_dim": "--rank",
    "network_alpha": "--lora_alpha",
    "network_dropout": "--lora_dropout",
    "unet_lr": "--learning_rate",
    "optimizer_type": "--optimizer",
    "max_train_epochs": "--num_train_epochs",
    "min_snr_gamma": "--snr_gamma",
    "v_parameterization": "--prediction_type v_prediction",
    "zero_terminal_snr": "--rescale_betas_zero_snr",
    "save_every_n_steps": "--checkpointing_steps",
    "save_every_n_epochs": "--checkpointing_steps",
    "resume": "--resume_from_checkpoint",
    "output_name": "--export_name",
    "sample_prompts": "--validation_prompt",
    "sample_every_n_steps": "--validation_steps",
    "sample_every_n_epochs": "--validation_epochs",
}


def int_or_all(text: str) -> int | str:
    return text if text == "all" else int(text)


def setting(text: str) -> tuple[str, str]:
    """`name=value`."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted name=value")
    return name, value


def comma_separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> str:
    """`12,30`, kept as text, as a configuration file has it."""
    if not all(part.isdigit() for part in comma_separated(text)) or not comma_separated(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted numbers with commas between them")
    return text


def truth(text: str) -> bool:
    """As in `--flag=True`, which diffusers' scripts take for some switches."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted True or False")
    return words[text.lower()]


def numbered(kind: type) -> Callable[[str], tuple[str, Any]]:
    """Of `name=number`."""

    def parse(text: str) -> tuple[str, Any]:
        name, value = setting(text)
        return name, kind(value)

    parse.__name__ = f"name={kind.__name__}"  # argparse prints it
    return parse


def add_diffusers_flags(parser: argparse.ArgumentParser) -> None:
    """By name, default and meaning as in diffusers' script."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained_model_name_or_path",
        help="folder or hub name of a Stable Diffusion 1.x, 2.x, XL, 3 or FLUX.1 pipeline",
    )
    add("--revision", help="of the model on the hub")
    add("--variant", help="of the weight files, such as fp16")
    add("--tokenizer_name", help="folder or hub name, if the tokenizer is not the pipeline's")
    add("--tokenizer_max_length", type=int, help="tokens of a prompt (default: the tokenizer's own)")
    add("--enable_xformers_memory_efficient_attention", action=SWITCH, default=False, help="needs xformers")

    add = parser.add_argument_group("data").add_argument
    add(
        "--instance_data_dir", help="pictures of the subject; captions from <picture>.txt or metadata.jsonl beside them"
    )
    add("--instance_prompt", help="the prompt of pictures without a caption of their own")
    add("--with_prior_preservation", action=SWITCH, default=False, help="also train on pictures of the class")
    add("--class_data_dir", help="pictures of the class; those that are missing are made there")
    add("--class_prompt", help="the prompt of class pictures without a caption, and what missing ones are made from")
    add("--num_class_images", type=int, default=100, help="wanted in all; missing ones are made")
    add("--prior_loss_weight", type=float, default=1.0, help="weight of the class pictures in the loss")
    add("--prior_generation_precision", help="no, fp32, fp16 or bf16 (default: fp16 on a GPU, else fp32)")
    add("--sample_batch_size", type=int, default=4, help="class pictures made at once")
    add("--resolution", type=int, default=512, help="side of the squares that are trained on, in pixels")
    add("--center_crop", action=SWITCH, default=False, help="instead of random crops")
    add("--dataloader_num_workers", type=int, default=0, help="threads that decode pictures while latents are cached")

    add = parser.add_argument_group("adapter").add_argument
    add("--rank", type=int, default=4, help="of the adapters")
    add("--lora_dropout", type=float, default=0.0, help="on the input of lora_A")
    add("--train_text_encoder", action=SWITCH, default=False, help="adapters on the text encoder too")
    add("--pre_compute_text_embeddings", action=SWITCH, default=False, help="done whenever the text encoder is frozen")

    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=int, default=4, help="of each process; as many class pictures join them")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches to an optimizer step")
    add("--num_train_epochs", type=int, default=1, help="passes over the data")
    add("--max_train_steps", type=int, help="optimizer steps; overrides --num_train_epochs")
    add("--learning_rate", type=float, default=5e-4, help="of the UNet")
    add("--scale_lr", action=SWITCH, default=False, help="times batch size, accumulation and processes")
    add(
        "--lr_scheduler",
        default="constant",
        help="constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial",
    )
    add("--lr_warmup_steps", type=int, default=500, help="of schedules that warm up")
    add("--lr_num_cycles", type=int, default=1, help="of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="of polynomial")
    add("--use_8bit_adam", action=SWITCH, default=False, help="the same as --optimizer adamw8bit")
    add("--adam_beta1", type=float, default=0.9, help="of optimizers that have it")
    add("--adam_beta2", type=float, default=0.999, help="of optimizers that have it")
    add("--adam_weight_decay", type=float, default=1e-2, help="of optimizers that have it")
    add("--adam_epsilon", type=float, default=1e-8, help="of optimizers that have it")
    add("--max_grad_norm", type=float, default=1.0, help="longer gradients are shortened to it")
    add("--gradient_checkpointing", action=SWITCH, default=False, help="less memory for a third more time")
    add("--mixed_precision", help="no, fp16 or bf16: precision of the frozen base; adapters are always float32")
    add("--allow_tf32", action=SWITCH, default=False, help="faster float32 on NVIDIA GPUs since Ampere")
    add("--seed", type=int, help="drawn and recorded if not given")
    add("--local_rank", type=int, default=-1, help="set by launchers")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="lora-dreambooth-model", help="where everything goes; see the top of the script")
    add("--checkpointing_steps", type=int, default=500, help="steps from checkpoint to checkpoint")
    add("--checkpoints_total_limit", type=int, help="older checkpoints are removed")
    add("--resume_from_checkpoint", help="a checkpoint folder, or latest")
    add("--validation_prompt", nargs="+", help="one or more prompts to paint at the start, on schedule and at the end")
    add("--num_validation_images", type=int, default=4, help="pictures for each prompt")
    add("--validation_epochs", type=int, default=50, help="passes from validation to validation")
    add("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all or none")
    add("--logging_dir", default="logs", help="inside --output_dir")
    add("--push_to_hub", action=SWITCH, default=False, help="upload the exported files at the end")
    add("--hub_token", help="better log in by `hf auth login`")
    add("--hub_model_id", help="(default: name of --output_dir)")

    group = parser.add_argument_group("not supported, because")
    for name, reason in NOT_SUPPORTED.items():
        group.add_argument(f"--{name}", nargs="*", help=reason)


def add_sibling_flags(parser: argparse.ArgumentParser) -> None:
    """What diffusers' SDXL, SD3 and Flux scripts have besides."""
    add = parser.add_argument_group("of diffusers' sibling scripts").add_argument
    add("--dataset_name", help="pictures of a dataset of the hub, or of a folder that `datasets` reads")
    add("--dataset_config_name", help="of the dataset, if it has several")
    add("--image_column", help="of the dataset (default: the first that holds pictures)")
    add("--caption_column", help="of the dataset (default: every picture has --instance_prompt)")
    add("--cache_dir", help="for downloaded datasets (default: that of `datasets`)")
    add(
        "--lora_layers",
        dest="target_modules",
        type=comma_separated,
        default=argparse.SUPPRESS,
        help="--target_modules with commas between them",
    )
    add("--lora_blocks", type=numbers, help="SD3: 12,30: adapters in these transformer blocks alone")
    add("--adam_weight_decay_text_encoder", type=float, help="(default: --adam_weight_decay)")
    add("--prodigy_beta3", type=float, help="of prodigy (default: sqrt(adam_beta2))")
    for name in ("decouple", "use_bias_correction", "safeguard_warmup"):
        add(f"--prodigy_{name}", type=truth, nargs="?", const=True, default=True, help="of prodigy")
        add(f"--no-prodigy_{name}", dest=f"prodigy_{name}", action="store_false", help=argparse.SUPPRESS)
    add("--cache_latents", action=SWITCH, default=False, help="always done")
    add("--output_kohya_format", action=SWITCH, default=False, help="always done")
    add(
        "--upcast_before_saving",
        dest="save_precision",
        action="store_const",
        const="fp32",
        default=argparse.SUPPRESS,
        help="--save_precision fp32",
    )


def add_our_flags(parser: argparse.ArgumentParser) -> None:
    """Names of diffusers' sibling scripts or of kohya's where they have one."""
    add = parser.add_argument_group("ResLoRA").add_argument
    add("--method", default="reslora", help="reslora, or lora: plain LoRA through the same loop")
    add("--shortcut", help="input, block, middle or none")
    add("--num_previous", type=int_or_all, help="earlier layers of a chain that a shortcut reaches back to, or all")
    add("--merge_method", help="least_squares, paper_input, paper_weight or drop")
    add("--calibration_batches", type=int, default=16, help="training batches the merge is fitted on")
    add("--distillation_steps", type=int, help="steps in which the merged model is taught what the unmerged one says")
    add("--handover", type=float, help="share of the steps after which the shortcut is folded into plain LoRA; 0.85")
    add("--compare", nargs="+", help="train each of lora, reslora-input, reslora-block, ... on the same draws")

    add = parser.add_argument_group("more on the model").add_argument
    add(
        "--pretrained_vae_model_name_or_path",
        help="an autoencoder of the same latents, such as SDXL's for fp16",
    )
    add("--clip_skip", type=int, help="last layers of CLIP to leave out, as in diffusers: kohya's 2 is 1; SD 1.x, 2.x")
    add(
        "--skip_t5", action=SWITCH, default=False, help="SD3: without the largest text encoder, T5, which may be absent"
    )
    add("--max_sequence_length", type=int, help="tokens of a prompt that T5 is given (default: SD3 77, FLUX.1 512)")

    add = parser.add_argument_group("more on adapters").add_argument
    add("--lora_alpha", type=float, help="scaling is lora_alpha / rank (default: rank)")
    add("--network_weights", help="start from this LoRA, of any program (plain LoRA: --method lora)")
    add("--use_rslora", action=SWITCH, default=False, help="scaling is lora_alpha / sqrt(rank)")
    add("--target_modules", nargs="+", help="of the UNet or transformer, as in PEFT (default: attention's projections)")
    add(
        "--text_encoder_target_modules",
        nargs="+",
        default=["q_proj", "k_proj", "v_proj", "out_proj"],
        help="of the text encoder, as in PEFT",
    )
    add("--rank_pattern", nargs="+", type=numbered(int), default=[], help="regex=rank of some layers, as in PEFT")
    add(
        "--alpha_pattern",
        nargs="+",
        type=numbered(float),
        default=[],
        help="regex=lora_alpha of some layers, as in PEFT",
    )
    add(
        "--lr_pattern",
        nargs="+",
        type=numbered(float),
        default=[],
        help="regex=factor on the learning rate of some layers",
    )
    add("--scale_weight_norms", type=float, help="largest norm of a layer's update; 1.0 is usual")
    add("--use_ema", action=SWITCH, default=False, help="validate and export a moving average of the adapter")
    add("--ema_decay", type=float, default=0.99, help="of the moving average")

    add = parser.add_argument_group("speed and memory").add_argument
    add("--fused_attention", action=SWITCH, help="q, k and v of an attention share a product (default: on a GPU)")
    add("--frugal_layers", action=SWITCH, help="frozen layers keep less for backward (default: on a GPU)")
    add("--compile", action=SWITCH, default=False, help="torch.compile: slow to begin, then faster steps")
    add("--cuda_graph", action=SWITCH, default=False, help="launch each step whole, as CUDA graphs; more memory")

    add = parser.add_argument_group("more on data").add_argument
    add("--concepts", type=Path, help="yaml, json or toml list of concepts, each with data folders and prompts")
    add("--repeats", type=int, default=1, help="times that a pass over the data shows each instance picture")
    add(
        "--image_interpolation_mode",
        default="lanczos",
        help="bilinear, bicubic, box, hamming, lanczos, nearest or nearest_exact",
    )
    add("--caption_extension", default=".txt", help="of the text files that hold captions; kohya's default is .caption")
    add("--shuffle_caption", action=SWITCH, default=False, help="captions of tags, with commas, in up to 8 orders each")
    add("--keep_tokens", type=int, default=0, help="first tags of a caption that stay in front")
    add("--validation_split", type=float, default=0.0, help="share of the pictures to hold out, and to validate on")
    add("--random_flip", action=SWITCH, default=False, help="every picture also mirrored")
    add("--crops_per_image", type=int, default=4, help="random crops cached of each picture that has room for them")
    add("--aspect_ratio_buckets", help="auto, or 'height,width;height,width': train each picture in its own shape")
    add("--caption_dropout_rate", type=float, default=0.0, help="share of draws that see the empty prompt")
    add("--mask_data_dir", help="grey masks with the stems of the instance pictures: what the loss counts")
    add(
        "--encoding_cache_dir", help="keep latents and embeddings here from run to run, by content (default: in memory)"
    )
    add("--alpha_mask", action=SWITCH, default=False, help="the loss counts what is opaque in a picture")

    add = parser.add_argument_group("more on training").add_argument
    add("--optimizer", default="adamw", help="adamw8bit, adafactor, prodigy, or the name of any optimizer of torch")
    add("--optimizer_args", nargs="+", type=setting, default=[], help="name=value, for the optimizer")
    add("--text_encoder_lr", type=float, help="learning rate of the text encoder (default: --learning_rate)")
    add("--loraplus_lr_ratio", type=float, help="factor on the learning rate of lora_B; 16 is usual")
    add("--prediction_type", help="epsilon or v_prediction (default: the model's own)")
    add("--rescale_betas_zero_snr", action=SWITCH, help="(default: the model's own)")
    add("--loss_type", default="l2", help="l2, huber or smooth_l1")
    add("--huber_c", type=float, default=0.1, help="error from which huber and smooth_l1 grow linearly")
    add("--huber_schedule", default="snr", help="constant, exponential or snr: how huber_c depends on the timestep")
    add(
        "--weighting_scheme",
        help="of flows: none, sigma_sqrt, logit_normal, mode or cosmap (default: SD3 logit_normal, FLUX.1 none)",
    )
    add("--logit_mean", type=float, help="of logit_normal (default: 0)")
    add("--logit_std", type=float, help="of logit_normal (default: 1)")
    add("--mode_scale", type=float, help="of mode (default: 1.29)")
    add(
        "--precondition_outputs",
        type=int,
        help="of flows: 1: the loss is of x_0; 0: of the velocity (default: SD3 1, FLUX.1 0)",
    )
    add(
        "--training_guidance_scale",
        type=float,
        help="FLUX.1-dev: what it is told of guidance while it trains; 1 is usual too (default: 3.5)",
    )
    add("--snr_gamma", type=float, help="min-SNR weighting of the loss; 5.0 is usual")
    add("--debiased_estimation_loss", action=SWITCH, default=False, help="debiased weighting of the loss")
    add("--noise_offset", type=float, default=0.0, help="noise shared by the pixels of a channel; 0.05 is usual")

    add = parser.add_argument_group("more on output").add_argument
    add("--config", type=Path, help="yaml, json or toml file of these options by name; the command line wins")
    add("--dry_run", action=SWITCH, default=False, help="say what would be trained on, and stop")
    add("--validation_steps", type=int, help="validate every N steps; overrides --validation_epochs")
    add("--num_inference_steps", type=int, default=25, help="of validation and class pictures")
    add("--guidance_scale", type=float, help="of validation and class pictures (default: FLUX.1 3.5, others 7.5)")
    add("--save_precision", default="fp16", help="of the exported files: fp32, fp16 or bf16")
    add("--export_name", help="of the file for ComfyUI and A1111 (default: name of --output_dir)")
