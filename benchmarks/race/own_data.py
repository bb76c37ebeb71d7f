"""The section of docs/evidence.md on `reslora tune`, made of benchmarks/results/tuned-*.json (benchmarks/tuned.py)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .statistics import compare, verdict
from .words import count, number, p_value, signed, table

FEWEST_CASES = 3  # of trainings after a search, for an interval to say anything


def tuning_on_own_data(folder: Path) -> str:
    """Trainings after `reslora tune` against trainings with the trainers' defaults (benchmarks/tuned.py)."""
    text = (
        "## `reslora tune`, then training, against the defaults\n\n"
        "Both trainings have the same number of steps. The search has a stated share of the training's time (30 %), "
        "on top of it; loading the model for each trial is not counted in that share, and the wall times show it. "
        "Judged is the loss of the exported LoRA on data that neither the search nor a training saw. Each case is a "
        "subject (stickers) or a seed (word problems); the interval is that of a paired t-test over the cases."
    )
    parts = [text]
    for path in sorted(folder.glob("tuned-*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"### {path.stem.removeprefix('tuned-')}, {content['steps']} steps", *tuned_table(content["results"])]
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "**Not measured yet.**"])


def tuned_table(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The cases, and whether the differences show a gain."""
    head = ["case", "loss of the base", "defaults", "tuned", "tuned minus defaults", "what was found", "trials"]
    head += ["share of the time", "wall time of search and training"]
    rows = []
    for name, case in cases.items():
        found = ", ".join(f"{option} {value}" for option, value in case["options"].items() if value is not None)
        row = [name, *(number(case[f"loss_{kind}"]) for kind in ("base", "defaults", "tuned"))]
        row += [signed(case["loss_tuned"] - case["loss_defaults"]), found or "no gain shown: the defaults"]
        row += [str(case["trials"]), f"{100 * case['share_spent']:.0f} %"]
        rows.append([*row, f"{case['search_wall_seconds']:.0f} s, {case['training_wall_seconds']:.0f} s"])
    before, after = ({n: case[f"loss_{kind}"] for n, case in cases.items()} for kind in ("defaults", "tuned"))
    c = compare(dict(enumerate(after.values())), dict(enumerate(before.values())))
    if before == after:
        answer = "Nothing was changed in any case: the trainings are those of the defaults, and no gain is shown."
    elif len(cases) < FEWEST_CASES:
        answer = f"With {count(list(cases), 'case')} nothing is concluded yet; {FEWEST_CASES} are wanted."
    else:
        shown = {"better": "The gain is beyond the spread", "worse": "The loss is **higher** after the search"}
        answer = (
            f"{shown.get(verdict(c, c.p), 'No difference shown')}: {signed(c.difference)} ({signed(c.low)} to "
            f"{signed(c.high)}), p = {p_value(c.p)}, {count(list(cases), 'case')}; a difference of "
            f"{number(c.smallest_shown, 2)} would have been shown."
        )
    return [table(head, rows), answer]
