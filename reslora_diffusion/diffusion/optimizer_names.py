"""Which optimizers there are, known without torch: those that the source of `torch.optim` imports, and three more."""

import ast
from argparse import Namespace
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

OTHERS = {"adafactor": None, "adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}  # and the packages they need
NOT_FOR_ADAPTERS = ("optimizer", "sparseadam", "lbfgs")


@cache
def optimizer_names() -> dict[str, str]:
    """Names of the classes in `torch.optim` by lower-case name."""
    source = Path(find_spec("torch").origin).parent / "optim" / "__init__.py"
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = {name.lower(): name for name in sorted(imported) if name[0].isupper()}
    return {name: kind for name, kind in names.items() if name not in NOT_FOR_ADAPTERS}


def name_of(args: Namespace) -> str:
    return "adamw8bit" if args.use_8bit_adam else args.optimizer


def name_problems(args: Namespace) -> Iterator[str]:
    """An optimizer that there is none of."""
    known = {*optimizer_names(), *OTHERS}
    if name_of(args).lower() not in known:
        yield f"--optimizer: got {args.optimizer!r}, wanted {', '.join(sorted(known))}"
