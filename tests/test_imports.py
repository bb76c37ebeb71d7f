"""Whatever is imported first, it can be, and PEFT knows ResLoRA afterwards.

PEFT's import fills in its tables from a module of ours. If a module of ours is what imports PEFT, that one is half
imported by then: so each is tried as the first, in a process that has not imported PEFT.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRY_EACH = """
import importlib, os, sys
import torch
from transformers import PreTrainedModel
import reslora_diffusion
assert "peft" not in sys.modules
for first in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            module, _, name = first.partition(":")
            getattr(importlib.import_module(module), name or "__name__")
            import peft
            status = 0 if {"RESLORA"} <= peft.PEFT_TYPE_TO_TUNER_MAPPING.keys() else 1
        except ImportError as error:
            print(error, file=sys.stderr)
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        print(first)
"""


def fail_as_first(names: list[str]) -> list[str]:
    """The modules, and `module:name`s, that cannot be imported first."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", TRY_EACH, *names],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    return process.stdout.split()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_public_name_can_be_imported_first() -> None:
    names = ("ResLoraConfig", "attach", "merged_state_dict")
    assert fail_as_first(["peft", *(f"reslora_diffusion:{name}" for name in names)]) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("floor", ["core", "methods", "export", "diffusion", "llm", "tuning"])
def test_a_module_can_be_imported_first(floor: str) -> None:
    files = sorted((ROOT / "reslora_diffusion" / floor).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    assert names
    assert fail_as_first(names) == []
