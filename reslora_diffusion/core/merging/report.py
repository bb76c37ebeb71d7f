"""The cost of merging, measured on batches other than those of calibration."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ...rules import DEFAULT_ADAPTER
from ..adapter import Forward
from ..attach import get_adapter
from .calibrate import Mask, call, evaluating, relative_output_errors
from .merge import merged_forward

EXACT_ERROR = 1e-5  # relative output error below which a link is called exact


@dataclass(frozen=True)
class MergeReport:
    """Held-out loss as trained and as merged, and each layer's relative output error."""

    shortcut: str
    merge_method: str
    loss_trained: float
    loss_merged: float
    output_errors: dict[str, float]
    loss_base: float | None = None  # of the model without the adapter, where it was measured

    @property
    def gap(self) -> float:
        return self.loss_merged - self.loss_trained

    @property
    def exact(self) -> list[str]:
        """Layers that merge exactly: all of `block`, and where layers read the same tensor."""
        return [name for name, error in self.output_errors.items() if error < EXACT_ERROR]

    def to_dict(self) -> dict[str, Any]:
        facts = {name: value for name, value in asdict(self).items() if value is not None}
        return facts | {"gap": self.gap, "exact": self.exact}

    def __str__(self) -> str:
        base = "" if self.loss_base is None else f"{self.loss_base:.5f} of the base, "
        lines = [
            f"shortcut {self.shortcut}, merged by {self.merge_method}: held-out loss {base}"
            f"{self.loss_trained:.5f} as trained, {self.loss_merged:.5f} merged (gap {self.gap:+.1e})"
        ]
        if self.output_errors:
            lines.append(f"{len(self.exact)} of {len(self.output_errors)} layers merge exactly")
        if len(self.exact) < len(self.output_errors):
            worst = max(self.output_errors, key=lambda name: self.output_errors[name])
            mean = sum(self.output_errors.values()) / len(self.output_errors)
            lines.append(f"relative output error: mean {mean:.1e}, largest {self.output_errors[worst]:.1e} in {worst}")
        return "\n".join(lines)


def loss_of(model: nn.Module, batch: Any) -> Any:
    """`model(**batch).loss`.

    Raises:
        ValueError: the model returns none, because the batch has no labels or models of its kind never do.
    """
    loss = getattr(call(model, batch), "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returns no loss; give batches with labels, or `loss`")
    return loss


def merge_report(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward = call,
    loss: Callable[[nn.Module, Any], Any] = loss_of,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    mask: Mask | None = None,
) -> MergeReport:
    """Compare the adapter as trained with the plain LoRA it merges into; `calibrate` first.

    Args:
        batches: held out, read several times.
        forward: runs the model on a batch; `model(**batch)` if not given.
        mask: which tokens of a batch count in the layers' errors, as in `calibrate`.
        loss: of a batch, a float or a tensor of one number, averaged over batches; `model(**batch).loss` if not given.
    """
    adapter = get_adapter(model, adapter_name)
    adapter.require_active()

    def mean_loss() -> float:
        with evaluating(model):
            return sum(float(loss(model, batch)) for batch in batches) / len(batches)

    trained = mean_loss()
    with merged_forward(model, adapter_name):
        merged = mean_loss()
    return MergeReport(
        shortcut=str(adapter.shortcut),
        merge_method=str(adapter.config.merge_method),
        loss_trained=trained,
        loss_merged=merged,
        output_errors=relative_output_errors(model, batches, forward, adapter_name, mask=mask),
    )
