"""`--variant` held against the weight files of a model folder, by their names.

diffusers takes a component's files of the variant, else its plain ones; some component must have the variant.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ...utils.documents import parse_json
from ..options import DreamBoothOptions

PLAIN = "plain ones"
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([^.-]+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def variants_in(folder: Path) -> set[str]:
    """The weight files of a component."""
    names = [WEIGHTS.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return {match[1] or PLAIN for match in names if match}


def unused_parts(options: DreamBoothOptions) -> set[str]:
    """Components whose weights are not loaded."""
    unused = {"safety_checker"}
    unused |= {"vae"} if options.pretrained_vae_model_name_or_path else set()
    return unused | ({"text_encoder_3"} if options.skip_t5 else set())


def variant_problems(options: DreamBoothOptions) -> Iterator[str]:
    """Problems of `--variant` with a model folder. Nothing is known of a hub name before diffusers asks for it."""
    folder = Path(options.pretrained_model_name_or_path or "")
    try:
        index = parse_json((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # no folder, or named by other checks
        return
    if not isinstance(index, dict):
        return
    parts = {part: variants_in(folder / part) for part in index if part not in unused_parts(options)}
    parts = {part: there for part, there in parts.items() if there}
    everything = ", ".join(sorted(set().union(*parts.values()))) or "no weights at all"
    if options.variant and not any(options.variant in there for there in parts.values()):
        yield f"--variant: got {options.variant!r}, which no part of {folder} has; there: {everything}"
        return
    for part, there in parts.items():
        if PLAIN not in there and options.variant not in there:
            wanted = f"--variant {min(there)}"
            found = ", ".join(sorted(there))
            yield f"--variant: got {options.variant}, and the {part} in {folder} has {found}; {wanted}?"
