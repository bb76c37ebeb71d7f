"""Results in a folder: one JSON file a run, named by what the run is a function of. What is there is not run again."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import machine
from reslora_diffusion.utils.documents import parse_json
from reslora_diffusion.utils.files import write_text
from reslora_diffusion.utils.problems import BadInput, refuse

from .plan import FORMAT_VERSION, Plan, fingerprint

STAGES = ("tune", "final", "controls", "robustness")


def facts_of(plan: Plan, stage: str, method: str, setting: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The identity of a run, which is a function of it."""
    task = plan.task.model_dump()
    if stage in ("tune", "robustness"):  # their curves are not asked for
        task["evaluations"] = 1
    return {"task": task, "stage": stage, "method": method, "setting": dict(setting), "seed": seed}


def path_of(folder: Path, facts: Mapping[str, Any]) -> Path:
    return folder / str(facts["stage"]) / str(facts["method"]) / f"{fingerprint(dict(facts))}.json"


IDENTITY = ("task", "stage", "method", "setting", "seed")


def read(path: Path) -> dict[str, Any]:
    """Raises `BadInput` for a file that is damaged, of another format, or named as another run's."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        version, facts = content.get("format"), {name: content.get(name) for name in IDENTITY}
        whole = {*IDENTITY, "machine"} <= set(content) and {"loss", "diverged"} <= set(content["result"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput([f"{path}: is no result ({error}); without it that run is made again"]) from None
    if version != FORMAT_VERSION:
        raise BadInput([f"{path}: got results of format {version!r}, wanted {FORMAT_VERSION}"])
    if not whole or path.name != path_of(path.parent, facts).name:
        raise BadInput([f"{path}: its name is not that of the run inside; without it that run is made again"])
    if content["result"]["loss"] is None:
        content["result"]["loss"] = math.inf
    return content


def write(path: Path, facts: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """A loss that is not finite is written as null."""
    cleaned = {name: None if value == math.inf else value for name, value in result.items()}
    put(path, {"format": FORMAT_VERSION, **facts, "result": cleaned, "machine": machine()})


def put(path: Path, content: Mapping[str, Any]) -> None:
    """One line, with training losses of five digits: a race has hundreds of files."""
    losses = [None if loss is None else float(f"{loss:.5g}") for loss in content["result"].get("train_losses", [])]
    content = {**content, "result": {**content["result"], "train_losses": losses}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, allow_nan=False) + "\n")


def take_over(source: Path, target: Path, plan: Plan) -> int:
    """Copy results of this plan's task that `target` lacks; returns how many."""
    taken = 0
    for content in all_of(source, plan):
        facts = {name: content[name] for name in IDENTITY}
        if not (path := path_of(target, facts)).exists():
            result = {name: None if value == math.inf else value for name, value in content["result"].items()}
            put(path, {**content, "result": result})
            taken += 1
    return taken


def all_of(folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """Results of this plan's task; those of another are passed over.

    Raises:
        BadInput: every file that cannot be used.
    """
    found, problems = [], []
    for stage in STAGES:
        for path in sorted((folder / stage).glob("*/*.json")):
            try:
                content = read(path)
            except BadInput as error:
                problems += error.problems
                continue
            wanted = facts_of(plan, stage, content["method"], content["setting"], content["seed"])["task"]
            if content["task"] == wanted:
                found.append(content)
    refuse(problems)
    return found
