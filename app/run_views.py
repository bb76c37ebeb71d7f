"""HTML of training runs: their curves, their merge, their samples. Words from outside go through `views.escaped`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from .charts import colour_of, dash_of, gap_chart, loss_chart, validation_chart
from .runs import Run
from .training import Training
from .views import clamped, duration, escaped, message, table

NOTHING = message("No run was found. Train one, or start the page with --runs and the folder of your runs.")


def legend(runs: Sequence[Run]) -> str:
    """Which line is whose; a dash as well as a colour."""
    items = "".join(
        f'<li><svg viewBox="0 0 36 8" aria-hidden="true"><line x1="0" y1="4" x2="36" y2="4" stroke="{colour_of(n)}" '
        f'stroke-width="3" stroke-dasharray="{dash_of(n)}"/></svg><b>{escaped(run.label)}</b> '
        f"<small>{escaped(run.method)}</small></li>"
        for n, run in enumerate(runs)
    )
    return f'<ul class="legend">{items}</ul>'


def chart(title: str, note: str, drawing: str, runs: Sequence[Run]) -> str:
    names = ", ".join(run.label for run in runs)
    body = drawing or '<p class="empty">Nothing was measured yet.</p>'
    return (
        f'<figure class="chart" role="group" aria-label="{escaped(f"{title} of {names}")}">'
        f"<figcaption><b>{escaped(title)}</b> <small>{escaped(note)}</small></figcaption>{body}</figure>"
    )


def curves(runs: Sequence[Run], keep: float) -> str:
    """The charts under one legend."""
    if not runs:
        return NOTHING
    loss = chart("Training loss", "faint: every step, bold: smoothed", loss_chart(runs, keep), runs)
    fixed = chart("Fixed-noise validation loss", "◇ as exported", validation_chart(runs), runs)
    note = "estimated while training; ◇ as exported, as in the table"
    gaps = chart("Merge gap", note, gap_chart(runs), runs) if any(run.estimates for run in runs) else ""
    return f'{legend(runs)}<div class="halves charts">{loss}{fixed}{gaps}</div>'


def merges(runs: Sequence[Run]) -> str:
    """What taking the shortcuts out cost each run."""
    if not runs:
        return ""
    head = ("run", "as trained", "as exported", "merge gap", "base", "at step", "largest layer error")
    lines = []
    for run in runs:
        if run.merge is None:
            lines.append((run.label, *["not yet"] * 4, f"{run.last_step} so far", ""))
            continue
        m = run.merge
        worst = f"{max(m.layer_errors.values()):.1%}" if m.layer_errors else ""
        base, trained, exported = ("–" if loss is None else f"{loss:.5f}" for loss in (m.base, m.trained, m.exported))
        lines.append((run.label, trained, exported, said_gap(m.gap), base, run.merged_at, worst))
    return table(head, lines, "Loss on fixed noise, and the merge gap: as exported less as trained")


def said_gap(gap: float) -> str:
    return f"{gap:+.1e}" if gap else "none"


def samples(runs: Sequence[Run], step: int, address: Callable[[Path], str | None]) -> str:
    """A column for each run, with its newest samples up to `step`."""
    columns = [(run, run.step_shown(step)) for run in runs]
    return sample_table(columns, [(run.label, said(shown)) for run, shown in columns], address)


def sample_history(run: Run, address: Callable[[Path], str | None]) -> str:
    """A column for each step of one run, the newest first."""
    steps = sorted(run.samples, reverse=True)
    return sample_table([(run, step) for step in steps], [(said(step), "") for step in steps], address)


def said(step: int | None) -> str:
    return "none yet" if step is None else f"step {step}"


def sample_table(
    columns: Sequence[tuple[Run, int | None]],
    heads: Sequence[tuple[str, str]],
    address: Callable[[Path], str | None],
) -> str:
    """Rows are the images of each prompt, whatever number each run gave it. `address` gives nothing for an image that
    cannot be read."""
    rows = list(dict.fromkeys(row for run, _ in columns for row in sample_rows(run)))
    if not rows:
        return message("There are no samples; prompts for samples make some.") if columns else ""

    def td(run: Run, step: int | None, row: tuple[str, int]) -> str:
        file = sample_rows(run).get(row)
        path = run.samples.get(step, {}).get(file) if step is not None and file else None
        source = address(path) if path else None
        if source is None:
            return '<td role="cell"><div class="cell pending" role="img" aria-label="no sample"></div></td>'
        alt = escaped(f"{run.label}, step {step}: {row[0]}")
        return f'<td role="cell"><div class="cell"><img src="{source}" alt="{alt}"></div></td>'

    head = "".join(
        f'<th scope="col" role="columnheader">{clamped(words)}<small>{escaped(note)}</small></th>'
        for words, note in heads
    )
    body = "".join(
        f'<tr role="row"><th scope="row" role="rowheader">{clamped(row[0])}<small>image {row[1] + 1}</small></th>'
        f"{''.join(td(run, step, row) for run, step in columns)}</tr>"
        for row in rows
    )
    return (
        f'<div class="grid" style="--columns: {len(columns)}" tabindex="0" role="region" '
        f'aria-label="Samples"><table role="table"><thead><tr role="row">'
        f'<th scope="col" role="columnheader"><span class="sr">prompt</span></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def sample_order(name: str) -> tuple[int, int]:
    """
    >>> sample_order("2-10.png")
    (2, 10)
    """
    prompt, number = name.removesuffix(".png").split("-")
    return int(prompt), int(number)


def sample_rows(run: Run) -> dict[tuple[str, int], str]:
    """(prompt, number of the image) -> file name, in the order of the run's prompts."""
    files = {file for images in run.samples.values() for file in images}
    found = {}
    for file in sorted(files, key=sample_order):
        prompt, number = sample_order(file)
        found[run.prompts[prompt] if prompt < len(run.prompts) else f"prompt {prompt + 1}", number] = file
    return found


def progress(done: int, total: int, text: str) -> str:
    share = min(1.0, done / total) if total else 0.0
    return (
        f'<div class="progress"><progress max="1" value="{share:.4f}" aria-label="{escaped(text)}"></progress>'
        f"<span>{escaped(text)}</span></div>"
    )


def log(lines: Sequence[str]) -> str:
    """The end of what the script printed."""
    return f'<pre class="log">{escaped(chr(10).join(lines))}</pre>'


def training_status(training: Training) -> str:
    """Where a training stands, in a line and a bar."""
    step, total, name = training.step(), training.total_steps, training.folder.name
    if training.running:
        left = training.seconds_left(step)
        text = f"step {step} of {total}" if step else "getting ready"
        text += f", about {duration(left)} left" if left is not None else ""
        text += "; finishing this step and saving" if training.stopped else ""
        return progress(step, total, f"{name}: {text}")
    if training.failed:
        how = "ended with an error" if (signal := training.killed_by) is None else f"was killed from outside ({signal})"
        return message("\n".join([f"{name} {how}, after {step} of {total} steps:", *training.log()]), "bad")
    labels = [adapter_label(training, adapter) for adapter in training.adapters()]
    names = f"{' and '.join(labels)} {'is' if len(labels) == 1 else 'are'} offered to the Compare tab"
    where = names if labels else "no adapter was written"
    if training.stopped:
        return message(f"{name} was stopped at step {step} of {total}; {where}.", "warn")
    return message(f"{name}: {step} steps done; {where}.", "good" if labels else "bad")


def adapter_label(training: Training, adapter: Path) -> str:
    """The run's name, with the checkpoint's where it is of one."""
    return "/".join([training.folder.name, *adapter.parent.relative_to(training.folder).parts])
