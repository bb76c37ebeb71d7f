"""The floors of the house: a file imports only from its own floor or a lower one, the ecosystem where it belongs."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "reslora_diffusion"
# What each floor may use of the others, and which libraries are its own business.
MAY_IMPORT = {
    "utils": {"utils"},
    "core": {"utils", "core"},
    "methods": {"utils", "core", "methods"},
    "export": {"utils", "core", "export"},
    "diffusion": {"utils", "core", "methods", "export", "diffusion"},
    "llm": {"utils", "core", "methods", "export", "llm"},
    "tuning": {"utils", "diffusion", "llm", "tuning"},
}
KEPT_OUT = {
    "utils": {"torch", "diffusers", "transformers", "peft", "accelerate", "gradio", "typer"},
    "core": {"diffusers", "transformers", "accelerate", "gradio", "typer"},
    "methods": {"diffusers", "transformers", "gradio", "typer"},
    "export": {"gradio"},
    "llm": {"diffusers", "gradio"},
    "diffusion": {"gradio"},
    "tuning": {"gradio", "typer"},
}


def imported(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, at the top or inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names |= {module} | ({f"{module}.{alias.name}" for alias in node.names} if not node.module else set())
    return names


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_imports_go_down(floor: str) -> None:
    for path in sorted((PACKAGE / floor).glob("**/*.py")):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "reslora_diffusion" and len(parts) > 1 and parts[1] in MAY_IMPORT:
                assert parts[1] in MAY_IMPORT[floor], f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in {"app", "train_scripts", "tests"}, f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in KEPT_OUT[floor], f"{path.relative_to(ROOT)} imports {name}"


def test_the_ground_needs_nothing() -> None:
    """What every floor stands on imports the standard library alone."""
    for name in imported(PACKAGE / "utils" / "problems.py"):
        ours = name.startswith("reslora_diffusion.utils")
        assert ours or name.split(".")[0] in sys.stdlib_module_names, name


def test_comparing_knows_no_gradio() -> None:
    """The page is a view: what it shows is made by modules that could as well serve a command line."""
    for name in ("compare", "request", "measures", "votes", "adapters"):
        assert not any(module.split(".")[0] == "gradio" for module in imported(ROOT / "app" / f"{name}.py")), name


def modules_of(folder: str) -> dict[str, Path]:
    """Files of a floor by dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (PACKAGE / folder).glob("**/*.py")
    }


@pytest.mark.parametrize("floor", ["utils", "core", "methods", "export", "diffusion", "llm", "tuning"])
def test_no_import_goes_in_a_circle(floor: str) -> None:
    files = modules_of(floor)
    uses = {name: {other for other in imported(path) if other in files} - {name} for name, path in files.items()}
    while free := [name for name, others in uses.items() if not others & uses.keys()]:
        for name in free:
            del uses[name]
    assert not uses, f"these import each other: {sorted(uses)}"


def test_kernels_know_nothing_of_adapters() -> None:
    for name, path in modules_of("core/kernels").items():
        ours = {other for other in imported(path) if other.startswith("reslora_diffusion")}
        strange = {
            o for o in ours if not o.startswith(("reslora_diffusion.core.kernels", "reslora_diffusion.core.functional"))
        }
        assert not strange - {"reslora_diffusion.core"}, name


def test_private_parts_of_peft_stand_in_one_folder() -> None:
    private = re.compile(r"\.(lora_variant|_cast_input_dtype|_remap_adapter_state_dict_for_load)\b")
    for path in PACKAGE.glob("**/*.py"):
        if path.parent != PACKAGE / "core" / "peft":
            assert not private.search(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


def test_importing_the_package_is_cheap() -> None:
    heavy = {"torch", "peft", "diffusers", "transformers"}
    code = f"import sys, reslora_diffusion.diffusion; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["reslora_diffusion", "reslora_diffusion.diffusion"])
def test_public_names_resolve(name: str) -> None:
    module = importlib.import_module(name)
    for public in module.__all__:
        assert getattr(module, public) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense
