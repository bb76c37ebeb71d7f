"""From options to a pipeline on its device, and to the optimizer."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoTokenizer

from .adapters import Adapters
from .loss import PREDICTION_TYPES
from .problems import BadInput, refuse

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def base_dtype(args: Namespace) -> torch.dtype:
    """Precision of the frozen base: the option, else what `accelerate launch` was configured with."""
    return DTYPES[args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")]


def load_pipeline(args: Namespace, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The base, on the CPU, without its safety checker.

    Raises:
        BadInput: it cannot be loaded, or is not what this trains.
    """
    name = args.pretrained_model_name_or_path
    tokenizer = {}
    try:
        if args.tokenizer_name:
            tokenizer["tokenizer"] = AutoTokenizer.from_pretrained(args.tokenizer_name, revision=args.revision)
        pipeline = DiffusionPipeline.from_pretrained(
            name,
            torch_dtype=dtype,
            revision=args.revision,
            variant=args.variant,
            safety_checker=None,
            requires_safety_checker=False,
            **tokenizer,
        )
    except OSError as error:
        raise BadInput([f"{name} cannot be loaded: {error}"]) from error
    refuse(model_problems(pipeline, args))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def model_problems(pipeline: DiffusionPipeline, args: Namespace) -> list[str]:
    name = args.pretrained_model_name_or_path
    if not isinstance(pipeline, StableDiffusionPipeline):
        return [f"{name} is a {type(pipeline).__name__}, wanted a StableDiffusionPipeline (1.x or 2.x)"]
    problems = []
    channels, latent_channels = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latent_channels:
        problems.append(
            f"{name}: the UNet takes {channels} channels and latents have {latent_channels}; wanted a text-to-image model"
        )
    if (kind := pipeline.scheduler.config.prediction_type) not in PREDICTION_TYPES:
        problems.append(f"{name} predicts {kind!r}, wanted {' or '.join(PREDICTION_TYPES)}")
    side = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if args.resolution % pipeline.vae_scale_factor:
        problems.append(f"--resolution: got {args.resolution}, wanted a multiple of {pipeline.vae_scale_factor}")
    elif args.resolution % side and args.resolution < side:
        problems.append(f"--resolution: got {args.resolution}, wanted at least {side} for this UNet")
    longest = pipeline.tokenizer.model_max_length
    if args.tokenizer_max_length and args.tokenizer_max_length > longest:
        problems.append(f"--tokenizer_max_length: got {args.tokenizer_max_length}, wanted at most {longest}")
    return problems


def training_scheduler(pipeline: StableDiffusionPipeline) -> DDPMScheduler:
    """The forward process of the base, zero-terminal SNR and prediction type included."""
    return DDPMScheduler.from_config(pipeline.scheduler.config)


def prepare_models(pipeline: StableDiffusionPipeline, args: Namespace, device: torch.device) -> None:
    """Switches of the models that leave their numbers alone."""
    pipeline.to(device)
    if args.enable_xformers_memory_efficient_attention:
        pipeline.unet.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            pipeline.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True


def make_optimizer(adapters: Adapters, args: Namespace, processes: int) -> torch.optim.Optimizer:
    """AdamW with one group for each component."""
    scale = args.train_batch_size * args.gradient_accumulation_steps * processes if args.scale_lr else 1
    rates = {"unet": args.learning_rate, "text_encoder": args.text_encoder_lr or args.learning_rate}
    groups = [
        {"params": list(adapters.named_parameters(component).values()), "lr": rates[component] * scale}
        for component in adapters.models
    ]
    settings: dict[str, Any] = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def make_lr_scheduler(optimizer: torch.optim.Optimizer, args: Namespace, max_train_steps: int) -> LRScheduler:
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def base_model_name(args: Namespace) -> str:
    """As it stands in a file header: a hub name, or the name of a folder without the machine's path to it."""
    path = Path(args.pretrained_model_name_or_path)
    return path.resolve().name if path.is_dir() else args.pretrained_model_name_or_path
