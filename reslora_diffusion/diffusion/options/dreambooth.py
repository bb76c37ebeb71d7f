"""All options of DreamBooth training, and what depends on the family of the model.

Names of options that diffusers' scripts have are theirs, others are kohya's where there is one. Defaults are those of
diffusers' script for the family of the model: `take_defaults` fills them in once the family is known.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from reslora_diffusion.export.single_file import is_single_file, read_single_file

from ...utils.options import default_of, facts_of, value_problems
from ...utils.wording import worded
from .adapter import AdapterOptions
from .data import DataOptions
from .model import ModelOptions
from .new_tokens import NewTokenOptions
from .output import OutputOptions
from .recipes import RECIPES, not_given
from .training import ONE_RATE, TrainingOptions

WITH_TEXT_ENCODERS = (  # options that are used only where text encoders are trained
    *("train_text_encoder_frac", "text_encoder_target_modules"),
    *("text_encoder_lr", "adam_weight_decay_text_encoder"),
)


class FamilyDefaults(Protocol):
    """The part of a `models.families.Family` that decides on defaults."""

    title: str
    pipeline_class: str
    is_guided: bool
    not_here: Mapping[str, str]


@dataclass(frozen=True)
class OfFamily:
    """The meaning of another trainer's file for one family of models alone.

    Attributes:
        values: options here, in place of what is said for all families.
        ignored: options here that its program ignores for the family, each with the reason.
        different: names in the file, each with what differs here.
    """

    values: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)


@dataclass
class DreamBoothOptions(ModelOptions, DataOptions, AdapterOptions, NewTokenOptions, TrainingOptions, OutputOptions):
    """Teach a text-to-image pipeline of diffusers a subject by LoRA or ResLoRA, and export a standard LoRA.

    Attributes:
        given: names of the options that were given; all others have the defaults of the model's family.
        problems: what was wrong with the command line or the file.
        notes: lines on a file that another trainer wrote: what of it was translated, and what was not.
        translated: names of the options that came from such a file.
        of_families: what such a file means for one family of models alone, by the class of its pipeline.
        new_tokens: under `--train_text_encoder_ti` the new tokens by the word that stands for them, once `checks` has
            named them.
    """

    given: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    translated: set[str] = field(default_factory=set)
    of_families: dict[str, OfFamily] = field(default_factory=dict)
    new_tokens: dict[str, list[str]] = field(default_factory=dict)

    @property
    def trains_text(self) -> bool:
        """True if encoded prompts change while training, so that a step encodes tokens."""
        return self.train_text_encoder or self.train_text_encoder_ti

    @property
    def trains_text_share(self) -> float:
        """The share of the steps, from the first one on, in which encoded prompts change, where they do."""
        return self.train_text_encoder_ti_frac if self.train_text_encoder_ti else self.train_text_encoder_frac

    def worded(self, prompt: str) -> str:
        """A prompt as the text encoders read it, with new tokens in place of the words that stand for them."""
        return worded(prompt, self.new_tokens)

    def changed(self, **values: Any) -> DreamBoothOptions:
        """A copy with other values."""
        other = copy.deepcopy(self)
        for name, value in values.items():
            setattr(other, name, value)
        return other

    def update(self, values: dict[str, Any]) -> None:
        """Take values that were given."""
        for name, value in values.items():
            setattr(self, name, value)
        self.given |= values.keys()

    @property
    def config_source(self) -> str:
        """Folder or hub name of the base's configurations and tokenizers; raises `BadInput` for a file that is none."""
        name = self.pretrained_model_name_or_path or ""
        return (self.base_config or read_single_file(name).config) if is_single_file(name) else name

    def take_defaults(self, family: FamilyDefaults) -> None:
        """Give options that were not given the defaults of diffusers' script for this family."""
        kind = family.pipeline_class
        self.take_translated(family)
        self.take_recipe(kind, family.title)
        for item in fields(self):
            if item.name in FACTS and item.name not in self.given and (families := FACTS[item.name].families):
                setattr(self, item.name, families.get(kind, default_of(item)))
        alone = self.optimizer in ONE_RATE  # as in diffusers' scripts for prodigy
        for name in ("text_encoder_lr", "adam_weight_decay_text_encoder"):
            if name not in self.given and (not self.trains_text or (alone and name == "text_encoder_lr")):
                setattr(self, name, None)
        if self.guidance_scale is not None:
            name = "training_guidance_scale" if family.is_guided else "validation_guidance_scale"
            if name not in self.given:
                self.update({name: self.guidance_scale})

    def take_translated(self, family: FamilyDefaults) -> None:
        """Take what another trainer's file means for a family of models, and drop what its program ignores for it."""
        if own := self.of_families.pop(family.pipeline_class, None):
            self.ignore(own.ignored)
            values = {n: value for n, value in own.values.items() if n in self.translated or n not in self.given}
            new = {n: value for n, value in values.items() if n not in self.given or getattr(self, n) != value}
            self.update(values)
            self.translated |= values.keys()
            listed = ", ".join(f"--{name} {value}" for name, value in new.items())
            self.notes += [f"  in its program for {family.title}: {listed}"] if new else []
            self.notes += [f"  DIFFERENT: {name}: {reason}" for name, reason in own.different.items()]
        reasons = dict(family.not_here)
        if "train_text_encoder" in reasons:
            reasons |= dict.fromkeys(WITH_TEXT_ENCODERS, "is used only with --train_text_encoder")
        self.ignore({name: f"it does not apply to {family.title}: it {reason}" for name, reason in reasons.items()})

    def ignore(self, reasons: Mapping[str, str]) -> None:
        """Give options back their defaults that another trainer's file has and its program does not use."""
        for name, reason in reasons.items():
            if name in self.translated & self.given:
                self.given.remove(name)
                setattr(self, name, next(default_of(item) for item in fields(self) if item.name == name))
                self.notes.append(f"  NOT USED: --{name}: {reason}")

    def take_recipe(self, kind: str, title: str) -> None:
        """`--preset`, for a family of models."""
        recipes = RECIPES.get(self.preset or "")
        if not recipes or any(note.startswith(f"--preset {self.preset}") for note in self.notes):
            return
        if kind not in recipes:
            problem = f"--preset {self.preset}: no recipe for {title} is known; wanted other options, or another model"
            self.problems += [] if problem in self.problems else [problem]
            return
        own = not_given(recipes[kind], self.given)
        self.update(own)
        said = ", ".join(f"--{name} {value}" for name, value in own.items())
        self.notes.append(f"--preset {self.preset}: {said} ({recipes[kind].source})")

    def recorded(self) -> dict[str, Any]:
        """Options by name as `run.json` holds them, in JSON's types."""
        values = {name: getattr(self, name) for name, facts in FACTS.items() if facts.recorded}
        return {name: str(v) if name == "concepts" and v else v for name, v in values.items()}

    def value_problems(self) -> Iterable[str]:
        return value_problems(self)


FACTS = facts_of(DreamBoothOptions)
BINDING = [name for name, facts in FACTS.items() if facts.binds]
IN_HEADER = [name for name, facts in FACTS.items() if facts.in_header]
