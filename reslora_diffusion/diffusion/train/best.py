"""The step to export under `--keep_best`: the one whose exported LoRA had the least loss on held-out images.

What is stored is that LoRA itself, in plain factors, not the adapters it came from: a later fold or restart changes
those. It is part of every checkpoint, so a continued run chooses the same step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from reslora_diffusion.core.functional import LoraFactors, Magnitude, with_magnitude
from reslora_diffusion.core.merging.report import MergeReport

MAGNITUDE = "magnitude"  # of a DoRA, in a checkpoint
ROWS = "new_tokens"
Factors = dict[str, dict[str, LoraFactors]]  # by component and layer
Rows = dict[str, Tensor]  # of new tokens, by component


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


@dataclass(frozen=True)
class Best:
    """Losses are on the fixed noise of the held-out images."""

    step: int
    loss_trained: float
    loss_merged: float
    factors: Factors
    new_tokens: Rows = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        step: int,
        loss_trained: float,
        loss_merged: float,
        factors: Factors,
        new_tokens: Rows,
    ) -> "Best":
        """Copy the factors to the CPU, where the rows of new tokens are."""
        copied = {
            component: {
                name: with_magnitude(
                    LoraFactors(on_cpu(one.lora_A), on_cpu(one.lora_B), one.scaling),
                    one.magnitude and Magnitude(on_cpu(one.magnitude.values), one.magnitude.of_base),
                )
                for name, one in layers.items()
            }
            for component, layers in factors.items()
        }
        return cls(step, loss_trained, loss_merged, copied, new_tokens)

    def report(self, last: MergeReport) -> MergeReport:
        """The last step's report with the losses of this step, at which errors of single layers were not measured."""
        return replace(last, loss_trained=self.loss_trained, loss_merged=self.loss_merged, output_errors={})

    def facts(self) -> dict[str, Any]:
        """Everything but the tensors, in JSON's types."""
        return {
            "step": self.step,
            "loss_trained": self.loss_trained,
            "loss_merged": self.loss_merged,
            "scaling": {component: {n: f.scaling for n, f in own.items()} for component, own in self.factors.items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        """All factors, named by component, layer and factor with spaces between them: no name of a layer holds one."""
        found = {f"{component} {ROWS}": rows for component, rows in self.new_tokens.items()}
        for component, layers in self.factors.items():
            for name, one in layers.items():
                found |= {f"{component} {name} lora_A": one.lora_A, f"{component} {name} lora_B": one.lora_B}
                if one.magnitude is not None:
                    found[f"{component} {name} {MAGNITUDE}"] = one.magnitude.values
        return found

    @classmethod
    def from_state(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Best":
        """Inverse of `facts` and `tensors`."""

        def one(name: str, scaling: float) -> LoraFactors:
            A, B, lengths = (tensors.get(f"{name} {kind}") for kind in ("lora_A", "lora_B", MAGNITUDE))
            if A is None or B is None:
                raise KeyError(f"{name} lora_A")
            return with_magnitude(
                LoraFactors(on_cpu(A), on_cpu(B), scaling), None if lengths is None else Magnitude(on_cpu(lengths))
            )

        factors = {
            component: {name: one(f"{component} {name}", scaling) for name, scaling in layers.items()}
            for component, layers in facts["scaling"].items()
        }
        ends = f" {ROWS}"
        rows = {name.removesuffix(ends): on_cpu(value) for name, value in tensors.items() if name.endswith(ends)}
        return cls(facts["step"], facts["loss_trained"], facts["loss_merged"], factors, rows)
