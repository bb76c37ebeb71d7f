"""Results in a folder: one JSON file a run, named by what the run is a function of. What is there is not run again."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import machine
from reslora_diffusion.utils.files import write_text

from .plan import FORMAT_VERSION, Plan, fingerprint

STAGES = ("tune", "final", "controls", "robustness")


def facts_of(plan: Plan, stage: str, method: str, setting: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The identity of a run, which is a function of it."""
    task = plan.task.model_dump()
    if stage in ("tune", "robustness"):  # their curves are not asked for
        task["evaluations"] = 1
    return {"task": task, "stage": stage, "method": method, "setting": dict(setting), "seed": seed}


def path_of(folder: Path, facts: Mapping[str, Any]) -> Path:
    return folder / facts["stage"] / facts["method"] / f"{fingerprint(dict(facts))}.json"


def read(path: Path) -> dict[str, Any]:
    """Raises `ValueError` for a file of another format."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path}: got results of format {content.get('format')!r}, wanted {FORMAT_VERSION}")
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
        facts = {name: content[name] for name in ("task", "stage", "method", "setting", "seed")}
        if not (path := path_of(target, facts)).exists():
            result = {name: None if value == math.inf else value for name, value in content["result"].items()}
            put(path, {**content, "result": result})
            taken += 1
    return taken


def all_of(folder: Path, plan: Plan) -> Iterator[dict[str, Any]]:
    """Results of this plan's task; those of another are passed over."""
    for stage in STAGES:
        for path in sorted((folder / stage).glob("*/*.json")):
            content = read(path)
            wanted = facts_of(plan, stage, content["method"], content["setting"], content["seed"])["task"]
            if content["task"] == wanted:
                yield content
