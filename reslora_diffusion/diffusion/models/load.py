"""Load the pipeline that the options name, move it to its device, and free what training does not need."""

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from reslora_diffusion.export.single_file import is_single_file, load_single_file, read_single_file

from ...utils.problems import BadInput, refuse
from ...weights import broken_model
from ..options import DreamBoothOptions
from ..options.launcher import shards
from ..train.distributed import shard
from .architecture import family_of
from .attn_processor import set_attn_processors
from .families import Family
from .families.clip import leave_out_layers
from .memory import save_memory
from .meta_pipeline import given_base
from .quantising import pipeline_quantisation, quantisation_of

OF_T5 = ("text_encoder_3", "tokenizer_3")
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def base_dtype(options: DreamBoothOptions) -> torch.dtype:
    """Precision of the frozen base: the option, else what `accelerate launch` was configured with."""
    return DTYPES[options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")]


def load_pipeline(options: DreamBoothOptions, dtype: torch.dtype) -> DiffusionPipeline:
    """The base, on the CPU, without its safety checker.

    Raises:
        BadInput: it cannot be loaded.
    """
    for library in (diffusers, transformers):  # a bar for each component, done before it can be read
        library.utils.logging.disable_progress_bar()
    name, given = options.pretrained_model_name_or_path, dict[str, Any]()
    try:
        if options.tokenizer_name:
            given["tokenizer"] = AutoTokenizer.from_pretrained(options.tokenizer_name, revision=options.revision)
        index = DiffusionPipeline.load_config(options.config_source, revision=options.revision)
        if index["_class_name"] == "StableDiffusionPipeline":
            given |= {"safety_checker": None, "requires_safety_checker": False}
        given |= {part: None for part in OF_T5 if part in index and (options.skip_t5 or index[part][0] is None)}
        if options.pretrained_vae_model_name_or_path:
            coder: Any = getattr(diffusers, family_of(index, str(name)).vae_class)
            given["vae"] = coder.from_pretrained(options.pretrained_vae_model_name_or_path, dtype=dtype)
        if is_single_file(name):
            found, quantised = read_single_file(str(name)), options.quantization
            own = {"quantization_config": quantisation_of(quantised, dtype)} if quantised else {}
            pipeline = load_single_file(found, options.config_source, dtype, own, **given)
        else:
            if options.quantization:
                denoiser = next(part for part in ("transformer", "unet") if part in index)
                given["quantization_config"] = pipeline_quantisation(options.quantization, denoiser, dtype)
            pipeline = DiffusionPipeline.from_pretrained(
                name,
                dtype=dtype,
                revision=options.revision,
                variant=options.variant,
                **given,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput([f"{name} cannot be loaded: {error}"]) from error
    refuse(f"{name}: {problem}" for problem in broken_weights(pipeline))
    pipeline.set_progress_bar_config(disable=True)
    if options.skip_clip_layers:
        leave_out_layers(pipeline.text_encoder, options.skip_clip_layers)
    return pipeline


def broken_weights(pipeline: DiffusionPipeline) -> Iterator[str]:
    """Problems with the numbers in a base."""
    for part, model in pipeline.components.items():
        if isinstance(model, nn.Module):
            yield from broken_model(model, part)


def refuse_base(options: DreamBoothOptions, dtype: torch.dtype, loss: float) -> None:
    """Raise `BadInput` if the loss of the untouched base is not finite: no learning rate would help."""
    if not math.isfinite(loss):
        name, precision = options.pretrained_model_name_or_path, str(dtype).removeprefix("torch.")
        wanted = "--mixed_precision no" if dtype == torch.bfloat16 else "--mixed_precision bf16 or no"
        wanted = "images and prompts that it can be computed on" if dtype == torch.float32 else wanted
        refuse([f"{name}: its loss is {loss} in {precision} before anything is trained; wanted {wanted}"])


def prepare_models(
    pipeline: DiffusionPipeline,
    family: Family,
    trained: dict[str, nn.Module],
    options: DreamBoothOptions,
    device: torch.device,
) -> None:
    """Move to the device, and set the switches that leave the numbers alone."""
    denoiser = family.denoiser_of(pipeline)
    if shards():
        for part, component in pipeline.components.items():
            if isinstance(component, nn.Module) and part != family.denoiser:
                component.to(device)
        shard(denoiser, device)
    else:
        pipeline.to(device)
    if options.enable_xformers_memory_efficient_attention:
        denoiser.enable_xformers_memory_efficient_attention()
    on_gpu = device.type == "cuda"
    if on_gpu if options.fused_attention is None else options.fused_attention:
        set_attn_processors(denoiser)
    if on_gpu if options.low_memory_layers is None else options.low_memory_layers:
        save_memory(denoiser)
    if options.gradient_checkpointing:
        for model in trained.values():
            # Where nothing is random no generator's state is kept: reading it would break a CUDA graph.
            how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws(model)}
            if isinstance(model, ModelMixin):
                model.enable_gradient_checkpointing(partial(checkpoint, **how))
            else:  # transformers 5 renamed it
                enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable(how)
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True


def draws(model: nn.Module) -> bool:
    """Return whether a training forward draws random numbers: dropout of the adapters or of the base."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or getattr(model.config, "attention_dropout", 0) > 0


def release(pipeline: DiffusionPipeline, trained: dict[str, nn.Module], keep_vae: bool) -> None:
    """Free what only encodes: frozen text encoders, and the autoencoder unless `keep_vae`."""
    for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
        if name not in trained and getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, None)
    if keep_vae:
        pipeline.vae.to("cpu")
    else:
        pipeline.vae = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def base_model_name(options: DreamBoothOptions) -> str:
    """The base as a file header names it: a hub name, or a folder's name without the machine's path to it."""
    name = given_base(options)
    return Path(name).resolve().name if Path(name).is_dir() else name
