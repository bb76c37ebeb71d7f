"""What was measured at each step: `metrics.jsonl`, one JSON object per line, and the plot of it.

Losses stay tensors until `flush`, so that a GPU is not waited for at every step.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "metrics.jsonl"
SMOOTHING = 0.95


class NonFiniteLoss(RuntimeError):
    """Training went wrong and was stopped."""


def read_history(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics, in the order of steps."""
    path = Path(run) / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


class History:
    """Appends rows to a run's metrics.

    Args:
        first_step: of this process; rows of later steps, from an interrupted run, are dropped.
        every: steps between two looks at the losses.
    """

    def __init__(self, run: Path, first_step: int, every: int = 1) -> None:
        self.rows = [row for row in read_history(run) if row["step"] <= first_step]
        self.path, self.every = Path(run) / FILE, every
        self.pending: list[tuple[int, float, Tensor, Tensor]] = []
        self.smoothed: float | None = None
        self.path.write_text("".join(f"{json.dumps(row)}\n" for row in self.rows))

    def add_step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> list[dict[str, Any]]:
        """Keep a training step; returns the rows that became readable, if it was time to look."""
        self.pending.append((step, lr, loss.detach(), grad_norm.detach()))
        return self.flush() if len(self.pending) >= self.every else []

    def flush(self) -> list[dict[str, Any]]:
        """Read the pending losses and write their rows.

        Raises:
            NonFiniteLoss: one of them is not finite.
        """
        if not self.pending:
            return []
        steps, lrs, losses, norms = zip(*self.pending, strict=True)
        self.pending = []
        losses = torch.stack(losses).tolist()
        norms = torch.stack(norms).tolist()
        rows = []
        for step, lr, loss, norm in zip(steps, lrs, losses, norms, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLoss(f"the loss of step {step} is {loss}")
            self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
            rows.append({"step": step, "loss": loss, "grad_norm": norm, "lr": lr})
        self.write(rows)
        return rows

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows += rows
        with self.path.open("a") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)


def smooth(values: Sequence[float], keep: float = SMOOTHING) -> list[float]:
    """Exponential moving average without the bias towards the first value."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        result.append(average / weight)
    return result


def plot_losses(histories: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Loss of each run over its steps, smoothed, and its fixed-noise validation loss, in one plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
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
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    fresh = path.with_name(f".{path.name}")
    figure.savefig(fresh, dpi=120, format="png")
    fresh.replace(path)
