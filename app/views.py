"""HTML of the page, from plain values; every word that came from outside is made printable and escaped by
`escaped` of output.py."""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from .adapters import FileCard
from .compare import Cell
from .foreign import lines_of, shortened
from .output import by_place, escaped
from .pages import pages
from .raters import Pool
from .request import Column
from .sessions import Session
from .visits import Entry
from .votes import Ballot, Tally, Verdict, conclusion, tallies, tally

HEAD = 36  # characters of a column's head; epochs stand at the end of a name, and are not cut
STRONGEST = 5  # modules of a file card


def plain(problem: object) -> str:
    """A problem for gradio's pop-ups, which read HTML."""
    return "<br>".join(escaped(line) for line in lines_of(str(problem)))


def clamped(text: str) -> str:
    """Words of any length in a narrow place."""
    return f'<span class="name" title="{escaped(text)}">{escaped(text)}</span>'


def header(base_name: str = "") -> str:
    """`base_name` where there is one base alone; several have a picker."""
    base = f'<p class="base">base: <b>{escaped(base_name)}</b></p>' if base_name else ""
    return (
        f'<header class="masthead"><h1><span>Res</span>LoRA, side by side</h1>{base}'
        '<p class="lead">Base, LoRA and ResLoRA generate from the same noise with the same settings; an image says '
        "where its layers held anything but the adapter and strength of its column.</p></header>"
    )


def with_commands(text: str) -> str:
    """Words of ours, with commands between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped(text))


def message(text: str, kind: str = "note", words: Callable[[str], str] = escaped) -> str:
    """A line of status; problems come as a list, one to a line. `words` makes HTML of a line."""
    head, *rest = lines_of(text)
    items = "".join(f"<li>{words(line.strip().removeprefix('- '))}</li>" for line in rest)
    return f'<div class="message {kind}" role="status">{words(head)}{f"<ul>{items}</ul>" if items else ""}</div>'


def place_in_line(ahead: int) -> str:
    """Said to somebody who waits."""
    comparisons = (
        f"{ahead} comparisons of other visitors come" if ahead > 1 else "A comparison of another visitor comes"
    )
    return message(f"{comparisons} first; yours begins after that, and Stop gives its place up.")


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
    names, row_pages, column_pages = pages(request, session.view.pages)
    at = min(session.view.page, max(0, len(names) - 1))

    def on(page: int | None) -> str:
        """Attributes of what stands on a page; the others are hidden, and the viewer goes through all."""
        return "" if page is None else f' data-page="{page}"{"" if page == at else " hidden"}'

    def td(i: int, j: int) -> str:
        row, column = request.rows[i], request.columns[j]
        cell, page = generated.get((row, column)), on(row_pages[i] if turned else column_pages[j])
        if cell is None:
            pending = '<div class="cell pending" role="img" aria-label="not generated"></div>'
            return f'<td role="cell"{page}>{pending}</td>'
        label, held = escaped(f"{column.label}: {row.label}"), clamped(cell.generated_with)
        other = f'<span class="held">the layers held {held}</span>' if cell.generated_with != column.held else ""
        return (
            f'<td role="cell"{page}><button type="button" class="cell" data-row="{i}" data-column="{j}" '
            f'title="Look closer at {label}"><img src="{session.addresses[id(cell)]}" alt="{label}"></button>'
            f"{other}</td>"
        )

    def row_head(i: int, scope: str) -> str:
        row, page = request.rows[i], on(row_pages[i]) if scope == "col" else ""
        words = f"{clamped(row.prompt)}<small>{escaped(row.note)}</small>"
        return th(scope, f'data-row="{i}" data-label="{escaped(row.label)}"{page}', words)

    def column_head(j: int, scope: str) -> str:
        page = on(column_pages[j]) if scope == "col" else ""
        return th(scope, f'data-column="{j}" data-label="{escaped(request.columns[j].label)}"{page}', heads[j])

    rows, columns = range(len(request.rows)), range(len(request.columns))
    if turned := session.view.transposed:
        head = "".join(row_head(i, "col") for i in rows)
        body = "".join(tr(column_head(j, "row"), (td(i, j) for i in rows), on(column_pages[j])) for j in columns)
        across = row_pages
    else:
        head = "".join(column_head(j, "col") for j in columns)
        body = "".join(tr(row_head(i, "row"), (td(i, j) for j in columns), on(row_pages[i])) for i in rows)
        across = column_pages
    view, corner = escaped(json.dumps(asdict(session.view))), "adapter" if turned else "prompt and seed"
    return (
        f'{pager(names, at)}<div class="grid" style="--columns: {sum(page in (None, at) for page in across)}" '
        f'data-rows="{len(rows)}" data-columns="{len(columns)}" data-transposed="{str(turned).lower()}" '
        f'data-view="{view}" tabindex="0" '
        f'role="region" aria-label="Comparison grid"><table role="table"><thead><tr role="row">'
        f'<th scope="col" role="columnheader"><span class="sr">{corner}</span></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def pager(names: Sequence[str], at: int) -> str:
    """Turns the grid's pages; nothing where there is one alone."""
    if not names:
        return ""
    return (
        f'<nav class="pager" aria-label="Pages of the grid" data-page-now="{at}" '
        f'data-names="{escaped(json.dumps(list(names)))}">'
        '<button type="button" data-turn="-1" aria-label="Page before">←</button>'
        f'<p aria-live="polite"><b>{escaped(names[at])}</b> <small>page {at + 1} of {len(names)}</small></p>'
        '<button type="button" data-turn="1" aria-label="Next page">→</button></nav>'
    )


def th(scope: str, data: str, words: str) -> str:
    return f'<th scope="{scope}" role="{scope.replace("col", "column")}header" {data}>{words}</th>'


def tr(head: str, cells: Iterable[str], attributes: str = "") -> str:
    return f'<tr role="row"{attributes}>{head}{"".join(cells)}</tr>'


def short_heads(columns: Sequence[Column]) -> list[str]:
    """HTML of the columns' heads. What all adapters' names begin with is left out; the whole name is in the title."""
    names = {column.adapter.label for column in columns if column.adapter}
    common = common_start(sorted(names))

    def head(column: Column) -> str:
        name = column.adapter.label if column.adapter else "base"
        short = shortened(name[len(common) :], HEAD) if column.adapter else name
        notes = [f"× {column.strength:g}"] if column.adapter else []
        notes += [column.setting.label] if column.setting else []
        title = f'<span class="name" title="{escaped(name)}">{escaped(short)}</span>'
        return title + (f"<small>{escaped(' · '.join(notes))}</small>" if notes else "")

    return [head(column) for column in columns]


def common_start(names: Sequence[str]) -> str:
    """Return what several names begin with, up to the last separator, so that whole words stay.

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
    """Show what a LoRA file says about itself, and whether it fits."""
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
    notes = "".join(message(note, words=with_commands) for note in facts.notes)
    return (
        f'<article class="file"><h2>{label}</h2>{state}{notes}'
        f'<div class="halves"><div>{left}</div><div>{right}</div></div>{whole}</article>'
    )


def strip(addresses: Sequence[str], name: str) -> str:
    """Small images in a line."""
    images = (f'<img src="{address}" alt="{escaped(name)}, image {n}">' for n, address in enumerate(addresses, start=1))
    return f'<div class="strip">{"".join(images)}</div>' if addresses else ""


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


def earlier_rounds(rounds: Sequence[Ballot]) -> str:
    """Say that the result is of the last round alone, and where the votes of the others are."""
    if not rounds:
        return ""
    said = []
    for old in rounds:
        count = f"{len(old.votes)} vote{'s' * (len(old.votes) != 1)}"
        said.append(f"{old.first.label} against {old.second.label}, {count}{old.rater and f' of {old.rater}'}")
    head = "The result is that of this round. Earlier rounds of this comparison are in the download, too:"
    return message("\n".join([head, *said]))


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
    """Show what several raters said together."""
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
