"""docs/evidence.md, made of result files alone: no number in it is typed by hand.

python -m benchmarks.race report [--check] [--add FOLDER]
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.results import FOLDER as RESULTS

from .advice import advice, paper_beside_tuned
from .analysis import Analysis, Entry
from .context import NAMES, TASKS, defaults, not_run
from .own_data import tuning_on_own_data
from .plan import Plan
from .statistics import Comparison, verdict
from .words import count, loss_with_spread, number, own_options, p_value, settings_of, signed, spread, table

METRICS = {
    "exact_match": "exact match",
    "subject": "images of the subject",
    "background": "right background",
    "other_subject_loss": "loss of another subject",
}

HEAD = """# Evidence: the LoRA family, each method tuned alike

*This page is generated from the files in `benchmarks/results/race` by `python -m benchmarks.race report`;
`make evidence-check` compares.*
"""
READING = """In a tuned race every method gets the same number of trials over learning rate and alpha on tuning seeds,
and its best setting is run on fresh seeds. What is judged is never the adapter as trained but the **exported plain
LoRA, cut to the same rank for all**, on the untouched base and on held-out data.

How to read the tables:

- Differences are paired by seed (method minus LoRA, negative is better), with the 95 % interval of a paired t-test.
- p values are corrected for the number of comparisons in a table by Holm's step-down method, and the verdict follows
  them. The intervals are not corrected: one may lie on one side of zero where the verdict is "no difference shown",
  because among so many comparisons some do by chance.
- "No difference shown" is not equality. Beside it stands the smallest true difference that the runs would have shown
  with 80 % power, at the 5 % level, before correction.
- Times are processor seconds of one thread, so that runs may share a machine. They are noisy by some per cent.
"""


def document(found: Sequence[Analysis], tuned_results: Path = RESULTS) -> str:
    """The whole page, from all races and the files `tuned-<task>.json` in a folder."""
    tuned, published = ([a for a in found if a.is_tuned == kind] for kind in (True, False))
    parts = [HEAD, READING, NAMES, "## What to choose", advice(tuned, published), defaults(tuned)]
    for analysis in published:
        parts += [paper_section(analysis, tuned)]
    for analysis in tuned:
        parts += [section(analysis)]
    parts += [tuning_on_own_data(tuned_results), not_run([a.plan for a in found]), reproduce(found)]
    return joined(parts)


def page(analysis: Analysis) -> str:
    """A race alone, of a plan that is not one of ours."""
    own = section(analysis) if analysis.is_tuned else paper_section(analysis, [])
    return joined([f"# {analysis.plan.name}", READING, NAMES, own])


def joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------------------- sections


def section(analysis: Analysis) -> str:
    """A tuned race."""
    plan, task = analysis.plan, analysis.plan.task
    parts = [
        f"## {plan.name}",
        f"Task `{task.name}`: rank {task.rank}, {task.steps} steps of {task.batch_size}, {task.lr_scheduler} decay of "
        f"the learning rate after a warm-up of {task.warmup_steps}. {plan.search.trials} trials for each of "
        f"{len(plan.methods)} methods on {count(plan.search.seeds, 'seed')}, then {len(plan.final.seeds)} fresh seeds.",
        TASKS[task.name][1],
        completeness(analysis),
    ]
    if analysis.reference is None:
        return "\n\n".join([*parts, *tuning_section(analysis)])
    parts += ["### Loss of the export", losses_table(analysis)]
    parts += ["### At equal time instead of equal steps", equal_time(analysis)]
    parts += ["### Cost, settings and robustness", costs_table(analysis), edges(analysis)]
    parts += [text] if (text := better_controls(analysis)) else []
    return "\n\n".join([*parts, plot_line(analysis)])


def paper_section(analysis: Analysis, tuned: Sequence[Analysis]) -> str:
    """An untuned race, beside the tuned one of the same task."""
    rates = analysis.plan.search
    parts = [
        f"## The paper's setting ({analysis.plan.name})",
        f"Every method has learning rate {rates.learning_rate[0]:g} and alpha = {rates.alpha_over_rank[0]:g} x rank, "
        f"untouched. Task `{analysis.plan.task.name}`, rank {analysis.plan.task.rank}, {analysis.plan.task.steps} "
        f"steps, {len(analysis.plan.final.seeds)} seeds.",
        completeness(analysis),
    ]
    if analysis.reference is not None:
        beside = next((a for a in tuned if a.plan.task.name == analysis.plan.task.name), None)
        parts += [losses_table(analysis), costs_table(analysis), paper_beside_tuned(analysis, beside)]
    return "\n\n".join(parts)


def completeness(analysis: Analysis) -> str:
    """Say how much of the plan has been run."""
    done = analysis.progress
    kind = "trials" if analysis.is_tuned else "first runs"
    runs = f"{done.trials} of {done.trials_wanted} {kind}, {done.final} of {done.final_wanted} final runs"
    if done.complete:
        return f"Complete: {runs}."
    if not analysis.everything:
        return f"**Not run yet** ({runs})."
    return f"**This race is not complete** ({runs}). What follows is what its results say so far, and may change."


def tuning_section(analysis: Analysis) -> list[str]:
    """Show the best trials, which are no comparison, while no final run of the reference is there."""
    if not analysis.trials:
        return []
    reference = analysis.trials.get(analysis.plan.reference)
    rows = []
    for word, tried in analysis.trials.items():
        setting, loss = min(tried, key=lambda pair: pair[1])
        rows.append([word, f"{len(tried)}", number(loss), *settings_of(setting), own_options(setting)])
    text = (
        "No final runs yet. The least validation loss of each method so far, on the tuning seeds it was chosen on; "
        "with one seed and unequal numbers of trials this ranks nothing."
    )
    head = ["method", "trials", "least loss", "learning rate", "alpha / r", "options"]
    return [text, table(head, rows)] + ([plot_line(analysis)] if reference else [])


# --------------------------------------------------------------------------------------------------------- tables


def losses_table(analysis: Analysis) -> str:
    """Answer the first question: how good is the exported LoRA."""
    metrics = [m for m in METRICS if any(e.values(m) for e in analysis.entries.values())]
    name = analysis.plan.reference
    head = ["method", "loss ± sd", "seeds", f"minus {name} (95 %)", "p (Holm)", "smallest shown", "verdict"]
    rows = []
    for entry in analysis.entries.values():
        row = [named(entry, analysis), loss_with_spread(entry.losses.values()), str(len(entry.losses))]
        row += comparison_cells(entry.comparison, entry.p) if entry.comparison else ["", "", "", "reference"]
        rows.append(row + [spread(entry.values(metric)) for metric in metrics])
    return table([*head, *(METRICS[m] for m in metrics)], rows)


def comparison_cells(c: Comparison, p: float) -> list[str]:
    if math.isnan(c.difference):
        return ["–", "–", "–", "not compared"]
    return [
        f"{signed(c.difference)} ({signed(c.low)} to {signed(c.high)})",
        p_value(p),
        number(c.smallest_shown, 2),
    ] + [verdict(c, p)]


def costs_table(analysis: Analysis) -> str:
    """Best settings, time, and how much depends on the learning rate."""
    reference = analysis.reference
    assert reference is not None, "asked only where there are final runs of it"
    goal = sum(reference.losses.values()) / len(reference.losses)
    head = [
        "method",
        "learning rate",
        "alpha / r",
        "options",
        f"steps (time) to {analysis.plan.reference}'s final loss",
    ]
    head += ["training time", "merge gap", "kept energy"]
    if factors := analysis.plan.final.robustness:
        head += [f"change of the loss at learning rate x {f:.2g}" for f in factors]
    rows = []
    for entry in analysis.entries.values():
        moment = entry.reached(goal)
        row = [named(entry, analysis), *settings_of(entry.setting), own_options(entry.setting)]
        row += [f"{moment.step} ({moment.seconds:.0f} s)" if moment else "not reached"]
        row += [
            f"{spread(entry.training_seconds, 2)} s",
            signed(mean(entry.gaps), 2),
            percent(entry.values("kept_energy")),
        ]
        rows.append(row + [loss_with_spread(entry.changes(factor), signed) for factor in factors])
    return table(head, rows) + (
        "\n\nThe merge gap is the loss of the export minus that as trained; the kept energy is the share of the squared"
        " change in the weights that an export of this rank holds. Changes with the learning rate are paired by seed."
    )


def equal_time(analysis: Analysis) -> str:
    """Say whether a method that takes longer is better for the time."""
    name = analysis.plan.reference
    rows = [
        [named(entry, analysis), *comparison_cells(entry.equal_time, entry.p_equal_time)]
        for entry in analysis.entries.values()
        if entry.equal_time is not None
    ]
    text = (
        f"Loss of each method when as much training time was spent as {name} took in all, minus {name}'s final loss. "
        "It is read from the curves, where the learning rate of a slower method has not decayed to its end; a run that "
        "is planned for the time may do a little better."
    )
    head = ["method", f"minus {name} (95 %)", "p (Holm)", "smallest shown", "verdict"]
    return f"{text}\n\n{table(head, rows)}" if rows else "Not compared yet."


# ---------------------------------------------------------------------------------------------------------- words


def named(entry: Entry, analysis: Analysis) -> str:
    return f"`{entry.name}`" if entry.name in analysis.plan.methods else f"control: {entry.name}"


def edges(analysis: Analysis) -> str:
    """Optima that the search may have missed."""
    found = [
        f"`{word}` ({' and '.join(name.replace('_', ' ') for name, inside in entry.interior.items() if not inside)})"
        for word, entry in analysis.methods.items()
        if not all(entry.interior.values())
    ]
    if not found:
        return "The optimum of every method lies inside what was tried, in learning rate and in alpha."
    return f"Optima at the edge of what was tried, so that a better setting may lie beyond: {', '.join(found)}." + (
        " The others lie inside." if len(found) < len(analysis.methods) else ""
    )


def better_controls(analysis: Analysis) -> str:
    """Controls that do better than the setting which the trials chose, so that the choice is in doubt."""
    plan, reference = analysis.plan, analysis.plan.reference
    found = [
        f"`{name}` ({signed(entry.comparison.difference)}, {verdict(entry.comparison, entry.p)})"
        for name, control in plan.controls.items()
        if control.of == reference
        and control.rank == 1
        and (entry := analysis.entries.get(name))
        and entry.comparison
        and entry.comparison.difference < 0
    ]
    if not found:
        return ""
    seeds = count(plan.search.seeds, "tuning seed")
    return (
        f"At other settings {reference} has a lower mean on the fresh seeds than at the one that {seeds} chose: "
        f"{', '.join(found)}. So its best setting is known no better than that."
    )


def plot_line(analysis: Analysis) -> str:
    name = analysis.plan.reference
    return (
        f"![Loss over learning rate, {analysis.plan.name}](images/race-{analysis.plan.name}.png)\n\n"
        "A point is a trial (mean of the tuning seeds, on validation data), coloured by alpha / rank; a triangle is "
        "one above the panel, and one that diverged is not there. The blue line joins the best of each learning rate; "
        f"the grey line is that of {name}. Red are the fresh seeds, on test data, at the best setting and where they "
        "were run at other learning rates: their mean, and the standard deviation without what a seed does to all "
        "methods alike."
    )


def reproduce(analyses: Sequence[Analysis]) -> str:
    """Commands, hours, machines, versions."""
    lines = ["## How to reproduce", "", "```bash"]
    for analysis in analyses:
        lines += [f"python -m benchmarks.race run benchmarks/race/plans/{file_of(analysis.plan)}"]
    lines += ["python -m benchmarks.tuned stickers", "python -m benchmarks.tuned word-problems"]
    lines += ["python -m benchmarks.race report    # this page and its plots", "```", ""]
    lines += [
        "Each command can be stopped and called again (`--hours 2` stops it by itself). What the results here took:",
        "",
    ]
    rows = []
    for analysis in analyses:
        if analysis.everything:
            hours = f"{analysis.cpu_hours:.1f} processor hours, {len(analysis.everything)} runs"
            rows.append([analysis.plan.name, hours, *machines(analysis)])
        else:
            rows.append([analysis.plan.name, "not run yet", "", ""])
    return "\n".join(lines) + "\n" + table(["plan", "time", "machine", "versions"], rows)


def machines(analysis: Analysis) -> list[str]:
    """Say where the runs were made, and with what."""
    found = [run["machine"] for run in analysis.everything]
    places = {f"{m.get('device', m['processor'])}, {m['cores']} cores, {m['threads']} thread a run" for m in found}
    kinds = {", ".join(f"{name} {m[name]}" for name in ("python", "torch", "transformers", "peft")) for m in found}
    return ["; ".join(sorted(places)), "; ".join(sorted(kinds))]


def file_of(plan: Plan) -> str:
    return f"{plan.name.replace('-', '_')}.yaml"


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def percent(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.1f} %" if values else "–"
