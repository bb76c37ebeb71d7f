"""The better of two columns, as far as votes and measures say so, in one sentence and a table.

Measures are compared in pairs, row by row: the first column's value less the second's, its mean and a t interval. A
difference is shown where the interval leaves out zero. A large p or a wide interval never means that two are equal; how
many votes would be needed is said then. With several measures one of them differs by chance more often than in one
comparison of twenty, and that is said as well.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .intervals import Figure, sign_test
from .measures import Measure
from .request import Column, CompareRequest
from .votes import ENOUGH_VOTES, Ballot, conclusion, default_pair, tally

PREFERENCE = 0.6  # the share of votes that a comparison is to find
POWER = 0.8  # how often it is to find it
LEVEL = 0.05


@dataclass(frozen=True)
class Findings:
    """`differences` are first less second, by measure; `gaps` what the files say of their merge, by label."""

    first: Column
    second: Column
    ballot: Ballot | None  # as far as its result was looked at
    early: bool  # which was before the round's end
    differences: dict[str, Figure]
    gaps: dict[str, float]

    @property
    def shown(self) -> dict[str, Figure]:
        """Differences whose interval leaves out zero."""
        return {name: d for name, d in self.differences.items() if d.n > 1 and (d.low > 0 or d.high < 0)}

    def sentences(self) -> list[str]:
        found = [self.of_votes()] if self.ballot else []
        if self.differences:
            found.append(self.of_measures())
        return found

    def of_votes(self) -> str:
        votes = tally(self.ballot.votes)
        ahead, wins = (self.first, votes.first) if votes.first >= votes.second else (self.second, votes.second)
        counted = f"{wins} of {votes.decided} decided votes are for {ahead.label}, p = {votes.p_value:.2g}"
        if votes.decided >= ENOUGH_VOTES and votes.p_value < LEVEL:
            counted += "; p is too small, for the result was looked at before the round's end" if self.early else ""
        elif more := max(0, votes_needed() - votes.decided):
            counted += f"; {more} more would show a 60:40 preference in four of five rounds"
        return f"{conclusion(self.ballot)} {counted}."

    def of_measures(self) -> str:
        if not self.shown:
            return f"No difference shown in {listed(self.differences)}; that is not to say that there is none."
        said = []
        for name, difference in self.shown.items():
            more, less = (self.first, self.second) if difference.mean > 0 else (self.second, self.first)
            said.append(f"{more.label} has more {name} than {less.label}")
        count = len(self.differences)
        chance = 1 - (1 - LEVEL) ** count
        caution = f" (of {count} measures, one differs by chance in {chance:.0%} of comparisons of equals)"
        return f"{listed(said)}{caution if count > 1 and len(said) == 1 else ''}."


def findings(
    request: CompareRequest, measured: Sequence[Measure], ballot: Ballot | None, gaps: Mapping[Column, float]
) -> Findings | None:
    """Findings on the columns that were voted on, else on the last two of one strength; None where there are none."""
    voted = ballot if ballot and ballot.request is request and ballot.seen else None
    if len(request.columns) < 2 or not (voted or measured):
        return None
    numbers = default_pair(request.columns)
    first, second = (voted.first, voted.second) if voted else (request.columns[i] for i in numbers)
    pairs = {measure.name: measure.paired(first, second) for measure in measured}
    return Findings(
        first,
        second,
        ballot=replace(voted, votes=voted.votes[: voted.seen[-1]]) if voted else None,
        early=bool(voted and any(count < len(voted.pairs) for count in voted.seen)),
        differences={name: difference for name, difference in pairs.items() if difference is not None},
        gaps={column.label: gaps[column] for column in (first, second) if column in gaps},
    )


@lru_cache
def votes_needed(share: float = PREFERENCE, power: float = POWER) -> int:
    """Decided votes of which the sign test finds a preference of this share this often.

    >>> votes_needed(0.9)
    12
    """
    n = ENOUGH_VOTES
    while True:
        wins = next((w for w in range(n // 2, n + 1) if sign_test(w, n - w) < LEVEL), n + 1)
        if sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(wins, n + 1)) >= power:
            return n
        n += 1


def listed(words: Sequence[str] | Mapping[str, object]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last
