"""The contents of a run's folders, which are printed first of all, and also when something else is wrong.

No torch in here: it should be there at once.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from ...utils.problems import listing
from ..data.buckets import Buckets, Size
from ..data.concepts import Concept
from ..data.scan import Scan
from . import DreamBoothOptions

NAMED = 20  # images that one line names


def inventory(concepts: Sequence[Concept], options: DreamBoothOptions, buckets: list[Size]) -> list[str]:
    """Lines on every folder; `buckets` is empty where the sizes to train at are unknown."""
    lines: list[str] = []
    for concept in concepts:
        sizes = concept.buckets or Buckets(tuple(buckets))
        if concept.instance.folder.is_dir():  # what is missing is a problem, and there is nothing to tell of it
            lines += describe(concept.instance, "instance", concept.instance_prompt, sizes)
        if concept.repeats > 1 and concept.instance.images:
            lines.append(f"  each {concept.repeats} times a pass")
        if kept := [image.path.name for image in concept.validated]:
            lines.append(f"  {len(kept)} held out for validation: {listing(kept, NAMED)}")
        if concept.classes:
            lines += describe(concept.classes, "class", concept.class_prompt, sizes)
            missing = concept.num_class_images - len(concept.classes.images)
            if missing > 0 and concept.class_prompt:
                lines.append(f"  {missing} more will be made from {concept.class_prompt!r}")
    if not options.with_prior_preservation:
        unused = [f"--{name}" for name in ("class_data_dir", "class_prompt") if getattr(options, name)]
        lines += [f"not used without --with_prior_preservation: {listing(unused)}"] if unused else []
    return lines


def describe(found: Scan, title: str, prompt: str | None, buckets: Buckets) -> Iterator[str]:
    """Lines on one folder of images; `prompt` is for those without a caption."""
    bare = found.uncaptioned
    captions = len(found.images) - len(bare)
    yield f"{title}: {len(found.images)} images in {found.folder}, {captions} with captions of their own"
    if captions and bare:
        falls = f"fall back to the prompt {prompt!r}" if prompt else "have no prompt to fall back to"
        yield f"  {len(bare)} without a caption, or with an empty one, {falls}: {listing(bare, NAMED)}"
    elif bare and prompt:
        yield f"  prompt: {prompt!r}"
    if found.skipped:
        yield f"  skipped: {listing((f'{name} ({reason})' for name, reason in found.skipped.items()), NAMED)}"
    yield from describe_colours(found)
    for names in found.duplicates:
        yield f"  identical: {listing(names)}"
    if buckets.sizes or buckets.no_upscale:
        yield from describe_sizes(found, buckets)
    if masked := sum(image.mask is not None for image in found.images):
        yield f"  masks: {masked}"


def describe_colours(found: Scan) -> Iterator[str]:
    """Lines on the images whose numbers are not taken for sRGB, or are although their profile is another."""
    converted = Counter(image.profile for image in found.images if image.profile)
    if converted:
        profiles = listing(f"{count} from {profile}" for profile, count in converted.most_common())
        yield f"  converted to sRGB by their colour profiles: {converted.total()} ({profiles})"
    faults = [f"{image.path.name} ({image.colour_fault})" for image in found.images if image.colour_fault]
    if faults:
        yield f"  taken for sRGB: {listing(faults)}"


def describe_sizes(found: Scan, buckets: Buckets) -> Iterator[str]:
    boxes = [buckets.of(image.size) for image in found.images]
    small = [
        image.path.name
        for image, box in zip(found.images, boxes, strict=True)
        if any(have < wanted for have, wanted in zip(image.size, box, strict=True))
    ]
    if small:
        yield f"  smaller than they are trained at, enlarged: {listing(small)}"
    if len(buckets.sizes) > 1 or buckets.no_upscale:
        counts = Counter(f"{width}x{height}" for width, height in boxes)
        yield f"  sizes: {listing((f'{count} of {size}' for size, count in counts.most_common()), 10)}"
