"""Checkpoints of a run, in its output folder.

    checkpoint-120/
      state/                               all that training needs to continue bit for bit
      pytorch_lora_weights.safetensors     the LoRA as it would be exported at this step
      kohya/, export_report.json

A checkpoint is written under a hidden name, flushed, and renamed when it is complete; its state carries checksums, so
one that a failing disk or a power cut has damaged is found and passed over.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...utils.files import replace_folder, sweep
from ...utils.problems import BadInput
from ...utils.state_files import FACTS, fault_of_state, read_facts

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]  # asked for before each use

STATE_FOLDER = "state"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def stored_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: step, options, versions, pictures; raises `BrokenState`."""
    return read_facts(folder / STATE_FOLDER)


def fault_of(folder: Path) -> str | None:
    """Why training cannot continue from a folder; None if it can. A machine that loses its power, or a disk that
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
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise BadInput([f"--resume_from_checkpoint: {folder} cannot be continued from: {reason}"]) from error


def write_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], limit: int | None = None) -> Path:
    """Let `write` fill a folder, put it in its place, and then remove the oldest beyond `limit`."""
    folder, fresh = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    for left_behind in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(left_behind, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        write(fresh)
        replace_folder(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the room, and a part is of no use
        raise
    if limit is not None:
        there = [path for path in found_in(output_dir) if (path / STATE_FOLDER / FACTS).is_file()]
        for old in there[:-limit]:
            hidden = old.with_name(f".{old.name}.old")  # half removed it must not look like a checkpoint
            os.replace(old, hidden)
            shutil.rmtree(hidden)
    return folder


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Inside, no other run may write to the folder: each would remove what the other has begun. What a killed run left
    unfinished is removed first. A folder that was made for this run, and that nothing was written to, is removed.

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
        for place in (output_dir, output_dir / "kohya", *output_dir.glob("samples/step-*")):
            sweep(place)
        yield
    finally:
        if made and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()
        os.close(held)
