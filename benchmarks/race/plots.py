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
    deviation at the best learning rate and around it. The panels reach as high as the reference's line and
    all that is red; trials above that are triangles at the edge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    words = [word for word in analysis.plan.methods if word in analysis.trials]
    columns = min(COLUMNS, len(words))
    rows = -(-len(words) // columns)
    size = (3.3 * columns + 1.5, 2.8 * rows + 0.6)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    alphas = [setting["alpha_over_rank"] for tried in analysis.trials.values() for setting, _ in tried]
    norm = LogNorm(min(alphas) / 1.2, max(alphas) * 1.2)
    reference = envelope(analysis.trials.get(analysis.plan.reference, []))
    spread = {word: seeds(analysis, word) for word in words}
    shown = [loss for _, loss in reference]
    shown += [min((loss for _, loss in envelope(analysis.trials[word])), default=math.inf) for word in words]
    shown += [mean + sign * sd for bars in spread.values() for _, mean, sd in bars for sign in (-1, 1)]
    finite = [loss for loss in shown if math.isfinite(loss)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    reach = high - low or abs(high)
    top = high + 0.08 * reach
    points: Any = None
    for axis, word in zip(axes.flat, words, strict=False):
        axis.plot(*zip(*reference, strict=True), color="lightgrey", linewidth=4, zorder=0)
        tried = [(s, loss) for s, loss in analysis.trials[word] if math.isfinite(loss)]
        for marker, above in (("o", False), ("^", True)):
            some = [(s, min(loss, top)) for s, loss in tried if (loss > top) == above]
            points = axis.scatter(
                [s["learning_rate"] for s, _ in some],
                [loss for _, loss in some],
                c=[s["alpha_over_rank"] for s, _ in some],
                norm=norm,
                cmap="viridis",
                marker=marker,
                s=18,
                clip_on=False,
            )
        axis.plot(*zip(*envelope(tried), strict=True), color="tab:blue", linewidth=1)
        for rate, mean, sd in spread[word]:
            axis.errorbar(rate, mean, sd, color="tab:red", capsize=3, marker="_")
        axis.set(xscale="log", title=word, ylim=(low - 0.05 * reach, top))
    for number, axis in enumerate(axes.flat):
        if number >= len(words):
            axis.axis("off")
        elif number + columns >= len(words):  # nothing is drawn below it
            axis.tick_params(labelbottom=True)
    figure.colorbar(points, ax=axes, label="alpha / rank", shrink=0.6)
    figure.supxlabel("learning rate")
    figure.supylabel("held-out loss of the export")
    figure.suptitle(f"{analysis.plan.name}: trials, grey {analysis.plan.reference}'s, red fresh seeds ± sd")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def levels(analysis: Analysis) -> dict[int, float]:
    """Mean loss of each seed over all methods whose run of it did not diverge."""
    losses: dict[int, list[float]] = {}
    for entry in analysis.methods.values():
        for seed, loss in entry.losses.items():
            if math.isfinite(loss):
                losses.setdefault(seed, []).append(loss)
    return {seed: sum(found) / len(found) for seed, found in losses.items()}


def seeds(analysis: Analysis, word: str) -> list[tuple[float, float, float]]:
    """Learning rates with the mean and standard deviation of the final runs: at the best one and, by their change to it
    in the same seeds, at the others. What a seed does to all methods alike (a harder subject) is not in the spread."""
    if word not in analysis.entries:
        return []
    entry = analysis.entries[word]
    level = levels(analysis)
    finite = {seed: loss for seed, loss in entry.losses.items() if math.isfinite(loss)}
    if not finite:
        return []
    own = sum(finite.values()) / len(finite)
    whole = sum(level[seed] for seed in finite) / len(finite)
    found = {1.0: [loss - level[seed] + whole for seed, loss in finite.items()]}
    found |= {factor: [own + change for change in entry.changes(factor)] for factor in entry.robustness}
    shown = {factor: [loss for loss in losses if math.isfinite(loss)] for factor, losses in found.items()}
    rate = entry.setting["learning_rate"]
    return [(rate * factor, *mean_and_sd(losses)) for factor, losses in shown.items() if len(losses) > 1]
