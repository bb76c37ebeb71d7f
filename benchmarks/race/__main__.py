"""Run a race, or report on what was run.

    python -m benchmarks.race run benchmarks/race/plans/word_problems.yaml --hours 2
    python -m benchmarks.race report [--check] [--add FOLDER]
    python -m benchmarks.race report my_plan.yaml [--out FOLDER]

`run` goes on where an earlier call stopped, whatever stopped it. `report` writes docs/evidence.md and its plots from
the results of all plans, complete or not, and the passages of the README and docs/methods.md that stand between
`<!-- evidence -->` and `<!-- /evidence -->`; `--check` fails if one of them is not what the results make of it. `--add`
takes over results that were made in another folder (FOLDER/<plan>/...) first. With a plan of your own it writes
report.md and the plot beside that plan's results.
"""

import math
from pathlib import Path
from typing import Annotated

import typer

from reslora_diffusion.utils.files import write_text
from reslora_diffusion.utils.problems import BadInput, Stopped, run_program

from .plan import read_plan

ROOT = Path(__file__).resolve().parents[2]
PLANS, RESULTS = ROOT / "benchmarks" / "race" / "plans", ROOT / "benchmarks" / "results" / "race"
DOCUMENT, METHODS, README = ROOT / "docs" / "evidence.md", ROOT / "docs" / "methods.md", ROOT / "README.md"
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

    def program() -> None:
        read = read_plan(plan)
        from .stages import race  # imports torch

        complete = race(read, out or RESULTS / read.name, workers, hours)
        print("every run of the plan is there" if complete else "more is to be run: call again")

    raise SystemExit(run_program(program))


@app.command()
def report(
    plan: Annotated[
        Path | None, typer.Argument(help="a plan of your own: its page and plot are written into its folder of results")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="that folder; default: benchmarks/results/race/<name>")] = None,
    check: Annotated[bool, typer.Option(help="write nothing; exit 1 if the page is out of date")] = False,
    add: Annotated[
        Path | None, typer.Option(help="first take over the results in FOLDER/<plan>, as far as they are of our plans")
    ] = None,
) -> None:
    """Write docs/evidence.md, its plots and what is taken from it; or the page of one plan."""
    raise SystemExit(run_program((lambda: of_one(plan, out)) if plan else (lambda: of_all(check, add))))


def of_one(path: Path, out: Path | None) -> None:
    from .analysis import analyse
    from .plots import plot
    from .report import page

    plan = read_plan(path)
    folder = out or RESULTS / plan.name
    if not folder.is_dir():
        raise BadInput([f"{folder}: no such folder; wanted the results of this plan (--out)"])
    analysis = analyse(plan, folder)
    write_text(folder / "report.md", page(analysis))
    if analysis.trials:
        plot(analysis, folder / "images" / f"race-{plan.name}.png")
    print(f"written: {folder / 'report.md'}")


def of_all(check: bool, add: Path | None) -> None:
    from benchmarks.results import with_block

    from .advice import advice
    from .analysis import analyse
    from .guidance import guidance
    from .plots import plot
    from .report import document
    from .results import take_over

    plans = [read_plan(path) for path in sorted(PLANS.glob("*.yaml"))]
    if add is not None:
        for plan in plans:
            print(f"{plan.name}: {take_over(add / plan.name, RESULTS / plan.name, plan)} results taken over")
    found = [analyse(plan, RESULTS / plan.name) for plan in plans]
    tuned, published = ([a for a in found if a.is_tuned == kind] for kind in (True, False))
    wanted = {
        DOCUMENT: document(found),
        METHODS: with_block(METHODS.read_text(encoding="utf-8"), "evidence", guidance(tuned)),
        README: with_block(README.read_text(encoding="utf-8"), "evidence", advice(tuned, published)),
    }
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    if check:
        if stale:
            lines = [f"{path.relative_to(ROOT)} is out of date: python -m benchmarks.race report" for path in stale]
            raise Stopped("\n".join(lines))
        return
    for path in stale:
        write_text(path, wanted[path])
        print(f"written: {path.relative_to(ROOT)}")
    for analysis in found:
        if f"race-{analysis.plan.name}.png" in wanted[DOCUMENT]:
            plot(analysis, ROOT / "docs" / "images" / f"race-{analysis.plan.name}.png")


if __name__ == "__main__":
    app()
