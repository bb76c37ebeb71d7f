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
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_imports_go_down(floor: str) -> None:
    files = sorted((PACKAGE / floor).glob("**/*.py"))
    assert files
    for path in files:
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
    assert files
    uses = {name: {other for other in imported(path) if other in files} - {name} for name, path in files.items()}
    while free := [name for name, others in uses.items() if not others & uses.keys()]:
        for name in free:
            del uses[name]
    assert not uses, f"these import each other: {sorted(uses)}"


def test_kernels_know_nothing_of_adapters() -> None:
    allowed = tuple(f"reslora_diffusion.core.{name}" for name in ("kernels", "functional"))
    for name, path in modules_of("core/kernels").items():
        ours = {other for other in imported(path) if other.startswith("reslora_diffusion")} - {"reslora_diffusion.core"}
        assert not [other for other in ours if not other.startswith(allowed)], name


def test_a_name_that_is_imported_from_a_package_may_be_a_module(tmp_path: Path, monkeypatch) -> None:
    """`from reslora_diffusion.core import adapter` imports `core.adapter`, like every other way to write it."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "reslora_diffusion" / "core" / "kernels" / "odd.py"
    path.parent.mkdir(parents=True)
    for line in ("from reslora_diffusion.core import adapter", "from ...core import adapter", "from .. import adapter"):
        path.write_text(line)
        assert "reslora_diffusion.core.adapter" in imported(path), line


def test_private_parts_of_peft_stand_in_one_folder() -> None:
    private = re.compile(r"\.(lora_variant|_cast_input_dtype|_remap_adapter_state_dict_for_load)\b")
    for path in PACKAGE.glob("**/*.py"):
        if path.parent != PACKAGE / "core" / "peft":
            assert not private.search(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


def test_importing_the_package_is_cheap() -> None:
    heavy = {"torch", "peft", "diffusers", "transformers"}
    code = f"import sys, reslora_diffusion.diffusion; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["", ".diffusion", ".export", ".methods.schedules"])
def test_public_names_resolve(name: str) -> None:
    module = importlib.import_module(f"reslora_diffusion{name}")
    for public in module.__all__:
        assert getattr(module, public) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = module.nonsense


def test_docstrings_are_sentences() -> None:
    """A docstring that begins with a question word, a preposition or a pronoun answers a question that the reader has
    to guess, or refers to the one above it."""
    words = "What|Whether|How|Which|Why|Where|When|Who|Of|By|As|In what|In place|On|That|From|For|With|Without"
    headings = re.compile(rf"({words}|Also|Those|Itself|Nothing|Args|See)\b|The same( of| with| for| from|,)")
    found = []
    folders = (PACKAGE, *(ROOT / name for name in ("app", "benchmarks", "train_scripts")))
    for path in sorted(path for folder in folders for path in folder.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                if headings.match(line):
                    found.append(f"{path.relative_to(ROOT)}: {line}")
    assert not found, "wanted sentences such as 'Return whether ...': " + "; ".join(found)
