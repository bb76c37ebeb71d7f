"""The plan of a run, printed before anything is done; `--dry_run` stops after this."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ...methods.advice import clipping_note
from ...rules import ShortcutFields
from ...utils.environment import is_installed
from ..data.concepts import Concept, options_of
from ..data.prompts import read_prompts
from ..data.sampling import Batch
from ..data.wordings import wordings
from ..models.estimate import BACKWARD, SavedForBackward, on_paper
from ..models.load import base_dtype
from ..models.quantising import stored_bytes
from ..objective.loss import Denoiser
from ..train.checkpoints import find_checkpoint
from ..train.optimizers import learning_rate_factor, name_of
from ..train.record import changes
from . import DreamBoothOptions
from .inventory import inventory
from .launcher import processes, world_size
from .model_checks import adapter_settings
from .plan import Plan
from .token_checks import described

ADAPTER_BYTES = 16  # float32: weight, gradient, and two moments of Adam


def cut_off(concept: Concept, plan: Plan, options: DreamBoothOptions) -> Iterator[str]:
    """Prompts that the text encoders will not see the end of."""
    prompts = [concept.instance_prompt, *(image.caption for image in concept.instance.images)]
    prompts += [concept.class_prompt] if concept.classes else []
    own = options_of(concept.own, options)
    for prompt in filter(None, dict.fromkeys(prompts)):
        read = [options.worded(one) for one in (wordings(prompt, own) if own.enable_wildcard else [prompt])]
        lost = max(plan.base.family.tokens_cut_off(plan.base.windows, one, options) for one in read)
        if lost:
            yield f"{lost} tokens cut off the end of {prompt[:60]!r}"


def memory(plan: Plan, options: DreamBoothOptions) -> str:
    """Return the memory that weights and optimizer take; activations depend on the device's kernels."""
    base = plan.base
    texts = [*base.text_encoders.values()] if options.trains_text else []
    frozen = sum(parameter.numel() for part in (base.denoiser, *texts) for parameter in part.parameters())
    held = stored_bytes(base.denoiser, base_dtype(options), options.quantization)
    held += sum(stored_bytes(part, base_dtype(options), None) for part in texts)
    own = f" ({options.quantization} where they are of linear layers)" if options.quantization else ""
    trained = base.adapter_size(options) + base.new_token_size(options)
    rest = "T5, its new tokens and activations" if options.enable_t5_ti else "activations"
    return (
        f"{trained:,} trained parameters, {trained * ADAPTER_BYTES / 1e6:,.1f} MB with gradients and moments, on "
        f"{frozen:,} frozen ones, {held / 1e6:,.1f} MB{own}; {rest} come on top"
    )


def training(plan: Plan, options: DreamBoothOptions, count: int) -> Iterator[str]:
    """Lines on the device, the adapters and the optimizer."""
    precision = str(base_dtype(options)).removeprefix("torch.")
    held = f", its linear layers in {options.quantization}" if options.quantization else ""
    yield f"on {PartialState().device}: the frozen base in {precision}{held}, adapters in float32"
    yield adapter_line(options)
    yield from described(options, plan.base.family.token_encoders(options))
    yield optimizer_line(options, count)
    if note := clipping_note(options.optimizer, options.max_grad_norm):
        yield note
    if options.resume_from_checkpoint and (
        found := find_checkpoint(Path(options.output_dir), options.resume_from_checkpoint)
    ):
        for name, was, now in changes(options, found):
            yield f"continued with --{name} {now}; {found.name} had {was}"


def adapter_line(options: DreamBoothOptions) -> str:
    """Return the line on the adapter that is trained and its size."""
    defaults: dict[str, Any] = {item.name: item.default for item in fields(ShortcutFields)}
    settings = defaults | adapter_settings(options)
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if options.use_rslora else rank)
    if options.method == "lora":
        kind = "LoRA"
    else:
        reach = settings["num_previous"]
        kind = f"ResLoRA, shortcut {settings['shortcut']}, num_previous {'all' if reach is None else reach}"
    share = (
        "" if options.train_text_encoder_frac == 1 else f" in the first {options.train_text_encoder_frac:.0%} of steps"
    )
    where = f" and text encoders{share}" if options.train_text_encoder else ""
    others = [f"--{name}" for name in ("rank_pattern", "alpha_pattern", "conv_rank") if getattr(options, name)]
    apart = f", except for {' and '.join(others)}" if others else ""
    return f"{kind}: rank {rank}, lora_alpha {alpha:g}, scale {scale:g}{apart}; on the denoiser{where}"


def optimizer_line(options: DreamBoothOptions, count: int) -> str:
    """Return the line on the optimizer and its rates."""
    rate = options.learning_rate * learning_rate_factor(options, count)
    parts = [f"learning rate {rate:g}"]
    trained = "new tokens" if options.train_text_encoder_ti else "text encoders"
    if options.trains_text:
        parts.append(f"of the {trained} {options.text_encoder_lr or rate:g}")
    parts.append(f"weight decay {options.adam_weight_decay:g}")
    if options.trains_text and options.adam_weight_decay_text_encoder is not None:
        parts.append(f"of the {trained} {options.adam_weight_decay_text_encoder:g}")
    parts += [f"--{name} {value}" for name in ("loraplus_lr_ratio", "lr_pattern") if (value := getattr(options, name))]
    length = options.lr_warmup_steps
    warm = f"{100 * length:g} % of the steps" if 0 < length < 1 else f"{length} steps"
    warm = f" with {warm} of warm-up" if options.lr_scheduler != "constant" else ""
    return f"optimizer {name_of(options)}: {', '.join(parts)}; schedule {options.lr_scheduler}{warm}"


def kept_for_backward(denoiser: Denoiser, batches: Sequence[Batch]) -> int:
    """Bytes that a training forward keeps, weights apart: most of what a step takes beyond the models."""
    kept = SavedForBackward(*denoiser.models)
    with kept.hooks():
        for batch in batches:
            denoiser.loss(batch, 1)
    return kept.bytes


def expectation(plan: Plan, options: DreamBoothOptions, seconds: float, forwards: int, kept: int) -> str:
    """Return the expected time of the training, from the seconds that `forwards` images took, and the activations."""
    images = options.train_batch_size * options.gradient_accumulation_steps
    images *= 2 if any(concept.classes for concept in plan.concepts) else 1
    step = seconds / forwards * images * (1 + BACKWARD + options.gradient_checkpointing)
    return (
        f"expected: {step:.2g} s a step, {step * plan.max_train_steps / 60:.2g} minutes without validation "
        f"(from {forwards} images forwards); activations {kept / 1e6:,.1f} MB (what a training forward keeps)"
    )


def not_installed(options: DreamBoothOptions) -> list[str]:
    """Name the extras that a run does without, since nobody asked for them and their packages are missing."""
    lines = []
    if tracker_of(options) != options.report_to:
        lines.append(
            f"{options.report_to} is not installed, so nothing is logged to it: pip install {options.report_to}"
        )
    if not is_installed("matplotlib"):
        lines.append("matplotlib is not installed, so no loss.png is drawn: pip install matplotlib")
    return lines


def tracker_of(options: DreamBoothOptions) -> str:
    """`--report_to`, or "none" for a default whose package is not installed."""
    default = "report_to" not in options.given
    return (
        "none" if default and options.report_to != "none" and not is_installed(options.report_to) else options.report_to
    )


def preflight(plan: Plan, options: DreamBoothOptions, count: int | None = None) -> list[str]:
    """Lines on the whole run, of `count` processes (of as many as the launcher says, if not given)."""
    count = count or world_size()
    family = plan.base.family
    lines = [
        f"{options.pretrained_model_name_or_path}: {family.title}; options that are not given have the defaults of "
        "diffusers' script for it"
    ]
    lines += options.notes
    lines += inventory(plan.concepts, options, plan.buckets)
    for concept in plan.concepts:
        lines += cut_off(concept, plan, options)
    batch = options.train_batch_size * options.gradient_accumulation_steps * count
    classes = any(concept.classes for concept in plan.concepts)
    joined = f", with as many class images (weight {options.prior_loss_weight})" if classes else ""
    lines += processes(count)
    lines.append(
        f"{plan.max_train_steps} steps of {batch} images{joined}: "
        f"{plan.max_train_steps / plan.steps_per_epoch:.1f} passes of {plan.steps_per_epoch} steps"
    )
    if not options.given & {"max_train_steps", "num_train_epochs"}:
        lines.append(
            f"{plan.max_train_steps} steps are chosen, as --max_train_steps is not given: 100 for each image, at least "
            "500 and at most 2,000, as in diffusers' examples (500 steps for five images)"
        )
    lines += training(plan, options, count)
    denoiser: Any = plan.base.denoiser
    guidance = family.training_guidance(denoiser.config, options)
    if guidance is not None:
        lines.append(
            f"trained at guidance {guidance:g} (--training_guidance_scale, diffusers' --guidance_scale), images at "
            f"{family.validation_guidance(options):g} (--validation_guidance_scale)"
        )
    if options.sample_prompts:
        lines += read_prompts(options.sample_prompts).not_used
    lines += not_installed(options)
    lines.append(memory(plan, options))
    return lines + (
        [on_paper(plan, options)] if options.dry_run else []
    )  # a run measures instead, once models are loaded
