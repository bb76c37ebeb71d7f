"""Run a race, or report on what was run.

    python -m benchmarks.race run benchmarks/race/plans/word_problems.yaml --hours 2
    python -m benchmarks.race report [--check] [--add FOLDER]

`run` goes on where an earlier call stopped, whatever stopped it. `report` writes docs/evidence.md and its plots from
the results of all plans, complete or not; `--check` fails if the page is not what the results make of it. `--add` takes
over results that were made in another folder (FOLDER/<plan>/...) first.
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from reslora_diffusion.utils.files import write_text

from .plan import PlanError, read_plan

ROOT = Path(__file__).resolve().parents[2]
PLANS, RESULTS = ROOT / "benchmarks" / "race" / "plans", ROOT / "benchmarks" / "results" / "race"
DOCUMENT = ROOT / "docs" / "evidence.md"
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@app.command("run")
def run_race(
    plan: Annotated[Path, typer.Argument(help="a YAML file; benchmarks/race/plans has ours")],
    out: Annotated[
        Path | None, typer.Option(help="folder of result files; default: benchmarks/results/race/<name>")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes, of one thread each")] = 2,
    hours: Annotated[float, typer.Option(min=0, help="start no run after so many hours")] = math.inf,
) -> None:
    """Run what is missing of a plan."""
    from .stages import race

    try:
        read = read_plan(plan)
    except PlanError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    complete = race(read, out or RESULTS / read.name, workers, hours)
    print("every run of the plan is there" if complete else "more is to be run: call again")


@app.command()
def report(
    check: Annotated[bool, typer.Option(help="write nothing; exit 1 if the page is out of date")] = False,
    add: Annotated[
        Path | None, typer.Option(help="first take over the results in FOLDER/<plan>, as far as they are of our plans")
    ] = None,
) -> None:
    """Write docs/evidence.md and its plots."""
    from .analysis import analyse
    from .plots import plot
    from .report import document
    from .results import take_over

    plans = [read_plan(path) for path in sorted(PLANS.glob("*.yaml"))]
    if add is not None:
        for plan in plans:
            print(f"{plan.name}: {take_over(add / plan.name, RESULTS / plan.name, plan)} results taken over")
    page = document({plan: RESULTS / plan.name for plan in plans})
    if check:
        same = DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == page
        answer = "what the results say" if same else "out of date: python -m benchmarks.race report"
        print(f"{DOCUMENT.name} is {answer}")
        raise SystemExit(0 if same else 1)
    write_text(DOCUMENT, page)
    for plan in plans:
        if f"race-{plan.name}.png" in page:
            plot(analyse(plan, RESULTS / plan.name), ROOT / "docs" / "images" / f"race-{plan.name}.png")
    print(f"written: {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    app()
