"""HTML of the page, from plain values; every word that came from outside is made printable and escaped by
`escaped` of output.py."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from .adapters import FileCard
from .compare import Cell
from .foreign import lines_of, shortened
from .measures import DRIFT, Measure
from .output import by_place, escaped
from .raters import Pool
from .request import Column, CompareRequest
from .sessions import Session
from .verdict import Findings
from .visits import Entry
from .votes import Ballot, Tally, Verdict, conclusion, tallies, tally

STRONGEST = 5  # modules of a file card


def plain(problem: object) -> str:
    """For gradio's pop-ups, which read HTML."""
    return "<br>".join(escaped(line) for line in lines_of(str(problem)))


def clamped(text: str) -> str:
    """Words of any length in a narrow place."""
    return f'<span class="name" title="{escaped(text)}">{escaped(text)}</span>'


def header(base_name: str = "") -> str:
    """`base_name` where there is one base alone; several have a picker."""
    base = f'<p class="base">base: <b>{escaped(base_name)}</b></p>' if base_name else ""
    return (
        f'<header class="masthead"><h1><span>Res</span>LoRA, side by side</h1>{base}'
        '<p class="lead">Base, LoRA and ResLoRA generate from the same noise with the same settings; each image says '
        "which adapter its layers held.</p></header>"
    )


def message(text: str, kind: str = "note") -> str:
    """A line of status; problems come as a list, one to a line."""
    head, *rest = lines_of(text)
    items = "".join(f"<li>{escaped(line.strip().removeprefix('- '))}</li>" for line in rest)
    return f'<div class="message {kind}" role="status">{escaped(head)}{f"<ul>{items}</ul>" if items else ""}</div>'


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def history(entries: Sequence[Entry], address: Callable[[Path], str | None]) -> str:
    """The visitor's comparisons, the newest first, each a button; nothing while there is only one."""
    if len(entries) < 2:
        return ""
    buttons = []
    for entry in entries:
        source, title = address(entry.image), escaped(f"{entry.prompt} · {entry.count} images")
        image = f'<img src="{source}" alt="">' if source else ""
        now = ' aria-current="true"' if entry.current else ""
        buttons.append(
            f'<button type="button" class="entry" data-number="{entry.number}" title="{title}"{now}>{image}'
            f"<span>{escaped(shortened(entry.prompt, 40))}</span><small>{entry.count} images</small></button>"
        )
    return f'<nav class="history" aria-label="Your comparisons">{"".join(buttons)}</nav>'


def grid(session: Session) -> str:
    """Rows and columns of the session's comparison; cells to come are outlined."""
    request = session.request
    if request is None:
        return message("Write a prompt, choose adapters, and compare.")
    generated = by_place(session.cells)
    heads = short_heads(request.columns)

    def td(i: int, j: int) -> str:
        row, column = request.rows[i], request.columns[j]
        cell = generated.get((row, column))
        if cell is None:
            return '<td role="cell"><div class="cell pending" role="img" aria-label="not generated"></div></td>'
        label = escaped(f"{column.label}: {row.label}")
        return (
            f'<td role="cell"><button type="button" class="cell" data-row="{i}" data-column="{j}" '
            f'title="Look closer at {label}"><img src="{session.addresses[id(cell)]}" alt="{label}"></button>'
            f'<span class="held" title="what the layers held">{clamped(cell.generated_with)}</span></td>'
        )

    head = "".join(
        f'<th scope="col" role="columnheader" data-column="{j}" data-label="{escaped(column.label)}">{heads[j]}</th>'
        for j, column in enumerate(request.columns)
    )
    columns, rows = range(len(request.columns)), request.rows
    view = escaped(json.dumps(asdict(session.view)))
    body = "".join(
        f'<tr role="row"><th scope="row" role="rowheader" data-row="{i}" data-label="{escaped(row.label)}">'
        f"{clamped(row.prompt)}"
        f"<small>{escaped(row.note)}</small></th>"
        f"{''.join(td(i, j) for j in columns)}</tr>"
        for i, row in enumerate(rows)
    )
    return (
        f'<div class="grid" style="--columns: {len(request.columns)}" data-rows="{len(rows)}" '
        f'data-columns="{len(columns)}" data-view="{view}" tabindex="0" role="region" '
        f'aria-label="Comparison grid"><table role="table"><thead><tr role="row">'
        f'<th scope="col" role="columnheader"><span class="sr">prompt and seed</span></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def short_heads(columns: Sequence[Column]) -> list[str]:
    """HTML of the columns' heads. What all adapters' names begin with is left out; the whole name is in the title."""
    names = {column.adapter.label for column in columns if column.adapter}
    common = common_start(sorted(names))

    def head(column: Column) -> str:
        name = column.adapter.label if column.adapter else "base"
        short = name[len(common) :] if column.adapter else name
        notes = [f"× {column.strength:g}"] if column.adapter else []
        notes += [column.setting.label] if column.setting else []
        title = f'<span class="name" title="{escaped(name)}">{escaped(short)}</span>'
        return title + (f"<small>{escaped(' · '.join(notes))}</small>" if notes else "")

    return [head(column) for column in columns]


def common_start(names: Sequence[str]) -> str:
    """What several names begin with, up to the last separator, so that whole words stay.

    >>> common_start(["panda/checkpoint-100", "panda/checkpoint-200"])
    'panda/checkpoint-'
    """
    if len(names) < 2:
        return ""
    common = os.path.commonprefix(list(names))
    return common[: max(common.rfind(separator) for separator in "/-_ ") + 1]


SHORT = 14  # characters of a cell that stay on one line


def td(value: object) -> str:
    return f"<td{' class=short' if len(str(value)) <= SHORT else ''}>{escaped(value)}</td>"


def table(head: Sequence[object], rows: Iterable[Iterable[object]], caption: str = "") -> str:
    """A plain table; the first cell of a row is its header."""
    lines = []
    for first, *rest in rows:
        lines.append(f'<tr><th scope="row">{escaped(first)}</th>{"".join(map(td, rest))}</tr>')
    many = " many" if len(head) > 3 else ""
    label, named = escaped(caption or "table"), "".join(f"<th scope=col>{escaped(v)}</th>" for v in head)
    heading = f"<thead><tr>{named}</tr></thead>" if any(head) else ""
    return (
        f'<figure class="card">{f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="facts{many}">'
        f"{heading}<tbody>{''.join(lines)}</tbody></table></div></figure>"
    )


def file_card(card: FileCard) -> str:
    """What a LoRA file says about itself, and whether it fits."""
    facts, label = card.inspection, escaped(card.adapter.label)
    state = (
        message("Fits the loaded base.", "good")
        if card.fits
        else message("\n".join(["Does not fit the loaded base:", *card.mismatches]), "bad")
    )
    alphas = sorted({m.alpha for m in facts.modules if m.alpha is not None})
    about = [
        ("for", facts.family),
        ("keys", facts.dialect),
        ("alpha", ", ".join(f"{alpha:g}" for alpha in alphas) or "not stated: the rank"),
        ("stored as", ", ".join(facts.dtypes)),
        ("norm", f"{facts.norm:.3g}"),
        ("rank needed", f"{facts.rank_needed} for at most 5 % error in any module"),
        ("size", f"{facts.size_bytes / 1024:,.0f} KiB"),
        ("sha256", card.adapter.sha256),
    ]
    parts = []
    for component in facts.components:
        modules = facts.of(component)
        ranks = ", ".join(map(str, sorted({m.rank for m in modules})))
        parts.append((component, len(modules), ranks, f"{sum(m.norm**2 for m in modules) ** 0.5:.3g}"))
    strongest = sorted(facts.modules, key=lambda m: -m.norm)[:STRONGEST]
    modules = [(f"{m.component}.{m.path}", f"{m.norm:.3g}") for m in strongest]
    header = [(key, shortened(value, 200)) for key, value in sorted(facts.metadata.items())]
    said = [(name, shortened(value, 200)) for name, value in facts.facts.items()]
    left = table(("", ""), about, "The file") + table(("module", "norm"), modules, "Strongest modules")
    right = table(("", ""), said, "Its training, by its header") if said else ""
    right += table(("component", "modules", "rank", "norm"), parts, "Components")
    whole = f"<details><summary>Whole header</summary>{table(('key', 'value'), header)}</details>" if header else ""
    notes = "".join(message(note) for note in facts.notes)
    return (
        f'<article class="file"><h3>{label}</h3>{state}{notes}'
        f'<div class="halves"><div>{left}</div><div>{right}</div></div>{whole}</article>'
    )


def strip(addresses: Sequence[str], name: str) -> str:
    """Small images in a line."""
    images = (f'<img src="{address}" alt="{escaped(name)}, image {n}">' for n, address in enumerate(addresses, start=1))
    return f'<div class="strip">{"".join(images)}</div>' if addresses else ""


def measures(request: CompareRequest, found: Sequence[Measure]) -> str:
    """A line for each measure, a column for each column of the comparison."""
    columns = request.columns

    def said(measure: Measure, column: Column) -> str:
        if (figure := measure.figure(column)) is not None:
            return str(figure)
        return "–" if measure.name == DRIFT and column.adapter is None else measure.wanting

    lines = [(measure.name, *(said(measure, column) for column in columns)) for measure in found]
    return table(("measure", *(c.label for c in columns)), lines, "Measures: mean (95 % interval), n")


EARLIER = "This round is of an earlier comparison. Begin another round for the one on the Compare tab."


def ballot(session: Session) -> str:
    """The pair to vote on. Both images get new files, so that nothing links them to the grid's."""
    current, count = session.ballot.current, len(session.ballot.pairs)
    earlier = message(EARLIER, "warn") if session.ballot.request is not session.request else ""
    if current is None:
        return earlier + message(f"All {count} pairs have a vote. The result says which column was which.", "good")
    images = "".join(
        f'<img src="{session.address(cell.image)}" alt="{side} image">'
        for side, cell in (("left", current.left), ("right", current.right))
    )
    number = len(session.ballot.votes) + 1
    title = (
        f"<p><b>{escaped(session.ballot.question)}</b><br>{escaped(current.row.prompt)} "
        f"<small>({number} of {count})</small></p>"
    )
    return f'{earlier}<div class="ballot">{title}{images}</div>'


def counted(votes: Tally) -> tuple:
    """Cells of a line of votes."""
    low, high = votes.interval
    rate = "–" if votes.win_rate is None else f"{votes.win_rate:.0%} ({low:.0%} to {high:.0%})"
    return votes.first, votes.second, votes.ties, votes.neither, rate, f"{votes.p_value:.3f}"


def vote_result(ballot: Ballot) -> str:
    """Win rate of the first column, by prompt and overall."""

    first, second = ballot.first.label, ballot.second.label
    lines = [(prompt, *counted(votes)) for prompt, votes in tallies(ballot).items()]
    lines.append(("overall", *counted(tally(ballot.votes))))
    head = ("prompt", first, second, "ties", "both bad", f"{first} wins (95 % interval)", "sign test, p")
    return message(conclusion(ballot)) + table(head, lines, "Votes")


def recap(session: Session) -> str:
    """Every pair that was voted on, with its sides as they were shown."""
    ballot = session.ballot
    if ballot.request is not session.request:
        return ""

    def side(cell: Cell) -> str:
        source = session.addresses.get(id(cell))
        image = f'<img src="{source}" alt="">' if source else ""
        return f"<td>{image}<small>{escaped(cell.column.label)}</small></td>"

    said = {Verdict.FIRST: ballot.first.label, Verdict.SECOND: ballot.second.label}
    lines = "".join(
        f'<tr><th scope="row">{escaped(pair.row.label)}</th>{side(pair.left)}{side(pair.right)}'
        f"<td>{escaped(said.get(vote, vote))}</td></tr>"
        for pair, vote in ballot.voted
    )
    head = "<tr><th>prompt and seed</th><th>left</th><th>right</th><th>vote</th></tr>"
    return (
        f"<details><summary>All {len(ballot.votes)} pairs, with their sides</summary>"
        f'<div class="scroll"><table class="facts recap"><thead>{head}</thead><tbody>{lines}</tbody></table></div>'
        "</details>"
    )


def pooled(pool: Pool) -> str:
    """What several raters said together."""
    names = (pool.first, pool.second)
    lines = [(rater, *counted(tally)) for rater, tally in pool.by_rater.items()]
    lines.append(("each pair once, by its majority", *counted(pool.by_pair)))
    head = ("rater", *names, "ties", "both bad", f"{names[0]} wins (95 % interval)", "sign test, p")
    if pool.compared:
        share = f"{pool.agreed / pool.compared:.0%} of {pool.compared}"
        agreement = f"Two raters said the same of a pair in {share} cases; 50 % is chance."
    else:
        agreement = "No pair was decided by two raters, so that nothing can be said of their agreement."
    return table(head, lines, f"{len(pool.by_rater)} raters") + message(agreement)


def verdict(found: Findings | None) -> str:
    """What may be said of two columns, and the figures that it is said from."""
    if found is None:
        return ""
    lines = [
        (name, difference, "" if name in found.shown else "not shown") for name, difference in found.differences.items()
    ]
    differences = table(("measure", "difference (95 % interval), n", ""), lines, "Row by row") if lines else ""
    merges = "; ".join(f"{label} {gap}" for label, gap in found.gaps.items())
    gaps = message(f"Merge gap, as the files say: {merges}.") if merges else ""
    said = "\n".join([f"{found.first.label} against {found.second.label}", *found.sentences()])
    return f'<section aria-label="Verdict">{message(said)}{differences}{gaps}</section>'
