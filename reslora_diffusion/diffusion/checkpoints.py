"""Checkpoints of a run, in its output folder.

    checkpoint-120/
      state/                               all that training needs to continue bit for bit
      pytorch_lora_weights.safetensors     the LoRA as it would be exported at this step
      kohya/, export_report.json

A checkpoint is written under a hidden name and renamed when it is complete, so a folder named `checkpoint-N` is whole.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..problems import BadInput

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

STATE_FOLDER = "state"
STATE_FILES = ("state.safetensors", "state.json")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def stored_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, options, versions."""
    return json.loads((folder / STATE_FOLDER / "state.json").read_text())


def is_complete(folder: Path) -> bool:
    """Whether a state is there, and whole: a machine that loses its power may have renamed what it has not written."""
    tensors, facts = (folder / STATE_FOLDER / name for name in STATE_FILES)
    try:
        with safe_open(tensors, framework="numpy"):  # compares the file's size with its header
            return "step" in json.loads(facts.read_text())
    except (OSError, ValueError, SafetensorError):
        return False


def found_in(output_dir: Path) -> list[Path]:
    """What is named like a checkpoint, whole or not."""
    return [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    return sorted(filter(is_complete, found_in(output_dir)), key=step_of)


def broken_in(output_dir: Path) -> list[str]:
    """Names of what looks like a checkpoint and is not whole."""
    return sorted(path.name for path in found_in(output_dir) if not is_complete(path))


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """`latest`, a path, or the name of a folder in `output_dir`; None if there is no such complete checkpoint."""
    if name == "latest":
        return next(reversed(checkpoints_in(output_dir)), None)
    candidates = (Path(name), output_dir / Path(name).name)
    return next((path for path in candidates if is_complete(path)), None)


def write_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], limit: int | None = None) -> Path:
    """Let `write` fill a folder, put it in its place, and then remove the oldest beyond `limit`."""
    folder, fresh = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    for left_behind in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(left_behind, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        write(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the room, and a part is of no use
        raise
    stale = output_dir / f".checkpoint-{step}.old"
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)
    if limit is not None:
        for old in checkpoints_in(output_dir)[:-limit]:
            shutil.rmtree(old)
    return folder


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Inside, no other run may write to the folder: each would remove what the other has begun. A folder that was made
    for it, and that nothing was written to, is removed.

    Raises:
        BadInput: another one does.
    """
    if fcntl is None or os.environ.get("RANK", "0") != "0":  # of several processes one holds it for all
        yield
        return
    made = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    held = os.open(output_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput([f"--output_dir: another run is writing to {output_dir}; wanted another folder"]) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        if made and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()
        os.close(held)
