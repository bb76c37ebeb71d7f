"""What a run is about to do, printed before it does it; `--dry_run` stops after this."""

from argparse import Namespace
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from .checks import Plan
from .concepts import Concept
from .estimate import BACKWARD, Kept, on_paper
from .inventory import inventory
from .launcher import processes, world_size
from .loss import Denoiser
from .models import base_dtype
from .sampling import Batch

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


def memory(plan: Plan, args: Namespace) -> str:
    """What weights and optimizer take; activations depend on the device's kernels."""
    skeleton, each = plan.skeleton, base_dtype(args).itemsize
    parts = [skeleton.denoiser, *(skeleton.text_encoders.values() if args.train_text_encoder else ())]
    base = sum(parameter.numel() for part in parts for parameter in part.parameters())
    trained = skeleton.adapter_size(args)
    return (
        f"{trained:,} trained parameters, {trained * ADAPTER_BYTES / 1e6:,.1f} MB with gradients and moments, on "
        f"{base:,} frozen ones, {base * each / 1e6:,.1f} MB; activations come on top"
    )


def kept_for_backward(denoiser: Denoiser, batches: Sequence[Batch]) -> int:
    """Bytes that a training forward keeps, weights apart: most of what a step takes beyond the models."""
    kept = Kept(*denoiser.models)
    with kept.hooks():
        for batch in batches:
            denoiser.loss(batch, 1)
    return kept.bytes


def expectation(plan: Plan, args: Namespace, seconds: float, forwards: int, kept: int) -> str:
    """How long training will take, from the seconds that so many pictures took forwards, and what a forward keeps."""
    pictures = args.train_batch_size * args.gradient_accumulation_steps
    pictures *= 2 if any(concept.classes for concept in plan.concepts) else 1
    step = seconds / forwards * pictures * (1 + BACKWARD + args.gradient_checkpointing)
    return (
        f"expected: {step:.2g} s a step, {step * plan.max_train_steps / 60:.2g} minutes without validation "
        f"(from {forwards} pictures forwards); activations {kept / 1e6:,.1f} MB (what a training forward keeps)"
    )


def preflight(plan: Plan, args: Namespace, count: int | None = None) -> list[str]:
    """Lines on the whole run, of `count` processes (of as many as the launcher says, if not given)."""
    count = count or world_size()
    lines = [f"{args.pretrained_model_name_or_path}: {plan.skeleton.family.title}"]
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
    family = plan.skeleton.family
    guidance = family.training_guidance(plan.skeleton.denoiser.config, args)
    if guidance is not None:  # diffusers' script calls it --guidance_scale
        painted = f"pictures at {family.painting_guidance(args):g} (--guidance_scale)"
        lines.append(f"trained at guidance {guidance:g} (--training_guidance_scale), {painted}")
    lines.append(memory(plan, args))
    return lines + ([on_paper(plan, args)] if args.dry_run else [])  # a run measures instead, once models are loaded
