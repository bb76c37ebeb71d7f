"""Blind pairs, and what votes on them allow to be said.

Of one prompt and seed, two columns' images are shown with their sides shuffled. A vote is for the left or the right,
a tie, or against both. With w wins of the first column among n decided votes (no ties, none against both):

    win rate   w / n, with Wilson's 95 % interval
    sign test  two-sided exact binomial, of intervals.py
"""

import csv
import io
import random
import secrets
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from .compare import Cell
from .foreign import text_cell
from .intervals import sign_test, wilson_interval
from .output import by_place
from .request import Column, CompareRequest, Row

CSV_COLUMNS = (
    "prompt",
    "seed",
    "setting",
    "first",
    "second",
    "left",
    "verdict",
    "question",
    "rater",
    "place",
    "looked_at",
)
QUESTION = "Which image is better?"
ENOUGH_VOTES = 10  # fewer decided votes than this, and nothing is claimed


class Verdict(StrEnum):
    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    NEITHER = "both bad"


class Choice(StrEnum):
    """The answers that a voter can give; sides, not columns."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    NEITHER = "both bad"


@dataclass(frozen=True)
class Pair:
    row: Row
    left: Cell
    right: Cell
    first_is_left: bool


@dataclass
class Ballot:
    """One visitor's round of pairs of two columns, in an order and with sides that nobody knows."""

    request: CompareRequest
    first: Column
    second: Column
    pairs: list[Pair]
    votes: list[Verdict] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)  # how many votes there were each time the result was looked at
    question: str = QUESTION
    rater: str = ""

    @property
    def current(self) -> Pair | None:
        return self.pairs[len(self.votes)] if len(self.votes) < len(self.pairs) else None

    def vote(self, choice: Choice) -> None:
        pair = self.current
        if pair is None:
            raise ValueError("every pair of this round has its vote; begin another round")
        sides = {Choice.LEFT: pair.first_is_left, Choice.RIGHT: not pair.first_is_left}
        if choice in sides:
            self.votes.append(Verdict.FIRST if sides[choice] else Verdict.SECOND)
        else:
            self.votes.append(Verdict.TIE if choice is Choice.TIE else Verdict.NEITHER)

    def take_back(self) -> None:
        """Inverse of `vote`."""
        if self.votes:
            self.votes.pop()

    @property
    def voted(self) -> list[tuple[Pair, Verdict]]:
        return list(zip(self.pairs, self.votes, strict=False))


def default_pair(columns: Sequence[Column]) -> tuple[int, int]:
    """The last column and the one before it, by number; of another adapter at the same strength if there is one."""
    last = len(columns) - 1
    newest = columns[last]
    others = (
        i
        for i in range(last - 1, -1, -1)
        if columns[i].adapter not in (None, newest.adapter)
        and (columns[i].strength, columns[i].setting) == (newest.strength, newest.setting)
    )
    return next(others, max(0, last - 1)), last


def make_ballot(
    request: CompareRequest,
    cells: Sequence[Cell],
    first: Column,
    second: Column,
    question: str = QUESTION,
    rater: str = "",
) -> Ballot:
    """All rows that both columns generated, shuffled.

    Raises:
        ValueError: there is no pair, or nothing to tell apart.
    """
    if first == second:
        raise ValueError("choose two different columns")
    generated, shuffler = by_place(cells), random.Random(secrets.randbits(128))
    pairs = []
    for row in request.rows:
        a, b = generated.get((row, first)), generated.get((row, second))
        if a and b:
            first_is_left = shuffler.random() < 0.5
            pairs.append(Pair(row, *((a, b) if first_is_left else (b, a)), first_is_left))
    if not pairs:
        raise ValueError("these two columns have no images in common; compare them first")
    shuffler.shuffle(pairs)
    return Ballot(request, first, second, pairs, question=question.strip() or QUESTION, rater=rater.strip())


@dataclass(frozen=True)
class Tally:
    """Votes on some pairs, counted."""

    first: int
    second: int
    ties: int
    neither: int

    @property
    def decided(self) -> int:
        return self.first + self.second

    @property
    def win_rate(self) -> float | None:
        return self.first / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.first, self.decided)

    @property
    def p_value(self) -> float:
        return sign_test(self.first, self.second)


def tally(verdicts: Iterable[Verdict]) -> Tally:
    count = Counter(verdicts)
    return Tally(*(count[verdict] for verdict in Verdict))


def tallies(ballot: Ballot) -> dict[str, Tally]:
    """Tallies by prompt, in the order in which prompts were first voted on."""
    by_prompt = defaultdict(list)
    for pair, verdict in ballot.voted:
        by_prompt[pair.row.prompt].append(verdict)
    return {prompt: tally(verdicts) for prompt, verdicts in by_prompt.items()}


def conclusion(ballot: Ballot) -> str:
    """Say in a sentence what the votes allow."""
    total = tally(ballot.votes)
    first, second = ballot.first.label, ballot.second.label
    if total.decided < ENOUGH_VOTES:
        votes = "1 decided vote is" if total.decided == 1 else f"{total.decided} decided votes are"
        return f"{votes} too few to say anything; {ENOUGH_VOTES} are the least."
    if total.p_value >= 0.05:
        return f"No difference shown between {first} and {second}: a split like this is common among equals."
    better, worse = (first, second) if total.first > total.second else (second, first)
    return f"{better} was preferred to {worse}."


def votes_csv(ballot: Ballot) -> str:
    """One line for each vote, with its place in the round, and how many votes there were at each look at the result.
    Cells that a spreadsheet would compute are made text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(CSV_COLUMNS)
    looks = " ".join(map(str, ballot.seen))
    for number, (pair, verdict) in enumerate(ballot.voted, start=1):
        setting = pair.row.setting.label if pair.row.setting else ""
        columns = (ballot.first.label, ballot.second.label, pair.left.column.label)
        line = [
            pair.row.prompt,
            pair.row.seed,
            setting,
            *columns,
            verdict,
            ballot.question,
            ballot.rater,
            number,
            looks,
        ]
        writer.writerow(map(text_cell, line))
    return buffer.getvalue()


def write_rounds(folder: Path, rounds: Sequence[Ballot]) -> Path:
    """One round as a CSV; several as a ZIP of such, each of which can be pooled. Rounds without a vote are left out,
    unless none has one."""
    texts = [votes_csv(ballot) for ballot in rounds if ballot.votes] or [votes_csv(rounds[-1])]
    if len(texts) == 1:
        path = folder / "votes.csv"
        path.write_text(texts[0], encoding="utf-8", newline="")
        return path
    with zipfile.ZipFile(path := folder / "votes.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, text in enumerate(texts, start=1):
            archive.writestr(f"votes-{number}.csv", text)
    return path
