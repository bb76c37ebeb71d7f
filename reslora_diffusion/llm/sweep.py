"""One command, many runs: seeds and grids of a language-model program, each run in a process and a folder of its own.

    reslora train-llm --seeds 5 ...                                       seeds 0 to 4
    reslora train-llm --seeds 0 3 7 --grid learning_rate=1e-4,3e-4 lora_alpha=8,16 ...

    output_dir/learning_rate-0.0001_lora_alpha-8_seed-0/    what the program writes; 12 such folders
    output_dir/sweep.json                                   settings and results of the finished ones

A run that is finished is not run again, one that was stopped continues from its newest checkpoint: the same command
after an interruption does the rest, also with more seeds or values. With other options it is refused, as finished runs
would pass for its own. `python -m benchmarks.sweep output_dir` makes tables of the file.
"""

import itertools
import json
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.documents import parse_json
from ..utils.environment import without_secrets
from ..utils.files import write_text
from ..utils.option_parser import parse_file
from ..utils.problems import BAD_DATA, BadInput, first_line, refuse
from ..utils.processes import ask_to_stop, passing_on, start_apart
from .other_programs import translate

SEEDS, GRID, OUTPUT = "--seeds", "--grid", "--output_dir"
RESULTS, FILE, FORMAT = "results.json", "sweep.json", 1
LAST = ("adapter_model.safetensors", "pruning_report.json")  # one of them is what a run writes last
OWN = ("seed", "output_dir", "config", "resume_from_checkpoint")


@dataclass(frozen=True)
class Sweep:
    """Settings by name with their values, seeds, and the words that all runs have."""

    grid: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    words: Sequence[str]
    output: Path

    def runs(self) -> list[tuple[dict[str, str], int]]:
        """Every combination of settings, with every seed."""
        settings = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return [(setting, seed) for setting in settings for seed in self.seeds]

    def folder(self, setting: Mapping[str, str], seed: int) -> Path:
        parts = [f"{name}-{value.replace('/', '_')}" for name, value in setting.items()]
        return self.output / "_".join([*parts, f"seed-{seed}"])


def sweep_of(words: Sequence[str], default_output: str) -> Sweep | None:
    """The sweep that a command line asks for; None if it is one run.

    Raises:
        BadInput: seeds that are no numbers, a grid without values, or one over what every run has its own of.
    """
    found: dict[str, list[str]] = {SEEDS: [], GRID: [], OUTPUT: []}
    rest, current, asked = [], None, False
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
            current = name if name in found else None
            asked |= current in (SEEDS, GRID)
            if current and equals:
                found[current].append(value)
            elif not current:
                rest.append(word)
        elif current:
            found[current].append(word)
        else:
            rest.append(word)
    if not asked:
        return None
    problems = []
    seeds = [part for word in found[SEEDS] for part in word.split(",") if part]
    if not all(part.isdecimal() for part in seeds) or (SEEDS in {w.partition("=")[0] for w in words} and not seeds):
        problems.append(f"{SEEDS}: got {' '.join(seeds) or 'nothing'}, wanted how many, or two or more seeds")
        seeds = []
    grid: dict[str, list[str]] = {}
    for word in found[GRID]:
        name, _, values = word.partition("=")
        name, chosen = name.replace("-", "_"), [value for value in values.split(",") if value]
        if not name or not chosen or name in OWN:
            problems.append(f"{GRID}: got {word!r}, wanted an option and its values, as learning_rate=1e-4,3e-4")
        grid[name] = chosen
    if GRID in {word.partition("=")[0] for word in words} and not grid:
        problems.append(f"{GRID}: got nothing, wanted an option and its values, as learning_rate=1e-4,3e-4")
    if any(word.partition("=")[0].replace("-", "_") in ("__seed", "__resume_from_checkpoint") for word in rest):
        problems.append(f"--seed, --resume_from_checkpoint: {SEEDS} and {GRID} set them for each run")
    refuse(problems)
    numbers = [*range(int(seeds[0]))] if len(seeds) == 1 else [int(part) for part in seeds] or [0]
    if not numbers:
        raise BadInput([f"{SEEDS}: got 0, wanted 1 or more"])
    folder = found[OUTPUT][-1] if found[OUTPUT] else configured_output(rest) or default_output
    return Sweep(grid, numbers, rest, Path(folder))


def configured_output(words: Sequence[str]) -> str | None:
    """The `output_dir` of the `--config` file that the words name; raises `BadInput` if it cannot be read."""
    path = None
    for word, after in itertools.pairwise([*words, ""]):
        name, _, value = word.partition("=")
        if name == "--config":
            path = value or after
    if not path:
        return None
    config = parse_file("--config", Path(path))
    translation = translate(config) if isinstance(config, dict) else None
    values = translation.values if translation else config
    return values.get("output_dir") if isinstance(values, dict) else None


def run(sweep: Sweep, program: Sequence[str]) -> int:
    """Run what is not finished, one after the other; returns the exit code of the first that fails, else 0.

    `program`: the command that takes the options.
    """
    runs = sweep.runs()
    refuse_another(sweep)
    write(sweep)  # whatever ends this program, the next one sees of which options these runs are
    for number, (setting, seed) in enumerate(runs, 1):
        folder = sweep.folder(setting, seed)
        label = f"run {number} of {len(runs)}, {folder.name}"
        if is_finished(folder):
            print(f"{label}: is finished", flush=True)
            continue
        command = [*program, *sweep.words, *(f"--{name}={value}" for name, value in setting.items())]
        command += [f"--seed={seed}", f"{OUTPUT}={folder}"]
        if any(folder.glob("checkpoint-*")):
            command.append("--resume_from_checkpoint=latest")
        print(f"{label}: begins", flush=True)
        code, was_asked = wait_for(command)
        if code:
            write(sweep)
            print(f"{label}: ended with exit code {code}; the same command continues", file=sys.stderr)
            return code
        write(sweep)
        if was_asked or not is_finished(folder):  # it saved a checkpoint, or was in its last step and finished
            return 0
    print(f"{len(runs)} runs are finished: {write(sweep)}")
    return 0


def refuse_another(sweep: Sweep) -> None:
    """Raise `BadInput` if the folder has runs of other options, which would pass for finished ones of these."""
    folders = [sweep.folder(setting, seed) for setting, seed in sweep.runs()]
    begun = any(is_finished(folder) or any(folder.glob("checkpoint-*")) for folder in folders)
    if not begun or not (path := sweep.output / FILE).is_file():
        return
    try:
        words = parse_json(path.read_text(encoding="utf-8")).get("words")
    except BAD_DATA as error:
        raise BadInput([f"{path}: cannot be read: {first_line(error)}"]) from error
    if words not in (None, recorded(sweep)):
        raise BadInput([f"{path}: is of a sweep with {' '.join(map(str, words))}; wanted another {OUTPUT}"])


def recorded(sweep: Sweep) -> list[str]:
    """The words that all runs have, as a file may hold them."""
    return without_secrets(map(str, sweep.words))


def wait_for(command: Sequence[str]) -> tuple[int, bool]:
    """Run one in a session of its own: Ctrl-C and SIGTERM are passed on, and it decides when it ends. Returns its exit
    code, and whether it was asked to stop."""
    process, asked = start_apart(command), threading.Event()

    def stop() -> None:
        asked.set()
        ask_to_stop(process)

    with passing_on(stop):
        return process.wait(), asked.is_set()


def is_finished(folder: Path) -> bool:
    """Return whether a run has written its results and, after them, its LoRA or the report on its pruned model."""
    return (folder / RESULTS).is_file() and any((folder / name).is_file() for name in LAST)


def write(sweep: Sweep) -> Path:
    """Write `sweep.json`: {"format", "words", "runs": [{"setting", "seed", "method", "result"}]}."""
    runs = []
    for setting, seed in sweep.runs():
        folder = sweep.folder(setting, seed)
        if is_finished(folder):
            result = parse_json((folder / RESULTS).read_text(encoding="utf-8"))
            method = result.get("method")
            method = f"{method} {result['shortcut']}" if result.get("shortcut") else method
            facts = {"setting": setting, "seed": seed, "method": method, "folder": folder.name}
            runs.append(facts | {"result": numbers_in(result)})
    path = sweep.output / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"format": FORMAT, "words": recorded(sweep), "runs": runs}, indent=2) + "\n")
    return path


def numbers_in(result: Any, before: str = "") -> dict[str, float]:
    """Numbers of nested results by their dotted names."""
    if isinstance(result, bool) or not isinstance(result, int | float | Mapping):
        return {}
    if not isinstance(result, Mapping):
        return {before: float(result)} if math.isfinite(result) else {}
    found: dict[str, float] = {}
    for name, value in result.items():
        found |= numbers_in(value, f"{before}.{name}" if before else str(name))
    return found
