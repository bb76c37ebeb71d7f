"""Tables of what `reslora train-llm --seeds 5 --grid ...` found: means over seeds with 95 % intervals.

    python -m benchmarks.sweep runs/lora runs/reslora                     results by method and setting
    python -m benchmarks.sweep runs/lora --metric exact_match.base        another number of results.json

    method           setting               seeds   exact_match.as exported
    lora             learning_rate 0.003       5   0.682 (0.655 to 0.709)

The interval is Student's, of the mean over seeds. A setting that was chosen because its mean is the largest of many is
flattered by it: choose on validation rows (`best_metric`), report on test rows.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

FORMAT = 1
METRIC = "exact_match.as exported"


def read(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Runs of the `sweep.json` of each folder; raises `ValueError` for a file of another format."""
    runs = []
    for folder in folders:
        content = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ValueError(f"{folder / 'sweep.json'}: got format {content.get('format')!r}, wanted {FORMAT}")
        runs += content["runs"]
    return runs


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def table(runs: Sequence[dict[str, Any]], metric: str) -> str:
    """Lines of method, setting, number of seeds, and the metric.

    Raises:
        ValueError: no run has it; says which there are.
    """
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in runs:
        if metric in run["result"]:
            setting = " ".join(f"{name} {value}" for name, value in run["setting"].items()) or "-"
            groups[str(run["method"]), setting].append(run["result"][metric])
    if not groups:
        known = sorted({name for run in runs for name in run["result"]})
        raise ValueError(f"--metric: got {metric!r}, wanted one of {', '.join(known)}")
    lines = [f"{'method':16} {'setting':36} seeds   {metric}"]
    for (method, setting), values in sorted(groups.items()):
        found = interval(values)
        spread = f" ({found[0]:.4g} to {found[1]:.4g})" if found else ""
        lines.append(f"{method:16} {setting:36} {len(values):5}   {mean(values):.4g}{spread}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="output_dir of a sweep")
    parser.add_argument("--metric", default=METRIC)
    args = parser.parse_args(argv)
    try:
        print(table(read(args.folders), args.metric))
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
