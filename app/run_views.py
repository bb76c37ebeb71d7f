"""HTML of training runs: their curves, their merge, their samples. Words from outside go through `views.escaped`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from .charts import colour_of, dash_of
from .runs import RunFolder
from .trainer import Training
from .views import clamped, duration, escaped, message, table

PLOT_SIDE = 700  # pixels

NOTHING = message("No run was found. Train one, or start the page with --runs and the folder of your runs.")


def legend(runs: Sequence[RunFolder]) -> str:
    """Name the line of each run; it has a dash as well as a colour."""
    if not runs:
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 36 8" aria-hidden="true"><line x1="0" y1="4" x2="36" y2="4" stroke="{colour_of(n)}" '
        f'stroke-width="3" stroke-dasharray="{dash_of(n)}"/></svg><b>{escaped(run.label)}</b> '
        f"<small>{escaped(run.method)}</small></li>"
        for n, run in enumerate(runs)
    )
    return f'<ul class="legend">{items}</ul>'


def merges(runs: Sequence[RunFolder]) -> str:
    """Show what taking the shortcuts out cost each run."""
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


def samples(runs: Sequence[RunFolder], step: int, address: Callable[[Path], str | None]) -> str:
    """A column for each run, with its newest samples up to `step`."""
    columns = [(run, run.step_shown(step)) for run in runs]
    return sample_table(columns, [(run.label, said(shown)) for run, shown in columns], address)


def sample_history(run: RunFolder, address: Callable[[Path], str | None]) -> str:
    """A column for each step of one run, the newest first."""
    steps = sorted(run.samples, reverse=True)
    return sample_table([(run, step) for step in steps], [(said(step), "") for step in steps], address)


def search(training: Training, address: Callable[[Path, int], str | None]) -> str:
    """The plot of a search before the training; nothing where there is none."""
    plot = training.plot_of_search
    source = address(plot, PLOT_SIDE) if plot else None
    alt = "Held-out loss over learning rate, coloured by alpha / rank"
    return f'<img class="search" src="{source}" alt="{alt}">' if source else ""


def said(step: int | None) -> str:
    return "none yet" if step is None else f"step {step}"


def sample_table(
    columns: Sequence[tuple[RunFolder, int | None]],
    heads: Sequence[tuple[str, str]],
    address: Callable[[Path], str | None],
) -> str:
    """Rows are the images of each prompt, whatever number each run gave it. `address` gives nothing for an image that
    cannot be read."""
    rows = list(dict.fromkeys(row for run, _ in columns for row in sample_rows(run)))
    if not rows:
        return message("There are no samples; prompts for samples make some.") if columns else ""

    def td(run: RunFolder, step: int | None, row: tuple[str, int]) -> str:
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


def sample_rows(run: RunFolder) -> dict[tuple[str, int], str]:
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
    """Say in a line and a bar where a training stands."""
    step, total, name = training.step(), training.total_steps, training.folder.name
    if training.running:
        return progress(step, total, f"{name}: {standing(training)}")
    if training.failed:
        return message("\n".join([f"{name} {standing(training)}:", *training.log()]), "bad")
    labels = [adapter_label(training, adapter) for adapter in training.adapters()]
    names = f"{' and '.join(labels)} {'is' if len(labels) == 1 else 'are'} offered to the Compare tab"
    where = names if labels else "no adapter was written"
    if training.stopped:
        return message(f"{name} {standing(training)}; {where}.", "warn")
    return message(f"{name}: {standing(training)}; {where}.", "good" if labels else "bad")


def standing(training: Training) -> str:
    """Say in a few words where a training stands."""
    step, total = training.step(), training.total_steps
    if training.running:
        left = training.seconds_left(step)
        waiting = "searching learning rate and alpha" if training.is_searching else "getting ready"
        text = f"step {step} of {total}" if step else waiting
        text += f", about {duration(left)} left" if left is not None else ""
        return text + ("; finishing this step and saving" if training.stopped else "")
    if training.stopped:
        return f"was stopped at step {step} of {total}"
    if training.finished:
        return f"{step} steps done"
    how = f"was killed from outside ({training.killed_by})" if training.killed_by else "ended with an error"
    if training.record.code is None:
        how = "ended while no page was there to see it: it was killed, or the machine stopped"
    return f"{how}, after {step} of {total} steps"


def trainings(found: Sequence[Training], looked_at: Training | None) -> str:
    """Trainings of one owner, each a button that shows it; nothing while there is only one."""
    if len(found) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" class="entry" data-name="{escaped(training.folder.name)}"'
        f"{' aria-current=true' if training is looked_at else ''}><span>{escaped(training.folder.name)}</span>"
        f"<small>{escaped(standing(training))}</small></button>"
        for training in found
    )
    return f'<nav class="history trainings" aria-label="Your trainings">{buttons}</nav>'


def adapter_label(training: Training, adapter: Path) -> str:
    """The run's name, with the checkpoint's where it is of one."""
    return "/".join([training.folder.name, *adapter.parent.relative_to(training.folder).parts])
