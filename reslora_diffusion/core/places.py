"""`Places` remembers where the layers and factors of an adapter are, and notices when something else is put there.

PEFT's `update_layer` and its EVA initialisation replace factors, and EVA may take an adapter off some layers. Wrappers
around them change nothing here.
"""

from typing import Any

from torch import nn


class Places:
    """Modules of the layers `name -> layer`, each with the dictionary that it stands in."""

    def __init__(self, adapter_name: str, homes: dict[str, nn.Module], layers: dict[str, Any]) -> None:
        self.adapter_name, self.homes = adapter_name, homes
        self.found: list[tuple[dict, str, nn.Module]] = []
        for name, layer in layers.items():
            home, key = homes[name]._modules, name.rpartition(".")[2]
            self.found.append((home, key, home[key]))  # type: ignore[arg-type]
            for side in (layer.lora_A._modules, layer.lora_B._modules):
                self.found.append((side, adapter_name, side[adapter_name]))

    def hold(self) -> bool:
        """Return whether everything is where it was."""
        return all(home.get(key) is module for home, key, module in self.found)

    def differ_from(self, before: "Places") -> bool:
        """Return whether other layers or factors are there than before, rather than wrappers around the old ones."""
        return len(before.found) != len(self.found) or any(
            new is not old and "weight" in new._parameters
            for (*_, new), (*_, old) in zip(self.found, before.found, strict=True)
        )

    def present(self, layers: dict[str, Any]) -> dict[str, Any]:
        """Those layers that are where they were, or wrapped, and still have the adapter."""
        return {name: layer for name, layer in layers.items() if self.is_present(name, layer)}

    def is_present(self, name: str, layer: Any) -> bool:
        found = self.homes[name]._modules.get(name.rpartition(".")[2])
        inside = found is layer or (found is not None and any(module is layer for module in found.modules()))
        return inside and self.adapter_name in layer.lora_A
