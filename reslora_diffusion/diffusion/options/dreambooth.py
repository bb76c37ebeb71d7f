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
from .adapter import AdapterOptions
from .data import DataOptions
from .model import ModelOptions
from .output import OutputOptions
from .recipes import RECIPES, not_given
from .training import ONE_RATE, TrainingOptions


class FamilyDefaults(Protocol):
    """The part of a `models.families.Family` that decides on defaults."""

    title: str
    pipeline_class: str
    is_guided: bool
    not_here: Mapping[str, str]


@dataclass
class DreamBoothOptions(ModelOptions, DataOptions, AdapterOptions, TrainingOptions, OutputOptions):
    """Teach a Stable Diffusion or FLUX.1 pipeline a subject by LoRA or ResLoRA, and export a standard LoRA.

    Attributes:
        given: names of the options that were given; all others have the defaults of the model's family.
        problems: what was wrong with the command line or the file.
        notes: lines on a file that another trainer wrote: what of it was translated, and what was not.
        translated: names of the options that came from such a file.
    """

    given: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    translated: set[str] = field(default_factory=set)

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
        for name in sorted(self.translated & self.given & family.not_here.keys()):  # their programs ignore it
            self.given.remove(name)
            setattr(self, name, next(default_of(item) for item in fields(self) if item.name == name))
            self.notes.append(f"  NOT USED: --{name}: {family.title} {family.not_here[name]}")
        self.take_recipe(kind, family.title)
        for item in fields(self):
            if item.name in FACTS and item.name not in self.given and (families := FACTS[item.name].families):
                setattr(self, item.name, families.get(kind, default_of(item)))
        alone = self.optimizer in ONE_RATE  # as in diffusers' scripts for prodigy
        for name in ("text_encoder_lr", "adam_weight_decay_text_encoder"):
            if name not in self.given and (not self.train_text_encoder or (alone and name == "text_encoder_lr")):
                setattr(self, name, None)
        if self.guidance_scale is not None:
            name = "training_guidance_scale" if family.is_guided else "validation_guidance_scale"
            if name not in self.given:
                self.update({name: self.guidance_scale})

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
