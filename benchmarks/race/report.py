"""docs/evidence.md and its plots, made of result files alone: no number in them is typed by hand.

python -m benchmarks.race report [--check]
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import results, stages
from .plan import Plan
from .search import best_of, key
from .statistics import Comparison, compare, holm, mean_and_sd, verdict

METRICS = {"exact_match": "exact match", "other_subject_loss": "loss of another subject"}


def by_setting(plan: Plan, folder: Path, stage: str) -> dict[str, dict[tuple, list[dict[str, Any]]]]:
    """Results of a stage: by method (or control), by setting."""
    found: dict[str, dict[tuple, list]] = defaultdict(lambda: defaultdict(list))
    for content in results.all_of(folder, plan):
        if content["stage"] == stage:
            found[content["method"]][key(content["setting"])].append(content)
    return found


def losses_of(contents: list[dict[str, Any]]) -> dict[int, float]:
    return {content["seed"]: content["result"]["loss"] for content in contents}


def number(value: float, digits: int = 3) -> str:
    return "diverged" if value == math.inf else "–" if math.isnan(value) else f"{value:.{digits}g}"


def spread(values: list[float], digits: int = 3) -> str:
    mean, sd = mean_and_sd(values)
    return f"{number(mean, digits)} ± {number(sd, 2)}"


def rows_of(plan: Plan, folder: Path) -> tuple[list[list[str]], dict[str, Comparison]]:
    """The table of one plan: methods at their best setting, then controls; and the comparisons behind it."""
    best = {word: best_of(tried) for word, tried in stages.tuning_so_far(plan, folder).items()}
    final = by_setting(plan, folder, "final")
    controls = by_setting(plan, folder, "controls")
    entries = {word: final[word][key(best[word])] for word in plan.methods if word in best}
    entries |= {name: [c for found in controls[name].values() for c in found] for name in plan.controls}
    entries = {name: contents for name, contents in entries.items() if contents}
    if plan.reference not in entries:
        return [], {}
    reference = losses_of(entries[plan.reference])
    compared = {n: compare(losses_of(c), reference) for n, c in entries.items() if n != plan.reference}
    corrected = holm({name: comparison.p for name, comparison in compared.items()})
    rows = []
    for name, contents in entries.items():
        setting, losses = contents[0]["setting"], losses_of(contents)
        row = [name, f"{setting['learning_rate']:g}", f"{setting['alpha_over_rank']:g}"]
        row += [spread(list(losses.values())), str(len(losses))]
        if name in compared:
            c = compared[name]
            row += [f"{c.difference:+.3g} ({c.low:+.3g} to {c.high:+.3g})", number(corrected[name], 2)]
            row += [verdict(c, corrected[name])]
        else:
            row += ["reference", "", ""]
        row += [spread([c["result"].get(metric, math.nan) for c in contents]) for metric in metrics_of(entries)]
        row += [gap(contents), reached(contents, reference), spread([c["result"]["cpu_seconds"] for c in contents], 2)]
        row += [robustness(plan, final[name], setting)] if name in final else [""]
        rows.append(row)
    return rows, compared


def metrics_of(entries: dict[str, list[dict[str, Any]]]) -> list[str]:
    first = next(iter(entries.values()))[0]["result"]
    return [name for name in METRICS if name in first]


def gap(contents: list[dict[str, Any]]) -> str:
    """What exporting cost: loss of the export minus loss as trained."""
    gaps = [c["result"]["loss"] - c["result"]["loss_as_trained"] for c in contents if not c["result"]["diverged"]]
    return f"{sum(gaps) / len(gaps):+.2g}" if gaps else "–"


def reached(contents: list[dict[str, Any]], reference: dict[int, float]) -> str:
    """The first measured step at which the mean loss was the reference's final one, or less."""
    target = sum(reference.values()) / len(reference)
    curves = [c["result"].get("curve", []) for c in contents]
    for points in zip(*curves, strict=False):
        if sum(point["loss"] for point in points) / len(points) <= target:
            return str(points[0]["step"])
    return "not"


def robustness(plan: Plan, runs: dict[tuple, list[dict[str, Any]]], setting: dict[str, Any]) -> str:
    """Mean losses at the other learning rates."""
    found = []
    for factor in plan.final.robustness:
        other = setting | {"learning_rate": setting["learning_rate"] * factor}
        losses = list(losses_of(runs.get(key(other), [])).values())
        found.append(number(mean_and_sd(losses)[0]) if losses else "–")
    return " / ".join(found)


def section(plan: Plan, folder: Path) -> list[str]:
    """Markdown of one plan."""
    rows, _ = rows_of(plan, folder)
    task, search = plan.task, plan.search
    lines = [f"## {plan.name}", ""]
    lines += [
        f"Task `{task.name}`: rank {task.rank}, {task.steps} steps of {task.batch_size}, {task.lr_scheduler} schedule. "
        f"{search.trials} trials a method on {len(search.seeds)} seed(s), then {len(plan.final.seeds)} fresh seeds.",
        "",
    ]
    if not rows:
        return [*lines, "No final runs yet.", ""]
    entries = by_setting(plan, folder, "final")
    metrics = [METRICS[m] for m in metrics_of({w: next(iter(f.values())) for w, f in entries.items()})]
    head = [
        "method",
        "learning rate",
        "alpha / r",
        "loss ± sd",
        "seeds",
        f"minus {plan.reference} (95 %)",
        "p (Holm)",
        "",
    ]
    factors = " / ".join(f"{f:.2g}" for f in plan.final.robustness)
    head += [*metrics, "merge gap", f"steps to {plan.reference}'s loss", "CPU seconds", f"loss at lr × {factors}"]
    lines += ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    edges = [
        f"{word} ({', '.join(name for name, inside in found.items() if not inside)})"
        for word, found in stages.interior(plan, folder).items()
        if not all(found.values())
    ]
    lines += ["", f"Optima at the edge of what was tried: {'; '.join(edges) or 'none'}.", ""]
    return [*lines, f"![Loss over learning rate](images/race-{plan.name}.png)", ""]


HEAD = """# Evidence

Every method of the table was tuned with the same number of trials over learning rate and alpha, and its best setting
was run on seeds that chose nothing. What is judged is the **exported plain LoRA at equal rank** on the untouched base.
Differences are paired by seed; p values are corrected for the number of methods. A large p shows no equality:
beside it stands the smallest difference that the runs would have shown.

To reproduce: `python -m benchmarks.race run benchmarks/race/plans/<plan>.yaml`, in as many pieces as you like, then
`python -m benchmarks.race report`.
"""


def document(folders: Mapping[Plan, Path]) -> str:
    """The whole page, from the folder of results of each plan."""
    lines = [line for plan, folder in folders.items() for line in section(plan, folder)]
    return "\n".join([HEAD, *lines]).rstrip() + "\n"


def plot(plan: Plan, folder: Path, path: Path) -> None:
    """Loss of every trial over its learning rate, the best alpha of each rate, with the fresh seeds' spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trials = stages.tuning_so_far(plan, folder)
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for word, tried in trials.items():
        best: dict[float, float] = {}
        for setting, loss in tried:
            rate = setting["learning_rate"]
            best[rate] = min(loss, best.get(rate, math.inf))
        points = sorted((rate, loss) for rate, loss in best.items() if loss < math.inf)
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=word)
    final = by_setting(plan, folder, "final")
    for line, word in zip(axis.get_lines(), trials, strict=True):
        for found in final.get(word, {}).values():
            losses = [loss for loss in losses_of(found).values() if loss < math.inf]
            if len(losses) > 1:
                mean, sd = mean_and_sd(losses)
                axis.errorbar(found[0]["setting"]["learning_rate"], mean, sd, color=line.get_color(), capsize=3)
    axis.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="held-out loss of the export", title=plan.name)
    axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
