"""Options read from command lines and files, by the same rules, with every problem collected instead of the first.

    given = Reader(Options, "program").command_line(["--rank", "many", "--rnak", "8"])
    given.values      {}
    given.problems    ["unknown option --rnak (did you mean --rank?)", "--rank: got 'many', wanted a whole number"]

No heavy library is imported here, so that `--help` and bad options are answered at once.
"""

import argparse
import dataclasses
import difflib
import json
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .documents import PARSERS, parse_configuration
from .options import convert, default_of, facts_of, is_import_path, is_switch, takes_many
from .problems import BadInput, printable, shortened

CLOSE = 0.75  # how alike two names must be for one to be suggested in place of the other
MOST_SUGGESTED = 20  # unknown names that are compared with all that there are
LONGEST_FLAG = 100  # characters; the longest of our own has 40


def parse_file(flag: str, path: Path) -> Any:
    """The content of a YAML, JSON or TOML file; raises `BadInput`."""
    if path.suffix.lower() not in PARSERS:
        raise BadInput([f"{flag} {path}: wanted a file named {', '.join(PARSERS)}"])
    try:
        return parse_configuration(path.read_bytes(), path.suffix.lower())
    except OSError as error:
        raise BadInput([f"{flag} {path}: {error.strerror}"]) from error
    except ValueError as error:
        raise BadInput([f"{flag} {path} does not parse: {printable(error, 500)}"]) from error


@dataclass
class Given:
    """The values that were given, by name of the option, and everything that is wrong with the rest."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Collect(argparse.Action):
    """Notes each option with its words, for `Reader` to convert."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        namespace.found.append((option_string.removeprefix("--"), list(values)))


class Parser(argparse.ArgumentParser):
    """Splits a command line into options and words; whatever it finds itself is raised as `BadInput`."""

    def error(self, message: str) -> NoReturn:
        raise BadInput([message])


class Formatter(argparse.HelpFormatter):
    """Shows one name for the value of an option, however many words it takes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        switch = isinstance(action, Collect) and not action.metavar
        return ", ".join(action.option_strings) if switch else super()._format_action_invocation(action)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar) if isinstance(action, Collect) else super()._format_args(action, default_metavar)


def groups(kind: type) -> Iterator[type]:
    """The dataclasses that one is made of, in the order in which they are written."""
    for base in kind.__bases__:
        if base is not object:
            yield from groups(base)
    yield kind


class Reader:
    """Reads options of one dataclass from command lines and from files.

    Args:
        kind: the dataclass.
        program: its name in `--help`.
        answer: what to say of an option that is unknown by this name (without dashes), if more is known than its
            spelling.
        family_titles: short names of families of models, for their defaults in `--help`.
    """

    def __init__(
        self,
        kind: type,
        program: str,
        answer: Callable[[str], str | None] = lambda name: None,
        family_titles: Mapping[str, str] | None = None,
    ) -> None:
        self.kind, self.answer, self.family_titles = kind, answer, family_titles or {}
        self.facts, self.kinds = facts_of(kind), typing.get_type_hints(kind)
        self.names = {alias: name for name, facts in self.facts.items() for alias in (name, *facts.aliases)}
        self.parser = Parser(
            prog=program,
            usage="%(prog)s [--option VALUE ...]",
            description=(kind.__doc__ or "").strip().splitlines()[0],
            allow_abbrev=False,
            formatter_class=Formatter,
        )
        for group in groups(kind):
            if own := [name for name in group.__dict__.get("__annotations__", {}) if name in self.facts]:
                title = (group.__doc__ or "").strip().splitlines()[0].rstrip(".")
                self.add_group(title, own)
        self.flags = {flag for action in self.parser._actions for flag in action.option_strings}

    def add_group(self, title: str, names: Sequence[str]) -> None:
        add = self.parser.add_argument_group(title).add_argument
        for name in names:
            flags = [f"--{alias}" for alias in (name, *self.facts[name].aliases)]
            flags += [f"--no-{name}"] if is_switch(self.kinds[name]) else []
            add(*flags, nargs="*", action=Collect, metavar=self.metavar(name), help=self.help_of(name))

    def metavar(self, name: str) -> str:
        if is_switch(self.kinds[name]):
            return ""
        word = {"int": "N", "float": "X", "dict": "NAME=VALUE ..."}
        text = str(self.kinds[name])
        return next((shown for part, shown in word.items() if part in text), "A B ..." if "list" in text else "TEXT")

    def help_of(self, name: str) -> str:
        item, facts = next(i for i in dataclasses.fields(self.kind) if i.name == name), self.facts[name]
        default = default_of(item)
        silent = default in (None, False, [], {}) and not facts.families
        shown = [*map(str, default)] if isinstance(default, list) else [str(default)]
        text = f"{facts.help}{' One of ' + ', '.join(map(str, facts.choices)) + '.' if facts.choices else ''}"
        others = [f"{self.family_titles.get(family, family)} {value}" for family, value in facts.families.items()]
        own = [] if default is None else [" ".join(shown)]
        return (text if silent else f"{text} (default: {', '.join([*own, *others])})").replace("%", "%%")

    def written_here(self, word: str) -> str:
        """`--learning-rate` and `--no_center_crop` as they are written here; other words as they are."""
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or flag in self.flags:
            return word
        if name not in self.names and name.startswith("no_") and is_switch(self.kinds.get(name[3:])):
            name = f"no-{name[3:]}"
        return f"--{name}{equals}{value}" if f"--{name}" in self.flags else word

    def command_line(self, argv: Sequence[str] | None = None) -> Given:
        """Options on a command line."""
        namespace, given, stray = argparse.Namespace(found=[]), Given(), []
        words = [self.written_here(word) for word in (sys.argv[1:] if argv is None else argv)]
        _, unknown = self.parser.parse_known_args(words, namespace)
        for flag, words in namespace.found:
            name = self.names.get(flag) or self.names[flag.removeprefix("no-")]
            if flag not in self.names:  # --no-flag
                given.values[name] = False
                stray += words
                continue
            if not takes_many(self.kinds[name]):
                stray += words[1:]
                words = words[:1]
            self.take(given, flag, name, words)
        unknown_ones = [
            *self.unknown_options(unknown),
            *(f"got {shortened(word)}, which belongs to no option" for word in stray),
        ]
        given.problems = [*unknown_ones, *given.problems]
        return given

    def mapping(self, config: Mapping[str, Any], ignored: Iterable[str] = ()) -> Given:
        """Options in a file. A value that is null counts as not given; so does one that is `ignored` and off."""
        given, unknown = Given(), []
        for flag, value in config.items():
            if value is None or value in ([], {}) or (flag in ignored and value is False):
                continue
            flag = str(flag).replace("-", "_")
            if flag not in self.names:
                unknown.append(f"--{flag}")
                continue
            name = self.names[flag]
            self.take(given, flag, name, self.words_of(name, value))
        given.problems[:0] = self.unknown_options(unknown)
        return given

    def words_of(self, name: str, value: Any) -> list[str]:
        """The words of a command line that say the same as a value in a file."""
        if isinstance(value, bool):  # YAML reads `no` as false
            off = "no" if "no" in (*self.facts[name].choices, *typing.get_args(self.kinds[name])) else "false"
            return ["true" if value else off]
        if isinstance(value, dict) and not takes_many(self.kinds[name]):  # of an option that takes JSON
            return [json.dumps(value)]
        if isinstance(value, dict):
            return [f"{key}={inner}" for key, inner in value.items()]
        if isinstance(value, list):
            return [f"{i[0]}={i[1]}" if isinstance(i, list) and len(i) == 2 else str(i) for i in value]
        return [str(value)]

    def take(self, given: Given, flag: str, name: str, words: Sequence[str]) -> None:
        """Note one option and its value, or what is wrong with it."""
        kind = self.kinds[name]
        if takes_many(kind) and not words:
            given.problems.append(f"--{flag}: got nothing, wanted one or more")
            return
        if flag != name and takes_many(kind):  # such as diffusers' --lora_layers, with commas between the names
            words = [part.strip() for word in words for part in word.split(",") if part.strip()]
        try:
            value = convert(kind, words)
            written = self.facts[name].import_path and is_import_path(value)  # the case of letters matters in Python
            given.values[name] = value.lower() if self.facts[name].lower and not written else value
        except ValueError as error:
            got = shortened(" ".join(words)) if words else "nothing"
            choices = self.facts[name].choices
            expected = ", ".join(map(str, choices)) if choices else error
            given.problems.append(f"--{flag}: got {got}, wanted {expected}")

    def unknown_options(self, words: Sequence[str]) -> Iterator[str]:
        """An answer to each word that is no option; words that follow an unknown option are its values."""
        inside, count = False, 0
        for word in words:
            if word.startswith("-"):
                count += 1
                if count <= MOST_SUGGESTED:
                    yield self.unknown_option(word)
                inside = "=" not in word
            elif not inside:
                yield f"got {shortened(word)}, which belongs to no option"
        if count > MOST_SUGGESTED:
            yield f"{count - MOST_SUGGESTED} more unknown options"

    def unknown_option(self, word: str) -> str:
        flag = word.split("=")[0]
        if answer := self.answer(flag.lstrip("-").replace("-", "_")):
            return answer
        near = difflib.get_close_matches(flag, self.flags, n=1, cutoff=CLOSE) if len(flag) <= LONGEST_FLAG else []
        return f"unknown option {printable(flag, LONGEST_FLAG)}" + (f" (did you mean {near[0]}?)" if near else "")
