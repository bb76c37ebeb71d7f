"""The data of a checkpoint, and what of them has changed: images, captions, masks, repeats.

A run may go on with other images, as when some are added; it is then no longer the run that was begun, which is said.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from ...utils.problems import listing
from ..data.concepts import Concept
from ..data.scan import ScannedImage

PARTS = ("image", "caption", "mask", "repeats")  # of an entry, in this order
DIGITS = 16
Data = dict[str, list[str]]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def entry(image: ScannedImage, prompt: str | None, repeats: int) -> list[str]:
    mask = digest(image.mask.read_bytes()) if image.mask else ""
    text = image.caption or prompt or ""
    return [image.digest[:DIGITS], digest(text.encode("utf-8", "surrogatepass")), mask, str(repeats)]


def data_of(concepts: Sequence[Concept]) -> Data:
    """An entry for each image, by its subject, role and name."""
    found = {}
    for number, concept in enumerate(concepts, 1):
        for image in concept.instance.images:
            name = f"instance {number}/{image.path.name}"
            found[name] = entry(image, concept.instance_prompt, concept.repeats)
        for image in concept.validation.images if concept.validation else ():
            found[f"validation {number}/{image.path.name}"] = entry(image, concept.instance_prompt, 1)
        for image in concept.classes.images if concept.classes else ():
            found[f"class {number}/{image.path.name}"] = entry(image, concept.class_prompt, 1)
    return found


def data_changes(was: object, now: Data) -> Iterator[str]:
    """Lines on what differs from the data of a checkpoint. Checkpoints of earlier versions do not say theirs."""
    if not isinstance(was, Mapping):
        return
    if added := [name for name in now if name not in was]:
        yield f"{len(added)} images were added since the checkpoint: {listing(added)}"
    if removed := [name for name in was if name not in now]:
        yield f"{len(removed)} images of the checkpoint are gone: {listing(removed)}"
    for place, part in enumerate(PARTS):
        differ = [name for name in now if name in was and was[name][place : place + 1] != now[name][place : place + 1]]
        if differ:
            yield f"changed since the checkpoint, {part}: {listing(differ)}"
