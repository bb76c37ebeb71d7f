"""Methods by name: an adapter and what is added to it, `reslora-block+rite`.

    lora, rslora, pissa, dora                      PEFT's adapters, on our code path where they have one
    reslora-input, reslora-block, reslora-middle   the shortcuts
    +loraplus +rite +pro +scaled_adamw +reflora    the optimizer
    +fold                                          fold the shortcut in at `fold_at` of the steps
    +coto +restart                                 the schedule
    +distill                                       teach the merged model what the unmerged one says

rsLoRA is LoRA at another scale and is covered by the search over alpha; it is here so that its own choice can be raced.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from reslora_diffusion.methods.optimizers import OPTIMIZERS, factor_pairs
from reslora_diffusion.methods.schedules import Schedule
from reslora_diffusion.methods.schedules.making import make_schedule
from reslora_diffusion.methods.schedules.settings import SCHEDULES as KINDS

ADAPTERS = ("lora", "rslora", "pissa", "dora", "reslora-input", "reslora-block", "reslora-middle")
SCHEDULES = ("coto", "restart")
ADDITIONS = (*OPTIMIZERS, "loraplus", "fold", *SCHEDULES, "distill")
OPTIONS = {  # of each part, with the values taken where a plan names none
    "reslora-block": {"num_previous": 1},
    "reslora-middle": {"num_previous": None},
    "loraplus": {"loraplus_lr_ratio": 4.0},
    "rite": {"beta2": 0.999},
    "pro": {"damping": 1e-8},
    "scaled_adamw": {"damping": 1e-2},
    "reflora": {"damping": 1e-4},
    "fold": {"fold_at": 0.7},
    "coto": {"initial_p": 0.1},
    "restart": {"stages": 3, "momentum": 0.0},
    "distill": {"distillation_steps": 40},
}
Share = Annotated[float, Field(gt=0, lt=1)]
VALUES = {  # which values an option takes
    "num_previous": Annotated[int, Field(ge=1, strict=True)] | None,
    "loraplus_lr_ratio": Annotated[float, Field(gt=0, allow_inf_nan=False)],
    "beta2": Annotated[float, Field(ge=0, lt=1)],
    "damping": Annotated[float, Field(gt=0, allow_inf_nan=False)],
    "fold_at": Share,
    "initial_p": Share,
    "stages": Annotated[int, Field(ge=2, strict=True)],
    "momentum": Annotated[float, Field(ge=0, lt=1)],
    "distillation_steps": Annotated[int, Field(ge=1, strict=True)],
}
WITH_MIDDLE = {name: kind.conflicts["middle"] for name, kind in OPTIMIZERS.items() if "middle" in kind.conflicts}
WITH_DORA = {name: kind.conflicts["dora"] for name, kind in OPTIMIZERS.items() if "dora" in kind.conflicts}


@dataclass(frozen=True)
class Method:
    """The parts of a name."""

    adapter: str
    additions: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shortcut(self) -> str:
        return self.adapter.removeprefix("reslora-") if self.adapter.startswith("reslora-") else "none"

    @property
    def schedule(self) -> str | None:
        return next((part for part in self.additions if part in SCHEDULES), None)

    @property
    def optimizer(self) -> str | None:
        return next((part for part in self.additions if part in OPTIMIZERS), None)


def parse_method(word: str) -> Method:
    adapter, *additions = word.split("+")
    defaults = {name: value for part in (adapter, *additions) for name, value in OPTIONS.get(part, {}).items()}
    return Method(adapter, tuple(additions), defaults)


def method_problems(word: str, options: Mapping[str, list[Any]], steps: int | None = None) -> list[str]:
    """Problems with a name and its options: unknown parts, and parts that do not go together or not into the steps."""
    method = parse_method(word)
    problems = []
    if method.adapter not in ADAPTERS:
        problems.append(f"got the adapter {method.adapter!r}, wanted one of {', '.join(ADAPTERS)}")
    problems += [
        f"got +{part}, wanted one of +{', +'.join(ADDITIONS)}" for part in method.additions if part not in ADDITIONS
    ]
    if len(set(method.additions)) < len(method.additions):
        problems.append("an addition is there twice; wanted each once")
    chosen = [part for part in method.additions if part in OPTIMIZERS or part == "loraplus"]
    if len(chosen) > 1:
        problems.append(f"+{' and +'.join(chosen)} are two optimizers; wanted one")
    if len(several := [part for part in method.additions if part == "fold" or part in SCHEDULES]) > 1:
        problems.append(f"+{' and +'.join(several)} are two schedules; wanted one")
    if method.schedule and method.adapter in ("pissa", "dora"):
        problems.append(f"+{method.schedule} is for our adapters, and {method.adapter} is PEFT's; wanted lora")
    elif method.schedule and (reason := KINDS[method.schedule].conflicts.get(method.shortcut)):
        problems.append(f"+{method.schedule}: {reason}")
    for part in method.additions:
        if method.shortcut == "middle" and part in WITH_MIDDLE:
            problems.append(f"+{part}: {WITH_MIDDLE[part]}")
        if method.adapter == "dora" and part in WITH_DORA:
            problems.append(f"+{part}: {WITH_DORA[part]}")
        if part in ("fold", "distill") and method.shortcut not in ("input", "middle"):
            problems.append(f"+{part} is for reslora-input and reslora-middle; {method.adapter} merges exactly")
    for name, values in options.items():
        if name not in method.defaults:
            known = ", ".join(method.defaults) or "none"
            problems.append(f"got the option {name!r}; it has {known}")
        else:
            problems += [f"{name}: {text}" for value in values for text in value_problems(name, value)]
    if not problems and "restart" in method.additions:
        stages = options.get("stages", [method.defaults["stages"]])
        problems += [p for n in stages for p in KINDS["restart"](stages=n).misfits(steps, 0)]
    return problems


def value_problems(option: str, value: Any) -> list[str]:
    try:
        TypeAdapter(VALUES[option]).validate_python(value)
    except ValidationError as error:
        return [f"got {value!r}; {error.errors()[0]['msg']}"]
    return []


def same_methods(words: Iterable[str]) -> list[str]:
    """Names of one method: the order of what is added to an adapter says nothing."""
    found: dict[tuple[str, ...], list[str]] = {}
    for word in words:
        adapter, *additions = word.split("+")
        found.setdefault((adapter, *sorted(additions)), []).append(word)
    return [f"{' and '.join(names)} are one method; wanted it once" for names in found.values() if len(names) > 1]


def make_optimizer(method: Method, model: nn.Module, learning_rate: float, options: Mapping[str, Any]) -> Any:
    """The optimizer of the adapter's parameters, without weight decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if method.optimizer is not None:
        own = dict(options)
        betas = {"betas": (0.9, own.pop("beta2"))} if "beta2" in own else {}
        known = {name: own[name] for name in ("damping",) if name in own}
        kind = OPTIMIZERS[method.optimizer]
        return kind(trained.values(), factor_pairs(model), lr=learning_rate, weight_decay=0.0, **betas, **known)
    ratio = options.get("loraplus_lr_ratio", 1.0)
    up = [p for name, p in trained.items() if ".lora_B." in name]
    rest = [p for name, p in trained.items() if ".lora_B." not in name]
    groups = [{"params": rest, "lr": learning_rate}, {"params": up, "lr": learning_rate * ratio}]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)


def make_race_schedule(method: Method, options: Mapping[str, Any], seed: int) -> Schedule:
    """The schedule that the method is trained with; its fold is the race's own."""
    if method.schedule is None:
        return Schedule()
    given = {name: options[name] for name in OPTIONS[method.schedule] if name in options}
    return make_schedule(KINDS[method.schedule](**given), seed=seed)


def schedule_of(name: str, steps: int, warmup: int) -> Any:
    """Factor on the learning rate at a step."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - warmup)
        return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[name]

    return factor
