"""Checkpoints to continue from: which are whole, and whether one belongs to this run. Known without torch.

    checkpoint-N/  unfinished              ours: there while the others are written
                   trainer_state.json      written last by `transformers.Trainer`
                   adapter_config.json, adapter_model.safetensors, optimizer.pt, scheduler.pt, rng_state.pth
                   schedule.json           ours: how far a `--schedule` has come, with its numbers, where it has
                   schedule.safetensors    any
                   checksums.json          ours: SHA-256 of every other file

A checkpoint without checksums (sharded, or from an older version) is whole if its files are complete by their own
formats: a safetensors header that fits the file's length, a zip archive (`.pt`, `.pth`) that ends as one.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..utils.documents import parse_json
from ..utils.files import UNFINISHED, remove_folder, write_text
from ..utils.problems import BAD_DATA, BadInput, is_first_process, listing, printable, refuse
from ..utils.state_files import BrokenState, sha256_of, shapes_in
from .options import ModelOptions
from .training_options import TrainingOptions

CHECKSUMS = "checksums.json"
STATE = "trainer_state.json"
CONFIG = "adapter_config.json"
SCHEDULE = "schedule.json"  # of a run with one: the option, and the state
SCHEDULE_TENSORS = "schedule.safetensors"


def checkpoints_in(output: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def remove_oldest(written: Path, limit: int | None, best: str | None) -> None:
    """Remove the checkpoints that were written first, until `limit` are left beside the one just written.
    `written` and the best one stay."""
    if not limit or limit < 0:
        return
    kept = {written.name, Path(best or written).name}
    folders = sorted(checkpoints_in(written.parent), key=lambda folder: folder.stat().st_mtime)
    removable = [folder for folder in folders if folder.name not in kept]
    for folder in removable[: max(0, len(folders) - max(limit, len(kept)))]:
        remove_folder(folder)


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` beside the finished files of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (CHECKSUMS, UNFINISHED))
    digests = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    write_text(folder / CHECKSUMS, json.dumps(digests, indent=2) + "\n")


def fault_of(folder: Path) -> str | None:
    """Return why a checkpoint cannot be continued from; None if it is whole."""
    if (folder / UNFINISHED).exists():
        return f"{folder} was not finished"
    if not (folder / STATE).is_file():
        return f"{folder / STATE} is missing"
    for name in (CONFIG, STATE):
        try:
            read_json(folder / name)
        except (OSError, ValueError) as error:
            return f"{folder / name} cannot be read: {error}"
    if (folder / CHECKSUMS).is_file():
        try:
            wanted = read_json(folder / CHECKSUMS)
        except (OSError, ValueError) as error:
            return f"{folder / CHECKSUMS} cannot be read: {error}"
        for name, value in wanted.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if sha256_of(path) != value:
                return f"{path} is damaged: its checksum differs from the recorded one"
        return None
    return next((f"{path} is cut off" for path in sorted(folder.iterdir()) if not is_complete(path)), None)


def is_complete(path: Path) -> bool:
    """Return whether a file has the length that its own format states; True for other formats."""
    if path.suffix == ".safetensors":
        try:
            shapes_in(path)
        except BrokenState:
            return False
        return True
    return path.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError, ValueError: there is none.
    """
    found = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"got {type(found).__name__}, wanted an object")
    return found


def checkpoint_of(training: TrainingOptions, options: ModelOptions) -> str | None:
    """The checkpoint to continue from: the newest whole one for `--resume_from_checkpoint latest`, or the one named.
    None begins afresh: nothing was asked for, or there is no whole one yet, as after a run that was killed early.

    Raises:
        BadInput: the one that was named is not there or damaged, or it belongs to another run.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None:
        return None
    output = training.output_folder
    candidates = checkpoints_in(output) if wanted == "latest" else [Path(wanted)] if Path(wanted).is_dir() else []
    broken: list[str] = []
    found = None
    for folder in candidates:
        if (fault := fault_of(folder)) is None:
            found = folder
            break
        broken.append(fault)
    if found is None and wanted != "latest":
        rest = f"; {'; '.join(broken)}" if broken else ""
        raise BadInput([f"--resume_from_checkpoint {wanted}: no checkpoint there; --output_dir is {output}{rest}"])
    if is_first_process() and (broken or not found):
        begin = f"continuing from {found.name}" if found else "no checkpoint yet: starting afresh"
        print(f"{begin}; passed over newer checkpoints that are not whole: {listing(broken)}" if broken else begin)
    if found is None:
        return None
    try:
        problems = list(differences(found, training, options))
    except BAD_DATA as error:  # one without checksums may hold anything
        problems = [f"{found} cannot be continued from: {type(error).__name__}: {printable(error)}"]
    refuse(problems)
    return str(found)


def differences(found: Path, training: TrainingOptions, options: ModelOptions) -> Iterator[str]:
    """Say how a checkpoint differs from what this run would train."""
    stored, state = read_json(found / CONFIG), read_json(found / STATE)
    alpha = options.lora_alpha if options.lora_alpha is not None else 2 * options.rank
    own: dict[str, Any] = {
        "peft_type": "RESLORA" if options.method == "reslora" else "LORA",
        "r": options.rank,
        "lora_alpha": alpha,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
    }
    folded = stored.get("shortcut") == "none"  # saved after a handover
    if options.shortcut and not folded:
        own["shortcut"] = options.shortcut
    if options.num_previous and not folded:
        own["num_previous"] = None if options.num_previous == "all" else int(options.num_previous)
    for name, value in own.items():
        if name in stored and stored[name] != value or name == "peft_type" and stored.get(name) != value:
            yield f"{found} was trained with {name} {stored.get(name)!r}, got {value!r}; wanted the same"
    scheduled = read_json(found / SCHEDULE)["option"] if (found / SCHEDULE).is_file() else None
    if scheduled != options.schedule:
        yield f"{found} was trained with --schedule {scheduled!r}, got {options.schedule!r}; wanted the same"
    targets = options.target_modules
    if targets and targets != ["all-linear"] and isinstance(was := stored.get("target_modules"), list):
        if sorted(was) != sorted(targets):
            yield f"{found} was trained with target_modules {listing(sorted(was), 12)}, got {listing(targets, 12)}"
    done = state.get("global_step")
    if training.max_steps > 0 and isinstance(done, int) and done > training.max_steps:
        yield f"{found} has {done} steps behind it; this run is to end at --max_steps {training.max_steps}"
    yield from metric_differences(found, state, training)


def metric_differences(found: Path, state: dict[str, Any], training: TrainingOptions) -> Iterator[str]:
    """A best step that was chosen by another metric cannot be compared with this run's evaluations."""
    name = f"eval_{(training.metric_for_best_model or '').removeprefix('eval_')}"
    best, step = state.get("best_metric"), state.get("best_global_step")
    for row in state.get("log_history", ()):
        if best is not None and row.get("step") == step and name in row and row[name] != best:
            by = [key for key, value in row.items() if key.startswith("eval_") and value == best] or ["another metric"]
            yield (
                f"{found} chose its best step by {by[0].removeprefix('eval_')}, this run by "
                f"{name.removeprefix('eval_')}; wanted --metric_for_best_model {by[0].removeprefix('eval_')}"
            )
