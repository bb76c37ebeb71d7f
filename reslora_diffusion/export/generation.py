"""`generation_config.json` beside the LoRA of a language model: the tokens that answers were taught to end with.

A training writes it (`llm.models.save_generation`). Without it generation runs on past every answer, so it goes where
the LoRA goes: into a merged model, and into a folder that the LoRA is converted, resized or exported to.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..utils.documents import parse_json
from ..utils.files import write_bytes
from .header import PEFT_FILE, reading

GENERATION = "generation_config.json"


def taught(source: str | Path) -> Path:
    """Return the path of the generation settings beside a LoRA: a folder, or its `adapter_model.safetensors`."""
    source = Path(source)
    return (source.parent if source.name == PEFT_FILE else source) / GENERATION


def carry_generation(sources: Sequence[str | Path], output: str | Path) -> None:
    """Copy it to another folder of PEFT; of several LoRAs, if they agree."""
    found = {path.read_bytes() for source in sources if (path := taught(source)).is_file()}
    if len(found) == 1:
        write_bytes(Path(output) / GENERATION, found.pop())


def take_generation(source: Path, fused: Path) -> str | None:
    """Let a fused model generate as its LoRA's says; return the tokens that the base's does not stop at."""
    if not taught(source).is_file():
        return None
    before = end_tokens(fused / GENERATION) or end_tokens(fused / "config.json")
    shutil.copyfile(taught(source), fused / GENERATION)
    return ", ".join(str(token) for token in end_tokens(taught(source)) if token not in before) or None


def end_tokens(config: Path) -> list[int]:
    """The tokens that a configuration ends generation at."""
    if not config.is_file():
        return []
    with reading(config):
        stated = parse_json(config.read_text(encoding="utf-8")).get("eos_token_id")
    return [] if stated is None else stated if isinstance(stated, list) else [stated]
