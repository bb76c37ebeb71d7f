"""What may be said of two columns: from votes, from paired measures, and never that they are equal."""

import dataclasses
import random

import pytest
from PIL import Image

from app import measure_views
from app.compare import Cell
from app.intervals import sign_test
from app.measures import Measure
from app.request import Adapter, CompareRequest
from app.verdict import findings, votes_needed
from app.votes import Verdict, make_ballot

ADAPTERS = (Adapter("lora", "p", "a"), Adapter("<b>reslora", "q", "b"))
REQUEST = CompareRequest(prompts=("a", "b"), seeds=tuple(range(13)), adapters=ADAPTERS)
BASE, LORA, RESLORA = REQUEST.columns


def ballot(first: int, second: int, ties: int = 0):
    cells = [Cell(row, column, Image.new("RGB", (8, 8)), "", 0.1) for row in REQUEST.rows for column in REQUEST.columns]
    made = make_ballot(REQUEST, cells, LORA, RESLORA)
    made.votes = [Verdict.FIRST] * first + [Verdict.SECOND] * second + [Verdict.TIE] * ties
    made.seen = [len(made.votes)]
    return made


def measured(name: str, difference: float, noise: float = 0.01) -> Measure:
    """The second adapter's values are those of the first plus a difference; rows differ by far more."""
    source, measure = random.Random(0), Measure(name)
    for row in REQUEST.rows:
        of_row = source.uniform(0.2, 0.7)
        measure.values[LORA][row] = of_row
        measure.values[RESLORA][row] = of_row + difference + source.gauss(0, noise)
    return measure


def test_votes_that_show_nothing_say_how_many_would():
    found = findings(REQUEST, [], ballot(18, 8), {})
    (said,) = found.sentences()
    assert "No difference shown" in said
    assert f"18 of 26 decided votes are for lora × 1, p = 0.076; {votes_needed() - 26} more would show" in said
    assert "equal" not in said.replace("common among equals", "")


def test_votes_that_show_a_preference():
    (said,) = findings(REQUEST, [], ballot(4, 20, ties=2), {}).sentences()
    assert (
        said == "<b>reslora × 1 was preferred to lora × 1. 20 of 24 decided votes are for <b>reslora × 1, p = 0.0015."
    )
    peeked = ballot(4, 20, ties=2)
    peeked.seen = [5, 26]
    assert "looked at before the round's end" in findings(REQUEST, [], peeked, {}).sentences()[0]


def test_a_round_gives_nothing_away_before_its_result_is_asked_for():
    going_on = dataclasses.replace(ballot(4, 20), seen=[])
    assert findings(REQUEST, [], going_on, {}) is None
    of_another = ballot(4, 20)
    assert findings(dataclasses.replace(REQUEST, num_inference_steps=9), [], of_another, {}) is None


def test_votes_needed_find_the_preference_that_often():
    """The exact test's rejections are simulated, for the 60:40 of which the page speaks."""
    source, n = random.Random(1), votes_needed()
    limit = next(wins for wins in range(n // 2, n) if sign_test(wins, n - wins) < 0.05)
    found = sum(sum(source.random() < 0.6 for _ in range(n)) >= limit for _ in range(4000)) / 4000
    assert found == pytest.approx(0.8, abs=0.03)


def test_measures_are_compared_row_by_row():
    """Rows differ by ten times the difference, which shows all the same; unpaired intervals would overlap."""
    measure = measured("subject likeness", 0.05)
    assert measure.figure(LORA).high > measure.figure(RESLORA).low
    found = findings(REQUEST, [measure, measured("diversity", 0.0)], None, {LORA: 0.0, RESLORA: 5.96e-08})
    assert found.differences["subject likeness"].mean == pytest.approx(-0.05, abs=0.01)
    assert list(found.shown) == ["subject likeness"]
    (said,) = found.sentences()
    assert said.startswith("<b>reslora × 1 has more subject likeness than lora × 1 (of 2 measures, one differs by")
    assert said.endswith("by chance in 10% of comparisons of equals).")
    page = measure_views.verdict(found)
    assert "<b>reslora" not in page
    assert "lora × 1 none" in page
    assert "reslora × 1 +6.0e-08" in page
    assert page.count("not shown") == 1


def test_no_difference_is_never_said_to_be_equality():
    (said,) = findings(REQUEST, [measured("diversity", 0.0), measured("drift", 0.0)], None, {}).sentences()
    assert said == "No difference shown in diversity and drift; that is not to say that there is none."


def test_nothing_is_said_of_nothing():
    assert findings(REQUEST, [], None, {}) is None
    alone = dataclasses.replace(REQUEST, adapters=())
    assert findings(alone, [Measure("diversity")], None, {}) is None
    assert measure_views.verdict(None) == ""
