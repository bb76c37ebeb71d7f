"""DreamBooth's measures (arXiv 2208.12242, 5.2), with a CLIP and a DINO that are on this machine already.

    CLIP-I   mean cosine between image embeddings of an image and of every reference
    DINO     the same with a DINO's class token (the paper: ViT-S/16)
    CLIP-T   cosine between the embeddings of an image and of its prompt

The first two are of the prompts with the subject's word: an adapter that puts the subject into every image is not
to gain by it.

Models are folders or names in the local cache of the hub; nothing is downloaded, nothing but safetensors is opened.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

from .compare import Cell
from .foreign import parsed_json
from .measures import Measure, is_of

LOCAL = {"local_files_only": True, "use_safetensors": True}


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class Clip:
    """Unit embeddings of images and of texts, in one space."""

    def __init__(self, name: str):
        self.model = AutoModel.from_pretrained(name, **LOCAL).eval()
        self.processor = AutoProcessor.from_pretrained(name, local_files_only=True)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(images=[i.convert("RGB") for i in images], return_tensors="pt").pixel_values
        return unit(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return unit(self.model.text_projection(self.model.text_model(**tokens).pooler_output))


class Dino:
    """Unit class tokens of images."""

    def __init__(self, name: str):
        self.model = AutoModel.from_pretrained(name, **LOCAL).eval()
        self.processor = AutoImageProcessor.from_pretrained(name, local_files_only=True)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(images=[i.convert("RGB") for i in images], return_tensors="pt").pixel_values
        return unit(self.model(pixels).last_hidden_state[:, 0])


def at_hand() -> tuple[list[str], list[str]]:
    """Names of the CLIPs and of the DINOs in the hub's local cache."""
    found: dict[str, list[str]] = {"clip": [], "dino": []}
    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return [], []
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        files = {file.file_name: file.file_path for revision in repository.revisions for file in revision.files}
        if "config.json" in files and any(name.endswith(".safetensors") for name in files):
            kind = kind_of(files["config.json"], repository.repo_id)
            found.get(kind, []).append(repository.repo_id)
    return found["clip"], found["dino"]


def kind_of(config: Path, name: str) -> str:
    """ "clip" and "dino"; empty for anything else. The first DINO says only that it is a ViT."""
    try:
        model = parsed_json(config.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return ""
    if model == "vit" and "dino" not in name.lower():
        return ""
    return {"clip": "clip", "vit": "dino", "dinov2": "dino"}.get(model, "")


def load(clip: str, dino: str) -> tuple[Clip | None, Dino | None]:
    """The models that are named.

    Raises:
        ValueError: which of them is not on this machine.
    """
    models, problems = [], []
    for kind, name in ((Clip, clip.strip()), (Dino, dino.strip())):
        try:
            models.append(kind(name) if name else None)
        except (OSError, ValueError) as error:
            problems.append(f"{kind.__name__} {name!r} cannot be opened here: {str(error).splitlines()[0]}")
    if problems:
        raise ValueError("\n".join(problems))
    return models[0], models[1]


def learned_measures(
    cells: Sequence[Cell],
    references: Sequence[Image.Image],
    subject_word: str,
    clip: Clip | None,
    dino: Dino | None,
) -> list[Measure]:
    """The measures of the models given."""
    of_subject = [cell for cell in cells if is_of(subject_word, cell.row.prompt)]
    found = []
    for name, model in (("CLIP-I", clip), ("DINO", dino)):
        if model and references:
            embedded = model.images(references).T
            found.append(
                cosines(name, of_subject, lambda own, m=model, e=embedded: (m.images(own_images(own)) @ e).mean(1))
            )
    if clip:
        found.append(
            cosines(
                "CLIP-T",
                cells,
                lambda own: (clip.images(own_images(own)) * clip.texts([c.row.prompt for c in own])).sum(1),
            )
        )
    return found


def own_images(cells: Sequence[Cell]) -> list[Image.Image]:
    return [cell.image for cell in cells]


def cosines(name: str, cells: Sequence[Cell], embed: Callable[[list[Cell]], Tensor]) -> Measure:
    """A measure in [-1, 1], computed a column at a time."""
    measure = Measure(name, "needs prompts of the subject", least=-1.0)
    for column in dict.fromkeys(cell.column for cell in cells):
        own = [cell for cell in cells if cell.column == column]
        measure.values[column] = dict(zip((cell.row for cell in own), embed(own).tolist(), strict=True))
    return measure
