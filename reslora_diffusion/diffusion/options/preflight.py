"""What a run is about to do, printed before it does it; `--dry_run` stops after this."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ...rules import ShortcutFields
from ...utils.environment import is_installed
from ..data.concepts import Concept
from ..data.sampling import Batch
from ..models.estimate import BACKWARD, Kept, on_paper
from ..models.load import base_dtype
from ..objective.loss import Denoiser
from ..train.checkpoints import find_checkpoint
from ..train.optimizers import learning_rate_factor, name_of
from ..train.record import changes
from . import DreamBoothOptions
from .checks import Plan
from .inventory import inventory
from .launcher import processes, world_size
from .model_checks import adapter_settings

FEW = 50  # steps in which no subject is learnt
ADAPTER_BYTES = 16  # float32: weight, gradient, and two moments of Adam


def cut_off(concept: Concept, plan: Plan) -> Iterator[str]:
    """Prompts that the text encoders will not see the end of."""
    prompts = [concept.instance_prompt, *(picture.caption for picture in concept.instance.pictures)]
    prompts += [concept.class_prompt] if concept.classes else []
    for prompt in filter(None, dict.fromkeys(prompts)):
        lost = max(tokens_cut_off(tokenizer, prompt, length) for tokenizer, length in plan.skeleton.windows)
        if lost:
            yield f"{lost} tokens cut off the end of {prompt[:60]!r}"


def tokens_cut_off(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> int:
    return max(0, len(tokenizer(prompt, truncation=False, verbose=False).input_ids) - length)


def memory(plan: Plan, args: DreamBoothOptions) -> str:
    """What weights and optimizer take; activations depend on the device's kernels."""
    skeleton, each = plan.skeleton, base_dtype(args).itemsize
    parts = [skeleton.denoiser, *(skeleton.text_encoders.values() if args.train_text_encoder else ())]
    base = sum(parameter.numel() for part in parts for parameter in part.parameters())
    trained = skeleton.adapter_size(args)
    return (
        f"{trained:,} trained parameters, {trained * ADAPTER_BYTES / 1e6:,.1f} MB with gradients and moments, on "
        f"{base:,} frozen ones, {base * each / 1e6:,.1f} MB; activations come on top"
    )


def training(plan: Plan, args: DreamBoothOptions, count: int) -> Iterator[str]:
    """Lines on the device, the adapters and the optimizer."""
    precision = str(base_dtype(args)).removeprefix("torch.")
    yield f"on {PartialState().device}: the frozen base in {precision}, adapters in float32"
    yield adapter_line(args)
    yield optimizer_line(args, count)
    if args.resume_from_checkpoint and (found := find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)):
        for name, was, now in changes(args, found):
            yield f"continued with --{name} {now}; {found.name} had {was}"


def adapter_line(args: DreamBoothOptions) -> str:
    """Which adapter is trained, of what size."""
    defaults: dict[str, Any] = {item.name: item.default for item in fields(ShortcutFields)}
    settings = defaults | adapter_settings(args)
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if args.use_rslora else rank)
    if args.method == "lora":
        kind = "LoRA"
    else:
        reach = settings["num_previous"]
        kind = f"ResLoRA, shortcut {settings['shortcut']}, num_previous {'all' if reach is None else reach}"
    where = " and text encoders" if args.train_text_encoder else ""
    others = [f"--{name}" for name in ("rank_pattern", "alpha_pattern") if getattr(args, name)]
    apart = f", except for {' and '.join(others)}" if others else ""
    return f"{kind}: rank {rank}, lora_alpha {alpha:g}, scale {scale:g}{apart}; on the denoiser{where}"


def optimizer_line(args: DreamBoothOptions, count: int) -> str:
    """Which optimizer trains it, at what rates."""
    rate = args.learning_rate * learning_rate_factor(args, count)
    parts = [f"learning rate {rate:g}"]
    if args.train_text_encoder:
        parts.append(f"of the text encoders {args.text_encoder_lr or rate:g}")
    parts.append(f"weight decay {args.adam_weight_decay:g}")
    if args.train_text_encoder and args.adam_weight_decay_text_encoder is not None:
        parts.append(f"of the text encoders {args.adam_weight_decay_text_encoder:g}")
    parts += [f"--{name} {value}" for name in ("loraplus_lr_ratio", "lr_pattern") if (value := getattr(args, name))]
    warm = f" with {args.lr_warmup_steps} steps of warm-up" if args.lr_scheduler != "constant" else ""
    return f"optimizer {name_of(args)}: {', '.join(parts)}; schedule {args.lr_scheduler}{warm}"


def kept_for_backward(denoiser: Denoiser, batches: Sequence[Batch]) -> int:
    """Bytes that a training forward keeps, weights apart: most of what a step takes beyond the models."""
    kept = Kept(*denoiser.models)
    with kept.hooks():
        for batch in batches:
            denoiser.loss(batch, 1)
    return kept.bytes


def expectation(plan: Plan, args: DreamBoothOptions, seconds: float, forwards: int, kept: int) -> str:
    """How long training will take, from the seconds that so many pictures took forwards, and what a forward keeps."""
    pictures = args.train_batch_size * args.gradient_accumulation_steps
    pictures *= 2 if any(concept.classes for concept in plan.concepts) else 1
    step = seconds / forwards * pictures * (1 + BACKWARD + args.gradient_checkpointing)
    return (
        f"expected: {step:.2g} s a step, {step * plan.max_train_steps / 60:.2g} minutes without validation "
        f"(from {forwards} pictures forwards); activations {kept / 1e6:,.1f} MB (what a training forward keeps)"
    )


def not_installed(args: DreamBoothOptions) -> list[str]:
    """What a run does without, as nobody asked for it and its package is an extra."""
    lines = []
    if tracker_of(args) != args.report_to:
        lines.append(f"{args.report_to} is not installed, so nothing is logged to it: pip install {args.report_to}")
    if not is_installed("matplotlib"):
        lines.append("matplotlib is not installed, so no loss.png is drawn: pip install matplotlib")
    return lines


def tracker_of(args: DreamBoothOptions) -> str:
    """`--report_to`, or "none" for a default whose package is not installed."""
    default = "report_to" not in args.given
    return "none" if default and args.report_to != "none" and not is_installed(args.report_to) else args.report_to


def preflight(plan: Plan, args: DreamBoothOptions, count: int | None = None) -> list[str]:
    """Lines on the whole run, of `count` processes (of as many as the launcher says, if not given)."""
    count = count or world_size()
    family = plan.skeleton.family
    lines = [
        f"{args.pretrained_model_name_or_path}: {family.title}; options that are not given have the defaults of "
        "diffusers' script for it"
    ]
    lines += inventory(plan.concepts, args, plan.buckets)
    for concept in plan.concepts:
        lines += cut_off(concept, plan)
    batch = args.train_batch_size * args.gradient_accumulation_steps * count
    classes = any(concept.classes for concept in plan.concepts)
    joined = f", with as many class pictures (weight {args.prior_loss_weight})" if classes else ""
    lines += processes(count)
    lines.append(
        f"{plan.max_train_steps} steps of {batch} pictures{joined}: "
        f"{plan.max_train_steps / plan.steps_per_epoch:.1f} passes of {plan.steps_per_epoch} steps"
    )
    if plan.max_train_steps < FEW and not args.given & {"max_train_steps", "num_train_epochs"}:
        lines.append(
            f"{plan.max_train_steps} steps are few: without --max_train_steps a run is one pass over the data; a "
            "subject takes some hundreds"
        )
    lines += training(plan, args, count)
    denoiser: Any = plan.skeleton.denoiser
    guidance = family.training_guidance(denoiser.config, args)
    if guidance is not None:
        lines.append(
            f"trained at guidance {guidance:g} (--training_guidance_scale, diffusers' --guidance_scale), images at "
            f"{family.painting_guidance(args):g} (--validation_guidance_scale)"
        )
    lines += not_installed(args)
    lines.append(memory(plan, args))
    return lines + ([on_paper(plan, args)] if args.dry_run else [])  # a run measures instead, once models are loaded
