"""The measurements of each step: `metrics.jsonl`, one JSON object per line, and the plot of it.

Losses stay tensors until `flush`, so that a GPU is not waited for at every step.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...utils.documents import parse_json
from ...utils.environment import is_installed
from ...utils.files import atomic_write, write_text
from ...utils.json_lines import lines_of

LOSS_PLOT = "loss.png"
FILE = "metrics.jsonl"
SMOOTHING = 0.95
SHOWN = 100  # rows that the smoothed loss looks back on


class NonFiniteLoss(RuntimeError):
    """Training went wrong and was stopped."""


def read_history(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics, in the order of steps; a line that a full disk or a kill cut off is none."""
    path, rows = Path(run) / FILE, []
    for line in lines_of(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            row = parse_json(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


class History:
    """Appends rows to a run's metrics.

    Args:
        run: folder; None to write nothing, for processes other than the main one.
        first_step: of this process; rows of later steps, from an interrupted run, are dropped.
        every: steps between two looks at the losses.
        overflows: whether gradients may be infinite: with fp16, whose loss scale is found by trying.
    """

    def __init__(self, run: Path | None, first_step: int = 0, every: int = 1, overflows: bool = False) -> None:
        self.first_step, self.every, self.overflows = first_step, every, overflows
        self.pending: list[tuple[int, float, Tensor, Tensor]] = []
        self.rows: list[dict[str, Any]] = []
        self.path = None if run is None else Path(run) / FILE
        if run is not None and first_step:
            self.rows = [row for row in read_history(run) if row["step"] <= first_step]
        if self.path is not None:
            write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in self.rows))

    @property
    def smoothed(self) -> float | None:
        """The training loss of late."""
        losses = [row["loss"] for row in self.rows[-SHOWN:] if "loss" in row]
        return smooth(losses)[-1] if losses else None

    def validated(self, step: int) -> float | None:
        """The validation loss of a step, if this process has measured it. An earlier one may have had other images, and
        only the main process has its rows."""
        losses = [row.get("validation_loss") for row in self.rows if row["step"] == step > self.first_step]
        return next((loss for loss in losses if loss is not None), None)

    def add_step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        self.pending.append((step, lr, loss.detach(), grad_norm.detach()))

    def is_due(self) -> bool:
        """Return whether it is time to look at the losses."""
        return len(self.pending) >= self.every

    def flush(self) -> list[dict[str, Any]]:
        """Read the pending losses and write their rows, up to the first that is not finite.

        Raises:
            NonFiniteLoss: there is one.
        """
        if not self.pending:
            return []
        steps, lrs, losses, norms = zip(*self.pending, strict=True)
        self.pending = []
        rows = [
            {"step": step, "loss": loss, "grad_norm": norm, "lr": lr}
            for step, lr, loss, norm in zip(
                steps, lrs, torch.stack(losses).tolist(), torch.stack(norms).tolist(), strict=True
            )
        ]
        broken = [n for n, row in enumerate(rows) if not self.is_finite(row)]
        good = rows[: broken[0]] if broken else rows
        self.write([row | {"grad_norm": row["grad_norm"] if math.isfinite(row["grad_norm"]) else None} for row in good])
        if broken:
            row = rows[broken[0]]
            raise NonFiniteLoss(
                f"step {row['step']}: the loss is {row['loss']}, its gradient's norm {row['grad_norm']}"
            )
        return rows

    def is_finite(self, row: dict[str, Any]) -> bool:
        return math.isfinite(row["loss"]) and (self.overflows or math.isfinite(row["grad_norm"]))

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows += rows
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in rows)


def smooth(values: Sequence[float], keep: float = SMOOTHING) -> list[float]:
    """Exponential moving average without the bias towards the first value."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        result.append(average / weight)
    return result


def plot_losses(histories: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Loss of each run over its steps, smoothed, and its fixed-noise validation loss, in one plot.

    Draws nothing where matplotlib is not installed, which the preflight has said.
    """
    if not is_installed("matplotlib"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    axes = figure.add_axes((0.09, 0.12, 0.89, 0.85))
    for number, (name, rows) in enumerate(histories.items()):
        trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        checked = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        color = f"C{number}"
        if trained:
            steps, losses = zip(*trained, strict=True)
            axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.7)
            axes.plot(steps, smooth(losses), color=color, label=f"{name}, training (smoothed)")
        if checked:
            axes.plot(*zip(*checked, strict=True), color=color, marker="o", ls="--", label=f"{name}, fixed noise")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", framealpha=0.6)
    with atomic_write(path) as fresh:
        figure.savefig(fresh, dpi=120, format="png")
