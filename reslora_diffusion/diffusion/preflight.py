"""What a run is about to do, printed before it does it; `--dry_run` stops after this."""

from argparse import Namespace
from collections.abc import Iterator

from .checks import Plan
from .data import Scan
from .problems import listing


def describe(found: Scan, title: str, resolution: int) -> Iterator[str]:
    """Lines on one folder of pictures."""
    captions = len(found.pictures) - len(found.uncaptioned)
    yield f"{title}: {len(found.pictures)} pictures in {found.folder}, {captions} with captions of their own"
    if found.skipped:
        yield f"  skipped: {listing(f'{name} ({reason})' for name, reason in found.skipped.items())}"
    for names in found.duplicates:
        yield f"  identical: {listing(names)}"
    if small := found.smaller_than(resolution):
        yield f"  smaller than {resolution} pixels, enlarged: {listing(small)}"


def preflight(plan: Plan, args: Namespace, processes: int = 1) -> list[str]:
    """Lines on the whole run."""
    lines = list(describe(plan.instance, "instance", args.resolution))
    if plan.class_pictures:
        lines += describe(plan.class_pictures, "class", args.resolution)
        missing = args.num_class_images - len(plan.class_pictures.pictures)
        lines += [f"  {missing} more will be made from {args.class_prompt!r}"] if missing > 0 else []
    else:
        unused = [f"--{name}" for name in ("class_data_dir", "class_prompt") if getattr(args, name)]
        lines += [f"not used without --with_prior_preservation: {listing(unused)}"] if unused else []
    batch = args.train_batch_size * args.gradient_accumulation_steps * processes
    joined = f", with as many class pictures (weight {args.prior_loss_weight})" if plan.class_pictures else ""
    lines.append(
        f"{plan.max_train_steps} steps of {batch} pictures{joined}: "
        f"{plan.max_train_steps / plan.steps_per_epoch:.1f} epochs of {plan.steps_per_epoch}"
    )
    return lines
