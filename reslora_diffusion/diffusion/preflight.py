"""What a run is about to do, printed before it does it; `--dry_run` stops after this."""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from ..problems import listing
from .buckets import nearest
from .checks import Plan
from .concepts import Concept
from .data import Scan
from .estimate import BACKWARD, Kept, on_paper
from .loss import Denoiser
from .sampling import Batch

BYTES = {"fp16": 2, "bf16": 2}
ADAPTER_BYTES = 16  # float32: weight, gradient, and two moments of Adam


def describe(found: Scan, title: str, prompt: str | None, plan: Plan) -> Iterator[str]:
    """Lines on one folder of pictures; `prompt` is for those without a caption."""
    captions = len(found.pictures) - len(found.uncaptioned)
    yield f"{title}: {len(found.pictures)} pictures in {found.folder}, {captions} with captions of their own"
    if captions and found.uncaptioned:
        yield f"  without a caption, or with an empty one: {listing(found.uncaptioned)}"
    if found.uncaptioned and prompt:
        yield f"  prompt{' of those' if captions else ''}: {prompt!r}"
    if found.skipped:
        yield f"  skipped: {listing(f'{name} ({reason})' for name, reason in found.skipped.items())}"
    for names in found.duplicates:
        yield f"  identical: {listing(names)}"
    boxes = [nearest(picture.size, plan.buckets) for picture in found.pictures]
    small = [
        picture.path.name
        for picture, box in zip(found.pictures, boxes, strict=True)
        if any(have < wanted for have, wanted in zip(picture.size, box, strict=True))
    ]
    if small:
        yield f"  smaller than they are trained at, enlarged: {listing(small)}"
    if len(plan.buckets) > 1:
        counts = Counter(f"{width}x{height}" for width, height in boxes)
        yield f"  sizes: {listing((f'{count} of {size}' for size, count in counts.most_common()), 10)}"
    if masked := sum(picture.mask is not None for picture in found.pictures):
        yield f"  masks: {masked}"


def cut_off(concept: Concept, plan: Plan) -> Iterator[str]:
    """Prompts that the text encoders will not see the end of."""
    prompts = [concept.instance_prompt, *(picture.caption for picture in concept.instance.pictures)]
    prompts += [concept.class_prompt] if concept.classes else []
    for prompt in filter(None, dict.fromkeys(prompts)):
        lost = max(tokens_cut_off(tokenizer, prompt, length) for tokenizer, length in plan.skeleton.windows)
        if lost:
            yield f"  {lost} tokens cut off the end of {prompt[:60]!r}"


def tokens_cut_off(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> int:
    return max(0, len(tokenizer(prompt, truncation=False, verbose=False).input_ids) - length)


def memory(plan: Plan, args: Namespace) -> str:
    """What weights and optimizer take; activations depend on the device's kernels."""
    skeleton, each = plan.skeleton, BYTES.get(args.mixed_precision, 4)
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


def preflight(plan: Plan, args: Namespace, processes: int = 1) -> list[str]:
    """Lines on the whole run."""
    lines = [f"{args.pretrained_model_name_or_path}: {plan.skeleton.family.title}"]
    for concept in plan.concepts:
        lines += describe(concept.instance, "instance", concept.instance_prompt, plan)
        if concept.repeats > 1:
            lines.append(f"  each {concept.repeats} times a pass")
        lines += cut_off(concept, plan)
        if concept.classes:
            lines += describe(concept.classes, "class", concept.class_prompt, plan)
            missing = concept.num_class_images - len(concept.classes.pictures)
            lines += [f"  {missing} more will be made from {concept.class_prompt!r}"] if missing > 0 else []
    if not args.with_prior_preservation:
        unused = [f"--{name}" for name in ("class_data_dir", "class_prompt") if getattr(args, name)]
        lines += [f"not used without --with_prior_preservation: {listing(unused)}"] if unused else []
    batch = args.train_batch_size * args.gradient_accumulation_steps * processes
    classes = any(concept.classes for concept in plan.concepts)
    joined = f", with as many class pictures (weight {args.prior_loss_weight})" if classes else ""
    lines.append(
        f"{plan.max_train_steps} steps of {batch} pictures{joined}: "
        f"{plan.max_train_steps / plan.steps_per_epoch:.1f} passes of {plan.steps_per_epoch} steps"
    )
    lines.append(memory(plan, args))
    return lines + ([on_paper(plan, args)] if args.dry_run else [])  # a run measures instead, once models are loaded
