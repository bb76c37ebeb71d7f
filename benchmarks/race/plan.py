"""A plan: one task, its methods, what is searched, how often. Read from YAML; every problem is in one message."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from reslora_diffusion.utils.documents import parse_configuration
from reslora_diffusion.utils.problems import Unusable, shortened

from .methods import Method, method_problems, parse_method, same_methods

FORMAT_VERSION = 1  # of plans and results: raised when equal settings no longer mean equal runs
T = TypeVar("T")


def distinct(values: list[T]) -> list[T]:
    if twice := sorted({repr(value) for value in values if values.count(value) > 1}):
        raise ValueError(f"got {', '.join(twice)} several times, wanted each once")
    return values


Several = Annotated[list[T], AfterValidator(distinct)]
OneOrMore = Annotated[list[T], Field(min_length=1), AfterValidator(distinct)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, strict=True)]


class PlanError(Unusable):
    """Problems with a plan; the message begins with its file."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSettings(Strict):
    """The settings that all runs of a race share."""

    name: Literal["word_problems", "chain_sums", "stickers"]
    rank: Count = 4
    steps: Annotated[int, Field(ge=2, strict=True)] = 100
    batch_size: Count = 8
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 5
    max_grad_norm: Positive | None = 1.0
    evaluations: Count = 1  # how often the export is measured on the way, the last step included

    @model_validator(mode="after")
    def check_steps(self) -> "TaskSettings":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"got {self.warmup_steps} warmup_steps, wanted fewer than {self.steps} steps")
        if self.evaluations > self.steps:
            raise ValueError(f"got {self.evaluations} evaluations, wanted at most one for each of {self.steps} steps")
        return self


class Search(Strict):
    """The first grid and the number of trials: the rest of them go to the neighbours of the best."""

    trials: Count = 16
    seeds: OneOrMore[Seed] = [0]
    learning_rate: OneOrMore[Positive] = [1e-3, 4e-3, 1.6e-2]
    alpha_over_rank: OneOrMore[Positive] = [1, 8, 64]


class Final(Strict):
    seeds: OneOrMore[Seed] = [100, 101, 102, 103, 104]
    robustness: Several[Positive] = [1 / 3, 3]  # factors on the best learning rate
    robustness_seeds: Count = 3  # how many of the seeds run at those learning rates


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
    """A plan of a race, as its YAML file has it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    task: TaskSettings
    methods: Annotated[dict[str, dict[str, OneOrMore[Any]]], Field(min_length=1)]  # its own options: values to try
    search: Search = Search()
    final: Final = Final()
    controls: dict[Annotated[str, Field(pattern=r"^\w[\w ,.+-]*$")], Control] = {}  # the name is also a folder's
    reference: str = "lora"

    def __hash__(self) -> int:
        return hash(self.name)

    @model_validator(mode="wrap")
    @classmethod
    def check(cls, content: Any, handler: ModelWrapValidatorHandler["Plan"]) -> "Plan":
        """Problems between the parts are looked for in what is there, although other parts may be wrong."""
        problems = list(problems_between(content)) if isinstance(content, dict) else []
        try:
            plan = handler(content)
        except ValidationError as error:
            problems = lines_of(error) + problems
        if problems:
            raise ValueError("\n".join(problems))
        return plan

    def parsed(self) -> dict[str, Method]:
        return {word: parse_method(word) for word in self.methods}


def problems_between(content: Mapping[str, Any]) -> Iterator[str]:
    """Problems with methods, and of one part of a plan with another; what is no table or list is told elsewhere."""
    methods, controls, task, search, final = (
        found if isinstance(found := content.get(part), dict) else {}
        for part in ("methods", "controls", "task", "search", "final")
    )
    steps, rank = (value if type(value := task.get(name)) is int else None for name in ("steps", "rank"))
    for word, options in methods.items():
        lists = {name: v for name, v in options.items() if isinstance(v, list)} if isinstance(options, dict) else {}
        yield from (f"methods.{word}: {problem}" for problem in method_problems(str(word), lists, steps))
    yield from (f"methods: {problem}" for problem in same_methods(map(str, methods)))
    known = list(map(str, methods))
    for name, control in controls.items():
        of, factor = (control.get("of"), control.get("rank", 1)) if isinstance(control, dict) else (None, 1)
        if of is not None and str(of) not in known:
            yield f"controls.{name}: got {of!r}, wanted one of {', '.join(known)}"
        if name in methods:
            yield f"controls.{name}: is the name of a method; wanted one of its own"
        if isinstance(control, dict) and set(control) == {"of"}:
            yield f"controls.{name}: changes nothing of {of}; wanted a factor or a lr_scheduler"
        if rank and type(factor) in (int, float) and round(rank * factor) < 1:
            yield f"controls.{name}: got rank x {factor:g} of rank {rank}, wanted 1 or more"
    if methods and str(reference := content.get("reference", "lora")) not in known:
        yield f"reference: got {reference!r}, wanted one of {', '.join(known)}"
    if set(seeds_of(search, [0])) & set(seeds_of(final, [])):
        yield "final.seeds: a seed that settings were chosen on says nothing of them; wanted fresh ones"


def seeds_of(part: Mapping[str, Any], default: list[int]) -> list[int]:
    found = part.get("seeds", default)
    return [seed for seed in found if type(seed) is int] if isinstance(found, list) else []


def read_plan(path: str | Path) -> Plan:
    """Raises `PlanError` with every problem."""
    path = Path(path)
    try:
        content = parse_configuration(path.read_bytes(), ".yaml")
    except OSError as error:
        raise PlanError(path, [str(error.strerror)]) from None
    except ValueError as error:
        raise PlanError(path, [f"it is no YAML: {error}"]) from None
    if not isinstance(content, dict):
        raise PlanError(path, [f"got {shortened(content)}, wanted {', '.join(Plan.model_fields)}"])
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        raise PlanError(path, lines_of(error)) from None


def lines_of(error: ValidationError) -> list[str]:
    """A line for each problem, with its place in the file and, where pydantic found it, what is there."""
    lines = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"]))
        if problem["type"] == "value_error":
            lines += [f"{place}: {line}" if place else line for line in str(problem["ctx"]["error"]).split("\n")]
        else:
            lines.append(f"{place}: got {shortened(problem['input'])}; {problem['msg']}")
    return lines


def fingerprint(facts: dict[str, Any]) -> str:
    """A name for what a run is a function of."""
    text = json.dumps({"format": FORMAT_VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
