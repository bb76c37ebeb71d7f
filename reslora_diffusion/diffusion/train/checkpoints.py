"""Checkpoints of a run, in its output folder.

    checkpoint-120/
      state/                               all that training needs to continue bit for bit
      pytorch_lora_weights.safetensors     the LoRA as it would be exported at this step
      kohya/, export_report.json

A checkpoint is written under a hidden name, flushed, and renamed when it is complete; its state carries checksums, so
one that a failing disk or a power cut has damaged is found and passed over.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...utils.files import make_folder, remove_folder, replace_folder
from ...utils.problems import BAD_DATA, BadInput
from ...utils.state_files import FACTS, fault_of_state, read_facts

STATE_FOLDER = "state"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def stored_facts(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's step, options, versions and images; raises `BrokenState`."""
    return read_facts(folder / STATE_FOLDER)


def fault_of(folder: Path) -> str | None:
    """Return why training cannot continue from a folder; None if it can. A machine that loses power, or a disk that
    fails, may leave a file of which a part is missing or wrong."""
    if not (folder / STATE_FOLDER).is_dir():
        return "it has no state"
    if fault := fault_of_state(folder / STATE_FOLDER):
        return fault
    facts = stored_facts(folder)
    sound = type(facts.get("step")) is int and isinstance(facts.get("options", {}), dict)
    return None if sound else f"{FACTS} does not say the step and the options"


def found_in(output_dir: Path) -> list[Path]:
    """Folders that are named like a checkpoint, complete or not, oldest step first."""
    named = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,15}", path.name)]
    return sorted(named, key=step_of)


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    return [path for path in found_in(output_dir) if fault_of(path) is None]


def broken_in(output_dir: Path) -> list[str]:
    """Names of folders that look like a checkpoint and cannot be continued from, each with the reason."""
    return [f"{path.name} ({fault})" for path in found_in(output_dir) if (fault := fault_of(path))]


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """`latest`, a path, or the name of a folder in `output_dir`; None if there is no such complete checkpoint."""
    newest_first = found_in(output_dir)[::-1]
    candidates = newest_first if name == "latest" else (Path(name), output_dir / Path(name).name)
    return next((path for path in candidates if fault_of(path) is None), None)


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Inside, a checkpoint is read; raises `BadInput` if it does not hold what a run wants to know. One without
    checksums, of an earlier version, may hold anything."""
    try:
        yield
    except BAD_DATA as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise BadInput([f"--resume_from_checkpoint: {folder} cannot be continued from: {reason}"]) from error


def write_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], limit: int | None = None) -> Path:
    """Let `write` fill a folder, put it in its place, and then remove those beyond `limit` that were written first."""
    folder, fresh = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    for left_behind in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(left_behind, ignore_errors=True)
    make_folder(fresh)
    try:
        write(fresh)
        replace_folder(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the room, and a part is of no use
        raise
    if limit is not None:
        there = [path for path in found_in(output_dir) if (path / STATE_FOLDER / FACTS).is_file() and path != folder]
        there.sort(key=lambda path: path.stat().st_mtime)  # one of more steps may be damaged, or of an earlier attempt
        for old in there[: max(0, len(there) + 1 - limit)]:
            remove_folder(old)
    return folder


def written_elsewhere(output: Path, step: int, write: Callable[[Path], None]) -> str:
    """Write a checkpoint that the output folder does not take to the temporary files; returns where, in words."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{output.resolve().name}-"))
        place = write_checkpoint(folder, step, write)
        return f"; it is in {place} instead: move it into {output} to continue from it"
    except (OSError, SafetensorError):
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        return ""
