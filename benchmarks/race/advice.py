"""Advice for a user, in sentences whose every branch is chosen by the numbers."""

import math
from collections.abc import Sequence

from .analysis import Analysis, Entry
from .context import place
from .statistics import LEVEL
from .words import loss_with_spread, number, signed

ALPHA = 1 - LEVEL


def is_better(entry: Entry) -> bool:
    return entry.comparison is not None and entry.p < ALPHA and entry.comparison.difference < 0


def is_worse(entry: Entry) -> bool:
    return entry.comparison is not None and entry.p < ALPHA and entry.comparison.difference > 0


def mean_loss(entry: Entry) -> float:
    return sum(entry.losses.values()) / len(entry.losses)


def advice(tuned: Sequence[Analysis], published: Sequence[Analysis]) -> str:
    """Three sentences, or that there is no answer yet."""
    raced = [analysis for analysis in tuned if analysis.reference is not None]
    if not raced:
        return (
            "There is no answer yet: no tuned race has final runs. Until there is one, take LoRA and tune its learning "
            "rate and alpha on your own data (`reslora tune`)."
        )
    warning = "" if all(a.progress.complete for a in raced) else "(From incomplete races; this may change.) "
    sentences = [which_method(raced), what_tuning_is_worth(raced, published), where_to_begin(raced)]
    return warning + " ".join(filter(None, sentences))


def which_method(raced: Sequence[Analysis]) -> str:
    """Is any method better than tuned LoRA?"""
    parts = []
    for analysis in raced:
        better = sorted(filter(is_better, analysis.methods.values()), key=mean_loss)
        others = sum(not math.isnan(entry.p) for entry in analysis.methods.values())
        worse = sum(map(is_worse, analysis.methods.values()))
        if better:
            names = ", ".join(f"`{e.name}` ({signed(e.comparison.difference)})" for e in better if e.comparison)
            parts.append(f"on {place(analysis.plan)} {names} beat tuned LoRA at equal exported rank")
        elif others:
            of = "the other method was not" if others == 1 else f"none of {others} methods was"
            parts.append(
                f"on {place(analysis.plan)} {of} shown to be better than tuned LoRA, and "
                f"{worse or 'none'} {'were' if worse > 1 else 'was'} shown to be worse"
            )
    text = "; ".join(parts)
    if any(any(map(is_better, a.methods.values())) for a in raced):
        return f"Choose by your task: {text}."
    return f"Choose plain LoRA: {text}." if parts else "Choose plain LoRA: nothing was compared with it yet."


def what_tuning_is_worth(raced: Sequence[Analysis], published: Sequence[Analysis]) -> str:
    """The gain of learning rate and alpha beside the gain of the method."""
    for before in published:
        after = next((a for a in raced if a.plan.task.name == before.plan.task.name), None)
        if before.reference is None or after is None or after.reference is None:
            continue
        gain = mean_loss(before.reference) - mean_loss(after.reference)
        methods = [e for e in before.methods.values() if e.comparison is not None]
        most = max((-e.comparison.difference for e in methods if e.comparison), default=0.0)
        return (
            f"Tune learning rate and alpha before anything else: on `{after.plan.name}` that takes LoRA's loss from "
            f"{number(mean_loss(before.reference))} to {number(mean_loss(after.reference))}, a gain of {number(gain)}, "
            f"where changing the method at the published setting gains {number(max(most, 0.0))} at most."
        )
    return "Tune learning rate and alpha before anything else."


def where_to_begin(raced: Sequence[Analysis]) -> str:
    places = []
    for analysis in raced:
        assert analysis.reference is not None, "only those with final runs are asked"
        setting = analysis.reference.setting
        places.append(
            f"learning rate {setting['learning_rate']:g} with alpha = {setting['alpha_over_rank']:g} x rank on "
            f"`{analysis.plan.name}`"
        )
    differ = ", and the best settings differ between tasks" if len(places) > 1 else ""
    return f"LoRA was best at {'; at '.join(places)}{differ}: search around that on your own data with `reslora tune`."


def paper_beside_tuned(published: Analysis, tuned: Analysis | None) -> str:
    """Return why both the paper's finding and the tuned race's can be right."""
    assert published.reference is not None, "asked only where there are final runs"
    shortcuts = [e for e in published.methods.values() if e.comparison is not None]
    if not shortcuts:
        return ""
    best = min(shortcuts, key=mean_loss)
    controls = [e for name, e in published.entries.items() if name in published.plan.controls and e.comparison]
    sentences = ["**How this fits together.**"]
    better = [e for e in shortcuts if is_better(e)]
    if better:
        names = ", ".join(f"`{e.name}` ({signed(e.comparison.difference)})" for e in better if e.comparison)
        sentences.append(f"At the published setting {names} have a lower loss than LoRA, as the paper says.")
    else:
        sentences.append("At the published setting no shortcut was shown to be better than LoRA either.")
    for control in controls:
        gain = -control.comparison.difference if control.comparison else 0.0
        most = -best.comparison.difference if best.comparison else 0.0
        sentences.append(
            f"The control ({control.name}, at the same learning rate) gains {number(gain)}, where the best shortcut "
            f"gains {number(most)}: "
            + (
                "a larger scale alone does as much, so the setting is too small for LoRA rather than LoRA too weak."
                if gain >= most > 0
                else "a larger scale alone explains a part of it."
                if gain > 0 and most > 0
                else "the two tell nothing of each other."
            )
        )
    if tuned is None or tuned.reference is None:
        sentences.append("The tuned race of this task has no final runs yet.")
    else:
        sentences.append(tuned_sentence(published, tuned))
    return " ".join(sentences)


def tuned_sentence(published: Analysis, tuned: Analysis) -> str:
    """Say how the same methods do once each has its best learning rate and alpha."""
    assert published.reference is not None, "the caller has looked"
    assert tuned.reference is not None, "the caller has looked"
    families = {word.partition("+")[0] for word in published.methods} - {published.plan.reference}
    same = [e for word, e in tuned.methods.items() if word.partition("+")[0] in families and e.comparison]
    text = (
        f"With learning rate and alpha tuned LoRA reaches {loss_with_spread(tuned.reference.losses.values())} instead "
        f"of {loss_with_spread(published.reference.losses.values())}"
    )
    if not same:
        return f"{text}; the shortcuts have no tuned final runs yet."
    parts = [f"`{e.name}` {signed(e.comparison.difference)}" for e in same if e.comparison]
    winners = [e.name for e in same if is_better(e)]
    end = (
        f"So {', '.join(winners)} keep an advantage after tuning."
        if winners
        else "So the advantage does not outlast tuning: a shortcut acts like a larger scale, which helps where the "
        "scale is too small."
    )
    return f"{text}, and beside it, each at its own best setting, stand {', '.join(parts)}. {end}"
