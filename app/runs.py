"""Training runs on the disk: adapters to compare, and the course of training to look at.

    <run>/pytorch_lora_weights.safetensors    the adapter; checkpoint-N/ holds those of earlier steps
    <run>/metrics.jsonl                       a row for each step: loss, or validation_loss on noise that never changes
    <run>/merge_report.json                   that loss of the base, as trained, and as exported; the step it is of
    <run>/run.json                            the options
    <run>/samples/step-N/<prompt>-<n>.png     validation images

A run is found below one of the folders given at the start and goes by its label; no path comes from the page. A run may
be under way: files may be missing, and the last row may be half written.
"""

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reslora_diffusion.diffusion.train.history import smooth

from .foreign import is_number, parsed_json, printable

ADAPTER = "pytorch_lora_weights.safetensors"
METRICS = "metrics.jsonl"
MAX_BYTES = 2**26  # of a metrics file: a million steps
MAX_OBJECT_BYTES = 2**24
MAX_POINTS = 800  # of a curve: more than that and a line is no clearer

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class MergeLosses:
    """Losses on one fixed noise; `gap` is what the shortcut's removal costs."""

    base: float | None  # not of language models
    trained: float
    exported: float
    layer_errors: dict[str, float]
    step: int | None = None  # older reports do not say

    @property
    def gap(self) -> float:
        return self.exported - self.trained


@dataclass(frozen=True)
class RunFolder:
    """One training run as its folder shows it now."""

    label: str
    method: str
    losses: Points
    validation: Points
    estimates: Points  # of the merge gap while training, each by a merge of its own step
    merge: MergeLosses | None
    prompts: tuple[str, ...]
    samples: dict[int, dict[str, Path]]  # by step, then by file name

    @property
    def last_step(self) -> int:
        return max([step for step, _ in (*self.losses, *self.validation)], default=0)

    @property
    def merged_at(self) -> int:
        """The step that `merge` is of."""
        return self.last_step if self.merge is None or self.merge.step is None else self.merge.step

    @property
    def gaps(self) -> Points:
        """The merge gap by step: estimates, and at the step of the export the gap itself, in place of any estimate."""
        if self.merge is None:
            return self.estimates
        final = self.merged_at
        return sorted([*(point for point in self.estimates if point[0] != final), (final, self.merge.gap)])

    def smoothed(self, keep: float) -> Points:
        steps, values = [step for step, _ in self.losses], [loss for _, loss in self.losses]
        return list(zip(steps, smooth(values, keep), strict=True))

    def step_shown(self, step: int) -> int | None:
        """The newest step with samples that is not after `step`."""
        return max((s for s in self.samples if s <= step), default=None)


def natural(path: Path) -> list[list[str | int]]:
    """A key to sort files by: a folder before those in it, `lora` before `lora-2`, and 50 before 100."""
    parts = path.parent.parts
    return [[int(p) if n % 2 else p for n, p in enumerate(re.split(r"(\d+)", part))] for part in parts]


def contained(root: Path, pattern: str) -> list[Path]:
    """Files below a folder that do not lead out of it, in the order of the numbers in their names. A folder that
    vanishes meanwhile has none."""
    paths = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    found = (path for path in paths if path.match(pattern) and path.is_file())
    return sorted((path for path in found if path.resolve().is_relative_to(root.resolve())), key=natural)


def labelled(roots: tuple[Path, ...], pattern: str) -> dict[str, Path]:
    """Files by the path of their folder below its root; the root's name, and a number, tell those of one path apart."""
    found: dict[str, Path] = {}
    for root in roots:
        for path in contained(root, pattern):
            label = printable(path.parent.relative_to(root).as_posix() if path.parent != root else root.name)
            longer = f"{printable(root.name)}/{label}"
            names = itertools.chain((label, longer), (f"{longer} {number}" for number in itertools.count(2)))
            found[next(name for name in names if name not in found)] = path
    return found


def find_runs(roots: tuple[Path, ...]) -> dict[str, Path]:
    """Folder of every run by its label, in the order of the roots."""
    return {label: path.parent for label, path in labelled(roots, METRICS).items()}


def find_adapters(roots: tuple[Path, ...]) -> dict[str, Path]:
    """Every adapter file by its run's label; those of whole runs before those of checkpoints."""
    return dict(sorted(labelled(roots, ADAPTER).items(), key=lambda item: is_checkpoint(item[1])))


def is_checkpoint(adapter: Path) -> bool:
    return adapter.parent.name.startswith("checkpoint-")


def siblings(runs: dict[str, Path]) -> list[str]:
    """Labels of the first race: the runs that share the first run's parent."""
    first = next(iter(runs.values()), None)
    return [label for label, folder in runs.items() if folder.parent == first.parent] if first else []


def read_run(label: str, folder: Path) -> RunFolder:
    """
    Raises:
        ValueError: a file of the run does not hold what it should.
    """
    rows = read_rows(folder / METRICS)
    options = read_object(folder / "run.json").get("options")
    options = options if isinstance(options, dict) else {}
    prompts = options.get("validation_prompt") or ()
    method, shortcut = options.get("method"), options.get("shortcut")
    return RunFolder(
        label=label,
        method=" ".join(str(word) for word in (method, shortcut) if word) or "not said",
        losses=points(rows, "loss"),
        validation=points(rows, "validation_loss"),
        estimates=points(rows, "merge_gap"),
        merge=read_merge(folder / "merge_report.json"),
        prompts=tuple(map(str, [prompts] if isinstance(prompts, str) else prompts)),
        samples=find_samples(folder),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: a line is no row, or the file is too large.
    """
    if not path.is_file():
        return []
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.parent.name}/{path.name} has more than {MAX_BYTES >> 20} MiB")
    rows: list[dict[str, Any]] = []
    *lines, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate((*lines, rest), start=1):
        if not line.strip():
            continue
        try:
            row = parsed_json(line)
        except ValueError:
            if number > len(lines):
                break  # the trainer is writing it
            row = None
        if not isinstance(row, dict) or type(step := row.get("step")) is not int or not 0 <= step < 2**53:
            raise ValueError(f"{path.parent.name}/{path.name}, line {number} is no row with a step")
        rows.append(row)
    return rows


def points(rows: list[dict[str, Any]], name: str) -> Points:
    """(step, value) where the value is a finite number."""
    return [(row["step"], float(row[name])) for row in rows if is_number(row.get(name))]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file.

    Raises:
        ValueError: it holds none.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_OBJECT_BYTES:
        raise ValueError(f"{path.parent.name}/{path.name} has more than {MAX_OBJECT_BYTES >> 20} MiB")
    try:
        found = parsed_json(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path.parent.name}/{path.name} is no JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.parent.name}/{path.name} holds no object")
    return found


def read_merge(path: Path) -> MergeLosses | None:
    found = read_object(path)
    if not found:
        return None
    trained, exported, base = (found.get(name) for name in ("loss_trained", "loss_merged", "loss_base"))
    if not (is_number(trained) and is_number(exported)):
        raise ValueError(f"{path.parent.name}/{path.name} lacks loss_trained or loss_merged")
    errors = found.get("output_errors")
    errors = errors if isinstance(errors, dict) else {}
    step = step if type(step := found.get("step")) is int and 0 <= step < 2**53 else None
    return MergeLosses(
        base=base if is_number(base) else None,
        trained=float(trained),
        exported=float(exported),
        layer_errors={str(k): float(v) for k, v in errors.items() if is_number(v)},
        step=step,
    )


def find_samples(folder: Path) -> dict[int, dict[str, Path]]:
    found: dict[int, dict[str, Path]] = {}
    for path in contained(folder, "samples/step-*/*.png"):
        step = re.fullmatch(r"step-(\d+)", path.parent.name)
        if step and re.fullmatch(r"\d+-\d+\.png", path.name):
            found.setdefault(int(step[1]), {})[path.name] = path
    return dict(sorted(found.items()))


def thinned(curve: Points) -> Points:
    """Every n-th point and the last, so that at most `MAX_POINTS` or so are drawn."""
    stride = -(-len(curve) // MAX_POINTS) or 1
    return [*curve[:-1:stride], curve[-1]] if curve else []
