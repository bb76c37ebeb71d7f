"""A training state on disk says what it holds, so that a damaged one is found before anything is trained on it.

    state.safetensors    tensors
    state.json           facts, "tensors": {"sha256": ..., "shapes": {name: shape}}, and "sha256" of all of these

`write_facts` seals a state, `fault_of_state` says what is wrong with one. States of earlier versions have no checksums;
of those only the sizes are compared. The standard library is enough for this: checkpoints are looked at before torch is
imported.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from .documents import parse_json
from .files import write_text
from .problems import BAD_DATA

TENSORS, FACTS = "state.safetensors", "state.json"


class BrokenState(ValueError):
    """A training state that is not what was written."""


def sha256_of(path: Path) -> str:
    """The digest of a file. It is computed once for each content, as far as time and size of the file tell."""
    found = path.stat()
    return digest(str(path), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=256)
def digest(path: str, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shapes_in(path: Path) -> dict[str, list[int]]:
    """Shapes by name, from the header of a safetensors file.

    Raises:
        BrokenState: there is no header, or the file has another size than it says.
    """
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if length > size:
                raise BrokenState(f"{path.name} is cut off")
            header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: list(entry["shape"]) for name, entry in header.items()}
    except (OSError, *BAD_DATA) as error:
        raise BrokenState(f"{path.name} cannot be read: {type(error).__name__}") from error
    if end != size:
        raise BrokenState(f"{path.name} is cut off")
    return shapes


def seal_of(facts: dict[str, Any]) -> str:
    """A digest of all facts but the seal itself."""
    text = json.dumps({name: value for name, value in facts.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write the facts of a state beside its tensors, with what is needed to check both."""
    path = folder / TENSORS
    facts = json.loads(json.dumps(facts)) | {"tensors": {"sha256": sha256_of(path), "shapes": shapes_in(path)}}
    write_text(folder / FACTS, json.dumps(facts | {"sha256": seal_of(facts)}, indent=2))


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a state.

    Raises:
        BrokenState: they are missing, or not what was written.
    """
    try:
        facts = parse_json((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenState(f"{FACTS} cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise BrokenState(f"{FACTS} holds no facts")
    sealed = "sha256" in facts or "tensors" in facts  # states of earlier versions have neither
    if sealed and facts.get("sha256") != seal_of(facts):
        raise BrokenState(f"{FACTS} was changed after it was written")
    return facts


def check_state(folder: Path) -> dict[str, Any]:
    """The facts of a state whose tensors are those that were written.

    Raises:
        BrokenState: says what is damaged or missing.
    """
    facts = read_facts(folder)
    shapes, wanted = shapes_in(folder / TENSORS), facts.get("tensors")
    if isinstance(wanted, dict):
        if absent := sorted(wanted["shapes"].keys() - shapes.keys()):
            raise BrokenState(f"{TENSORS} lacks {', '.join(absent[:3])}{' and more' if len(absent) > 3 else ''}")
        if unlike := [name for name in shapes if wanted["shapes"].get(name) != shapes[name]]:
            raise BrokenState(f"{TENSORS} holds {unlike[0]} of another shape than was written")
        if sha256_of(folder / TENSORS) != wanted["sha256"]:
            raise BrokenState(f"{TENSORS} was changed after it was written: its checksum differs")
    return facts


def fault_of_state(folder: Path) -> str | None:
    """Return why a folder is no training state that can be continued from; None if it is one."""
    try:
        check_state(folder)
    except BrokenState as error:
        return str(error)
    return None
