"""PEFT learns of `ResLoraConfig`, in whatever order the two packages are imported.

`PeftModel.from_pretrained` looks the type RESLORA up in PEFT's tables. If PEFT is imported already, `reslora_diffusion`
writes itself there at once; if not, as soon as it is. So neither import is made slower by the other one's libraries.
"""

import importlib.util
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_peft() -> None:
    """Register now, or when `peft` is imported."""
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterPeft())


def register() -> None:
    """Import the module that writes ResLoRA into PEFT's tables.

    If `core.config` is what imports PEFT now, that module could not import it; `core.config` asks again at its end.
    """
    config = sys.modules.get("reslora_diffusion.core.config")
    if config is None or hasattr(config, "ResLoraConfig"):
        import_module("reslora_diffusion.core.peft.model")


class AfterPeft(MetaPathFinder):
    """Finds `peft` where it is found without this finder, and registers once it has run.

    Others may ask for it without importing it, as diffusers does to learn whether PEFT is installed.
    """

    def __init__(self) -> None:
        self.searching = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
