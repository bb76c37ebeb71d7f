"""Settings that were measured, for docs/methods.md: where each method was best, and at which rates it is near that."""

from collections.abc import Sequence

from .analysis import Analysis
from .plots import envelope
from .words import own_options, settings_of, table

NEAR = 0.02  # a rate is as good as the best where its loss is at most this share above
HEAD = ["method", "learning rate", "alpha / rank", "options", f"rates within {100 * NEAR:.0f} % of its best loss"]


def guidance(tuned: Sequence[Analysis]) -> str:
    """A table for each tuned race, of the methods that have all their trials."""
    parts = []
    for analysis in tuned:
        task, trials = analysis.plan.task, analysis.plan.search.trials
        found = {word: tried for word in analysis.plan.methods if len(tried := analysis.trials.get(word, [])) >= trials}
        rows = []
        for word, tried in found.items():
            if not envelope(tried):  # all of them diverged
                continue
            best, _ = min(tried, key=lambda pair: pair[1])
            rows.append([f"`{word}`", *settings_of(best), own_options(best), within(*near(envelope(tried)))])
        if rows:
            text = (
                f"On `{analysis.plan.name}` (rank {task.rank}, {task.steps} steps of {task.batch_size}), the best of "
                f"{trials} trials each:"
            )
            parts += [text, table(HEAD, rows)]
    if not parts:
        return "Nothing has been measured yet."
    parts.append("They are of small models. Take them as places to begin a search at, not as settings for a large one.")
    return "\n\n".join(parts)


def near(curve: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The range of tried learning rates around the best one whose loss at their best alpha is near the best."""
    limit = min(loss for _, loss in curve) * (1 + NEAR)
    best = min(range(len(curve)), key=lambda place: curve[place][1])
    low = high = best
    while low > 0 and curve[low - 1][1] <= limit:
        low -= 1
    while high + 1 < len(curve) and curve[high + 1][1] <= limit:
        high += 1
    return curve[low][0], curve[high][0]


def within(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
