"""Votes: the statistics against known values, sides that cannot be told, and a CSV that is no program."""

import csv
import io
from collections import Counter
from math import comb, sqrt
from statistics import NormalDist

import pytest
from PIL import Image

from app.compare import Cell
from app.intervals import sign_test, wilson_interval
from app.raters import read_votes
from app.request import Adapter, Column, CompareRequest
from app.votes import QUESTION, Choice, Verdict, conclusion, default_pair, make_ballot, tallies, tally, votes_csv

ADAPTERS = (Adapter("=one", "p", "a"), Adapter("two", "q", "b"))


def ballot(seeds: int = 12, prompts: tuple[str, ...] = ("a panda", "=cactus")):
    request = CompareRequest(prompts=prompts, seeds=tuple(range(seeds)), adapters=ADAPTERS, include_base=False)
    cells = [
        Cell(row, column, Image.new("RGB", (8, 8), (row.seed, 0, j)), column.label, 0.1)
        for row in request.rows
        for j, column in enumerate(request.columns)
    ]
    return make_ballot(request, cells, *request.columns)


def vote_for(chosen, column: Column) -> None:
    chosen.vote(Choice.LEFT if chosen.current.left.column == column else Choice.RIGHT)


def test_votes_count_for_the_column_behind_the_side():
    chosen = ballot()
    while chosen.current:
        vote_for(chosen, chosen.first)
    assert chosen.votes == [Verdict.FIRST] * 24
    assert {prompt: t.win_rate for prompt, t in tallies(chosen).items()} == {"a panda": 1.0, "=cactus": 1.0}
    with pytest.raises(ValueError, match="another round"):
        chosen.vote(Choice.TIE)


def test_sides_and_order_are_shuffled_and_every_row_comes_once():
    many = [ballot() for _ in range(20)]
    sides = Counter(pair.first_is_left for b in many for pair in b.pairs)
    assert min(sides.values()) > 480 * 0.3
    assert len({tuple(pair.row for pair in b.pairs) for b in many}) == 20
    assert all(len({pair.row for pair in b.pairs}) == 24 for b in many)
    assert all((pair.left.column == b.first) == pair.first_is_left for b in many for pair in b.pairs)


def test_take_back_undoes_a_vote():
    chosen = ballot()
    before = chosen.current
    chosen.vote(Choice.NEITHER)
    assert chosen.votes == [Verdict.NEITHER]
    chosen.take_back()
    assert (chosen.votes, chosen.current) == ([], before)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (7, 10, 0.3968, 0.8922), (50, 100, 0.4038, 0.5962), (10, 10, 0.7225, 1.0)],
)
def test_wilson_interval_gives_published_values(wins, n, low, high):
    assert wilson_interval(wins, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_ends_where_the_score_test_begins_to_reject():
    """The interval holds the p for which |wins / n - p| <= z sqrt(p (1 - p) / n), found by bisection."""
    z = NormalDist().inv_cdf(0.975)
    for wins, n in ((0, 3), (1, 4), (7, 10), (13, 40), (40, 40)):
        share = wins / n

        def rejected(p: float, share: float = share, n: int = n) -> bool:
            return abs(share - p) > z * sqrt(p * (1 - p) / n)

        def edge(outside: float, inside: float) -> float:
            for _ in range(60):
                middle = (outside + inside) / 2
                outside, inside = (middle, inside) if rejected(middle) else (outside, middle)
            return inside

        expected = (edge(0.0, share) if wins else 0.0, edge(1.0, share) if wins < n else 1.0)
        assert wilson_interval(wins, n) == pytest.approx(expected, abs=1e-9)


def test_sign_test_is_the_sum_of_all_splits_at_least_as_uneven():
    for wins, losses in ((0, 0), (5, 5), (9, 1), (1, 9), (14, 6), (20, 0)):
        n = wins + losses
        extreme = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(wins - losses)) / 2**n
        assert sign_test(wins, losses) == pytest.approx(extreme)


def test_nothing_is_claimed_from_few_votes_or_an_even_split():
    chosen = ballot()
    for _ in range(9):
        vote_for(chosen, chosen.second)
    assert "too few" in conclusion(chosen)
    for _ in range(9):
        vote_for(chosen, chosen.first)
    assert "No difference shown" in conclusion(chosen)
    chosen.votes = [Verdict.SECOND] * 12
    assert conclusion(chosen) == "two × 1 was preferred to =one × 1."


def test_ties_and_rejections_are_counted_but_decide_nothing():
    counted = tally([Verdict.FIRST, Verdict.TIE, Verdict.NEITHER, Verdict.SECOND, Verdict.TIE])
    assert (counted.first, counted.second, counted.ties, counted.neither, counted.decided) == (1, 1, 2, 1, 2)


def test_csv_reads_back_and_holds_no_formula():
    chosen = ballot()
    for _ in range(24):
        vote_for(chosen, chosen.first)
    rows = list(csv.reader(io.StringIO(votes_csv(chosen))))
    assert len(rows) == 25
    assert {row[0] for row in rows[1:]} == {"a panda", "'=cactus"}
    assert not any(cell.startswith("=") for row in rows for cell in row)


def test_an_empty_prompt_stays_empty_in_the_csv():
    chosen = ballot(prompts=("",))
    vote_for(chosen, chosen.first)
    assert next(csv.DictReader(io.StringIO(votes_csv(chosen))))["prompt"] == ""


def test_the_pair_offered_first_is_of_one_strength():
    request = CompareRequest(prompts=("a",), seeds=(0,), adapters=ADAPTERS, strengths=(0.5, 1.0))
    pair = [request.columns[i].label for i in default_pair(request.columns)]
    assert pair == ["=one × 1", "two × 1"]
    alone = CompareRequest(prompts=("a",), seeds=(0,), adapters=ADAPTERS[:1])
    assert default_pair(alone.columns) == (0, 1)
    assert default_pair(alone.columns[:1]) == (0, 0)


def test_two_equal_columns_make_no_ballot():
    chosen = ballot()
    request = CompareRequest(prompts=("a",), seeds=(0,), adapters=ADAPTERS)
    with pytest.raises(ValueError, match="two different"):
        make_ballot(request, [], chosen.first, chosen.first)
    with pytest.raises(ValueError, match="compare them first"):
        make_ballot(request, [], chosen.first, chosen.second)


# --------------------------------------------------------------------------------------------- several raters


def votes_of(rater: str, verdicts: list[Verdict], swapped: bool = False) -> str:
    """A rater's CSV on pairs in one order, of which the columns may have been chosen the other way round."""
    chosen = ballot(seeds=len(verdicts), prompts=("a panda",))
    chosen.pairs.sort(key=lambda pair: pair.row.seed)
    if swapped:
        chosen.first, chosen.second = chosen.second, chosen.first
    chosen.votes, chosen.rater, chosen.seen = list(verdicts), rater, [3, len(verdicts)]
    return votes_csv(chosen)


F, S, T, N = Verdict.FIRST, Verdict.SECOND, Verdict.TIE, Verdict.NEITHER


def test_several_raters_count_each_pair_once():
    files = {
        "a.csv": votes_of("Ann", [F, F, F, T, N]),
        "b.csv": votes_of("Bob", [S, S, S, S, F], swapped=True),  # F F F F S of the other order
        "c.csv": votes_of("", [F, S, S, T, N]),
    }
    pool = read_votes(files)
    assert list(pool.by_rater) == ["Ann", "Bob", "c.csv"]
    assert (pool.by_rater["Bob"].first, pool.by_rater["Bob"].second) == (4, 1)
    assert (pool.by_pair.first, pool.by_pair.second, pool.by_pair.ties) == (4, 1, 0)
    # Decided pairs of votes: 3 on the first pair, all equal; 3 on each of the next two, one equal.
    assert (pool.agreed, pool.compared) == (5, 9)


def test_a_csv_says_the_question_the_rater_and_every_look():
    row = next(csv.DictReader(io.StringIO(votes_of("Ann", [F, S, T]))))
    assert (row["question"], row["rater"], row["place"], row["looked_at"]) == (QUESTION, "Ann", "1", "3 3")


def test_votes_that_cannot_be_pooled_are_named_together():
    other = votes_of("Cyd", [F]).replace("two", "three")
    files = {
        "a.csv": votes_of("Ann", [F, S]),
        "again.csv": votes_of("Ann", [F, S]),
        "c.csv": other,
        "d.csv": "x,y\n1,2\n",
    }
    with pytest.raises(ValueError, match="cannot be pooled") as caught:
        read_votes(files)
    for words in ("c.csv, line 2: on", "d.csv: these are no votes", "Ann voted twice on 'a panda', seed 0"):
        assert words in str(caught.value)
