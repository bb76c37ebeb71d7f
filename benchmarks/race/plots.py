"""The plot of a tuned race: loss over learning rate, one panel for each method, LoRA's in all of them in grey."""

import math
from pathlib import Path
from typing import Any

from .analysis import Analysis
from .search import Setting
from .statistics import mean_and_sd

COLUMNS = 4


def envelope(tried: list[tuple[Setting, float]]) -> list[tuple[float, float]]:
    """The least loss of any alpha at each learning rate."""
    best: dict[float, float] = {}
    for setting, loss in tried:
        rate = setting["learning_rate"]
        best[rate] = min(loss, best.get(rate, math.inf))
    return sorted((rate, loss) for rate, loss in best.items() if math.isfinite(loss))


def plot(analysis: Analysis, path: Path) -> None:
    """Every trial as a point coloured by alpha / rank; lines through the best alpha; the fresh seeds' mean and standard
    deviation at the best learning rate and around it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    words = list(analysis.trials)
    rows = -(-len(words) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(14, 3 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    alphas = [setting["alpha_over_rank"] for tried in analysis.trials.values() for setting, _ in tried]
    norm = LogNorm(min(alphas), max(max(alphas), min(alphas) * 1.01))
    reference = envelope(analysis.trials.get(analysis.plan.reference, []))
    points: Any = None
    for axis, word in zip(axes.flat, words, strict=False):
        axis.plot(*zip(*reference, strict=True), color="lightgrey", linewidth=4, zorder=0)
        tried = [(s, loss) for s, loss in analysis.trials[word] if math.isfinite(loss)]
        points = axis.scatter(
            [s["learning_rate"] for s, _ in tried],
            [loss for _, loss in tried],
            c=[s["alpha_over_rank"] for s, _ in tried],
            norm=norm,
            cmap="viridis",
            s=14,
        )
        axis.plot(*zip(*envelope(tried), strict=True), color="tab:blue", linewidth=1)
        seeds(axis, analysis, word)
        axis.set(xscale="log", yscale="log", title=word)
    for axis in axes.flat[len(words) :]:
        axis.axis("off")
    figure.colorbar(points, ax=axes, label="alpha / rank", shrink=0.6)
    figure.supxlabel("learning rate")
    figure.supylabel("held-out loss of the export")
    figure.suptitle(
        f"{analysis.plan.name}: trials (points), {analysis.plan.reference} (grey), fresh seeds ± sd, paired (red)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def levels(analysis: Analysis) -> dict[int, float]:
    """Mean loss of each seed over all methods whose run of it did not diverge."""
    losses: dict[int, list[float]] = {}
    for entry in analysis.methods.values():
        for seed, loss in entry.losses.items():
            if math.isfinite(loss):
                losses.setdefault(seed, []).append(loss)
    return {seed: sum(found) / len(found) for seed, found in losses.items()}


def seeds(axis: Any, analysis: Analysis, word: str) -> None:
    """Mean and standard deviation of the final runs, at the best learning rate and, by their change to it in the
    same seeds, at the others. What a seed does to all methods alike (a harder subject) is left out of the spread."""
    if word not in analysis.entries:
        return
    entry = analysis.entries[word]
    level = levels(analysis)
    finite = {seed: loss for seed, loss in entry.losses.items() if math.isfinite(loss)}
    if not finite:
        return
    own = sum(finite.values()) / len(finite)
    whole = sum(level[seed] for seed in finite) / len(finite)
    best = [loss - level[seed] + whole for seed, loss in finite.items()]
    for factor, losses in {1.0: best, **{f: [own + c for c in entry.changes(f)] for f in entry.robustness}}.items():
        shown = [loss for loss in losses if math.isfinite(loss)]
        if len(shown) > 1:
            rate = entry.setting["learning_rate"] * factor
            mean, sd = mean_and_sd(shown)
            axis.errorbar(rate, mean, min(sd, 0.99 * mean), color="tab:red", capsize=3, marker="_")
