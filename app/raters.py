"""Votes of several raters on the same pairs, from the CSV files that the page writes.

pooled    each pair counts once, for the column that most of its raters preferred; a draw among them is a tie. Votes on
          one pair are no independent evidence, so they are never simply added up.
agreement share of pairs of raters that said the same of an image pair, among decided votes; 50 % is chance
"""

import csv
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .foreign import printable, shortened
from .request import joined
from .votes import CSV_COLUMNS, Tally, Verdict, tally

MAX_BYTES = 2**20
OPPOSITE = {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST}
Place = tuple[str, str, str]  # prompt, seed, setting


@dataclass(frozen=True)
class Vote:
    rater: str
    place: Place
    verdict: Verdict


@dataclass(frozen=True)
class Pool:
    """`by_rater` are the raters' own tallies; `by_pair` counts each pair of images once."""

    first: str
    second: str
    by_rater: dict[str, Tally]
    by_pair: Tally
    agreed: int
    compared: int


def read_votes(files: dict[str, str]) -> Pool:
    """Pool the texts of CSV files, by the files' names.

    Raises:
        ValueError: with everything that is wrong: files of another kind, other columns, a rater who votes twice.
    """
    found, votes, columns = [], [], None
    for name, text in files.items():
        try:
            rows = list(csv.DictReader(io.StringIO(text), strict=True))
        except csv.Error as error:
            found.append(f"{name}: {error}")
            continue
        if not rows or not set(CSV_COLUMNS) <= set(rows[0]):
            found.append(f"{name}: these are no votes of this page; wanted the columns {', '.join(CSV_COLUMNS)}")
            continue
        for line, row in enumerate(rows, start=2):
            pair = (row["first"], row["second"])
            columns = columns or pair
            if set(pair) != set(columns):
                found.append(f"{name}, line {line}: on {' and '.join(pair)}; wanted {' and '.join(columns)}")
                break
            if row["verdict"] not in list(Verdict):
                found.append(f"{name}, line {line}: got the verdict {shortened(str(row['verdict']))!r}")
                break
            verdict = Verdict(row["verdict"])
            verdict = verdict if pair == columns else OPPOSITE.get(verdict, verdict)
            votes.append(Vote(row["rater"] or name, (row["prompt"], row["seed"], row["setting"]), verdict))
    twice = [key for key, count in Counter((vote.rater, vote.place) for vote in votes).items() if count > 1]
    found += [f"{rater} voted twice on {shortened(place[0])!r}, seed {place[1]}" for rater, place in twice[:5]]
    if found:
        raise ValueError(printable(joined("These votes cannot be pooled", found)))
    return pool(columns or ("", ""), votes)


def pool(columns: Sequence[str], votes: Iterable[Vote]) -> Pool:
    by_rater, by_place = defaultdict(list), defaultdict(list)
    for vote in votes:
        by_rater[vote.rater].append(vote.verdict)
        by_place[vote.place].append(vote.verdict)
    agreed = compared = 0
    for verdicts in by_place.values():
        decided = [verdict for verdict in verdicts if verdict in OPPOSITE]
        for a, b in itertools.combinations(decided, 2):
            agreed, compared = agreed + (a == b), compared + 1
    tallies = {rater: tally(verdicts) for rater, verdicts in by_rater.items()}
    return Pool(*columns, tallies, tally(map(majority, by_place.values())), agreed, compared)


def majority(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of most raters of a pair; a tie where first and second have as many."""
    count = Counter(verdicts)
    if count[Verdict.FIRST] == count[Verdict.SECOND]:
        return Verdict.NEITHER if count[Verdict.NEITHER] > len(verdicts) / 2 else Verdict.TIE
    return Verdict.FIRST if count[Verdict.FIRST] > count[Verdict.SECOND] else Verdict.SECOND
