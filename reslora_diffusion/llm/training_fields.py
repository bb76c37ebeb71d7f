"""The fields of `transformers.TrainingArguments`, from its source file: importing it takes seconds, for torch.

    fields_of_training() -> a dataclass with the same fields, defaults and help texts, and without the methods

The body of the class is run as it stands, without its methods. Every name in it is looked up where the file has it
from: the standard library and `transformers.utils`, which load no torch, are imported; classes and assignments of
other files of transformers are run alone, in the same way. A type of another package is only a name here.
"""

import ast
import builtins
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module or class, and those in its branches."""
    for node in body:
        if isinstance(node, ast.If):
            yield from statements([*node.body, *node.orelse])
        else:
            yield node


def bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement gives a value to."""
    if isinstance(node, ast.ImportFrom | ast.Import):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.ClassDef | FUNCTIONS):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def names_in(node: ast.stmt) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


class Source:
    """A file of transformers of which single names are evaluated."""

    def __init__(self, module: str) -> None:
        self.module = module  # under transformers
        self.known: dict[str, Any] = {"__name__": __name__}

    @cached_property
    def tree(self) -> ast.Module:
        (folder,) = find_spec("transformers").submodule_search_locations
        return ast.parse(Path(folder, *self.module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))

    @cached_property
    def binding(self) -> dict[str, ast.stmt]:
        found: dict[str, ast.stmt] = {}
        for node in statements(self.tree.body):
            for name in bound(node):
                found.setdefault(name, node)
        return found

    def __getitem__(self, name: str) -> Any:
        """The value of a name."""
        if name not in self.known:
            node = self.binding[name]
            if isinstance(node, ast.ImportFrom):
                self.known[name] = self.imported(node, name)
            elif isinstance(node, ast.Import):
                self.known[name] = import_module(name)
            else:
                self.run(node)
        return self.known[name]

    def run(self, node: ast.stmt) -> None:
        """A class without its methods, or an assignment."""
        if isinstance(node, ast.ClassDef):
            methods = {part.name for part in node.body if isinstance(part, FUNCTIONS)}
            node.decorator_list = []
            node.body = [part for part in node.body if not isinstance(part, FUNCTIONS) and not names_in(part) & methods]
        inner = {}
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom):
                inner |= {alias.name: part for alias in part.names}
        for name in sorted(
            names_in(node) & (inner.keys() | self.binding.keys()) - set(bound(node)) - set(vars(builtins))
        ):
            self.known[name] = self.imported(inner[name], name) if name in inner else self[name]
        node = WithoutImports().visit(node)
        exec(compile(ast.fix_missing_locations(ast.Module([node], [])), self.module, "exec"), self.known)

    def imported(self, node: ast.ImportFrom, name: str) -> Any:
        original = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
        if node.level == 1 and node.module.split(".")[0] != "utils":
            return Source(node.module)[original]
        if node.level:
            return getattr(import_module(f"transformers.{node.module}"), original)
        if node.module.split(".")[0] in sys.stdlib_module_names:
            return getattr(import_module(node.module), original)
        return type(original, (), {})


class WithoutImports(ast.NodeTransformer):
    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.Pass:
        return ast.Pass()


def fields_of_training() -> type:
    """Raises whatever goes wrong where another version of transformers is written in another way."""
    return dataclass(Source("training_args")["TrainingArguments"])
