"""A plan: one task, its methods, what is searched, how often. Read from YAML; every problem is in one message."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reslora_diffusion.utils.documents import parse_configuration

from .methods import Method, method_problems, parse_method

FORMAT_VERSION = 1  # of plans and results: raised when equal settings no longer mean equal runs
Positive = Annotated[float, Field(gt=0)]


class PlanError(ValueError):
    """Problems with a plan, a line each."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSettings(Strict):
    """The settings that all runs of a race share."""

    name: Literal["word_problems", "chain_sums", "stickers"]
    rank: Annotated[int, Field(ge=1)] = 4
    steps: Annotated[int, Field(ge=2)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 8
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    max_grad_norm: Positive | None = 1.0
    evaluations: Annotated[int, Field(ge=1)] = 1  # how often the export is measured on the way, the last step included


class Search(Strict):
    """The first grid and the number of trials: the rest of them go to the neighbours of the best."""

    trials: Annotated[int, Field(ge=1)] = 16
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    learning_rate: Annotated[list[Positive], Field(min_length=1)] = [1e-3, 4e-3, 1.6e-2]
    alpha_over_rank: Annotated[list[Positive], Field(min_length=1)] = [1, 8, 64]


class Final(Strict):
    seeds: Annotated[list[int], Field(min_length=1)] = [100, 101, 102, 103, 104]
    robustness: list[Positive] = [1 / 3, 3]  # factors on the best learning rate
    robustness_seeds: Annotated[int, Field(ge=1)] = 3  # how many of the seeds run at those learning rates


class Control(Strict):
    """A method at the tuned setting of another, changed: `{of: lora, alpha_over_rank: 2}` doubles its alpha.

    Numbers are factors.
    """

    of: str
    alpha_over_rank: Positive = 1
    learning_rate: Positive = 1
    rank: Positive = 1
    lr_scheduler: Literal["linear", "cosine", "constant"] | None = None  # another one than the race's


class Plan(Strict):
    """See the module."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    task: TaskSettings
    methods: Annotated[dict[str, dict[str, list[Any]]], Field(min_length=1)]  # its own options, a list of values each
    search: Search = Search()
    final: Final = Final()
    controls: dict[str, Control] = {}
    reference: str = "lora"

    def __hash__(self) -> int:
        return hash(self.name)

    @model_validator(mode="after")
    def check_methods(self) -> "Plan":
        problems = [
            f"methods.{word}: {problem}"
            for word, options in self.methods.items()
            for problem in method_problems(word, options)
        ]
        for name, control in self.controls.items():
            if control.of not in self.methods:
                problems.append(f"controls.{name}: got {control.of!r}, wanted one of {', '.join(self.methods)}")
        if self.reference not in self.methods:
            problems.append(f"reference: got {self.reference!r}, wanted one of {', '.join(self.methods)}")
        if set(self.search.seeds) & set(self.final.seeds):
            problems.append("final.seeds: a seed that settings were chosen on says nothing of them; wanted fresh ones")
        if self.task.warmup_steps >= self.task.steps:
            problems.append(
                f"task.warmup_steps: got {self.task.warmup_steps}, wanted fewer than {self.task.steps} steps"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def parsed(self) -> dict[str, Method]:
        return {word: parse_method(word) for word in self.methods}


def read_plan(path: str | Path) -> Plan:
    """Raises `PlanError` with every problem."""
    path = Path(path)
    try:
        content = parse_configuration(path.read_bytes(), ".yaml")
        return Plan.model_validate(content)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise PlanError("\n".join([f"{path}:", *(f"  {line}" for line in lines_of(error))])) from None
    except ValueError as error:
        raise PlanError(f"{path} is no YAML: {error}") from None


def lines_of(error: ValidationError) -> list[str]:
    """A line for each problem, with its place in the file where it has one."""
    lines = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        lines += [f"{place}: {message}"] if place else message.split("\n")
    return lines


def fingerprint(facts: dict[str, Any]) -> str:
    """A name for what a run is a function of."""
    text = json.dumps({"format": FORMAT_VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
