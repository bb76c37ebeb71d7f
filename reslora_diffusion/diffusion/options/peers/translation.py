"""The result of translating another trainer's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ....utils.problems import listing, printable
from ..dreambooth import OfFamily

MANY = 200  # names that one line lists
OFF: tuple[Any, ...] = (None, "", False, 0, "0", [], {}, "none", "None")


def is_off(value: Any) -> bool:
    """Return whether a value says that an option is not used, as graphical programs write it."""
    return any(type(value) is type(off) and value == off for off in OFF) or (isinstance(value, float) and value == 0)


def remarks(not_used: Mapping[str, str], different: Mapping[str, str]) -> list[str]:
    """Lines on what was not translated, or not quite."""
    lines = [f"  NOT USED: {name}: {reason}" for name, reason in not_used.items()]
    return lines + [f"  DIFFERENT: {name}: {reason}" for name, reason in different.items()]


@dataclass
class Translation:
    """Options here, and what is to be said of the rest.

    Attributes:
        source: what was read, in words.
        values: options here, by name, as a configuration file would have them.
        names: option here, by the name in the source.
        not_needed: names whose effect is the default here.
        not_used: names that have no counterpart, each with the reason.
        different: names that were translated to what is not quite the same, each with what differs.
        of_families: what waits for the family of the model, by the class of its pipeline.
        assumed: options here that the source leaves to its program's own defaults.
        problems: what contradicts itself.
    """

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    not_needed: list[str] = field(default_factory=list)
    not_used: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)
    of_families: dict[str, OfFamily] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def take(self, old: str, **values: Any) -> None:
        """Translate an option `old`."""
        self.values |= values
        self.names[old] = ", ".join(f"--{name}" for name in values)

    def assume(self, **values: Any) -> None:
        """Take defaults of the source's program where it says nothing."""
        for name, value in values.items():
            if name not in self.values:
                self.values[name] = value
                self.assumed.append(name)

    def lines(self) -> list[str]:
        """Lines for the preflight: the translated options and those that were not translated."""
        renamed = [f"{old} as {new}" for old, new in self.names.items() if new != f"--{old}"]
        same = [old for old, new in self.names.items() if new == f"--{old}"]
        lines = [f"{self.source}: {len(self.names)} options translated"]
        lines += [f"  as they are: {listing(same, MANY)}"] if same else []
        lines += [f"  under other names: {listing(renamed, MANY)}"] if renamed else []
        assumed = (f"--{name} {printable(self.values[name], 60)}" for name in self.assumed)
        lines += [f"  defaults of its program: {listing(assumed, MANY)}"] if self.assumed else []
        lines += [f"  not needed here: {listing(self.not_needed, MANY)}"] if self.not_needed else []
        return [*lines, *remarks(self.not_used, self.different)]
