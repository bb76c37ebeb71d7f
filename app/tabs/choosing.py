"""The adapters that a comparison may choose from: added files, adapters of runs; renamed, moved, removed."""

from dataclasses import replace
from pathlib import Path

import gradio as gr

from .. import views
from ..foreign import name_of
from ..runs import is_checkpoint
from ..sessions import MAX_LABEL, Session
from ..studio import PRIVATE, Studio
from ..tabs import refusal
from .fields import Fields
from .latest import Latest

ALL = "{run}: all {count} checkpoints"


def runs_offered(studio: Studio) -> gr.Dropdown:
    """Adapters of runs, each by itself and all checkpoints of a run at once."""
    return gr.Dropdown(choices=[*studio.adapter_files(), *checkpoints_of_runs(studio)], value=None)


def checkpoints_of_runs(studio: Studio) -> dict[str, dict[str, Path]]:
    """Adapters of a run's checkpoints, in the order of their steps, by what the page calls them together."""
    by_run: dict[str, dict[str, Path]] = {}
    for label, path in studio.adapter_files().items():
        if is_checkpoint(path):
            by_run.setdefault(label.rpartition("/")[0] or label, {})[label] = path
    return {
        ALL.format(run=run, count=len(files)): dict(sorted(files.items(), key=lambda item: step_of(item[1])))
        for run, files in by_run.items()
        if len(files) > 1
    }


def step_of(checkpoint: Path) -> int:
    number = checkpoint.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def added(studio: Studio, paths: dict[str, Path], uploaded: bool, session: Session) -> list[str]:
    """The files that fit join the adapters, whose names are the answer; the others are named with the reason.
    Uploads go by their own names."""
    problems, joined = [], []
    for name, path in paths.items():
        try:
            card = studio.comparer_of(session).shelf.card(path, path.stem if uploaded else name)
        except ValueError as problem:
            problems.append(str(problem).replace(str(path), name))
            continue
        if card.fits:
            own = session.add_adapter(card.adapter)
            if session.visit and uploaded:
                session.add_adapter(session.visit.keep(own))
            joined.append(own.label)
        else:
            problems.append("\n".join([f"{name} does not fit the loaded base:", *card.mismatches]))
    session.store_list()
    if problems:
        gr.Warning(views.plain("\n".join(problems)), duration=None, title="Not added")
    return joined


def choose_adapters(studio: Studio, fields: Fields, latest: Latest) -> None:
    """Add, rename, reorder and take away adapters, where the page stands now."""
    with gr.Accordion("Rename, reorder, remove adapters", open=False):
        one = gr.Dropdown(label="Adapter", choices=[], value=None, elem_id="one_adapter")
        name = gr.Textbox(label="Its name", max_length=MAX_LABEL, elem_id="new_name")
        with gr.Row(elem_classes="tools"):
            rename = gr.Button("Rename", size="sm", min_width=70, elem_id="rename")
            earlier = gr.Button("Move up", size="sm", min_width=70, elem_id="move_up")
            remove = gr.Button("Remove", size="sm", min_width=70, elem_id="remove")
    outputs = [fields.adapters, one]

    def add_files(session: Session, paths: list[str] | None) -> list:
        files = {Path(path).name: Path(path) for path in paths or []}
        return fields.brought(session, added(studio, files, True, session))

    def add_of_runs(session: Session, label: str | None) -> list:
        if label is None:
            return [gr.skip()] * 3
        single, together = studio.adapter_files(), checkpoints_of_runs(studio)
        files = {label: single[label]} if label in single else together.get(label)
        if files is None:
            raise refusal(f"There is no adapter {label} any more.")
        return [*fields.brought(session, added(studio, files, False, session)), None]

    def offered(session: Session) -> gr.Dropdown:
        """Offer the adapters of now; the one that is chosen here stays."""
        return gr.Dropdown(choices=list(session.adapters))

    def known(session: Session, label: str | None) -> str:
        if label not in session.adapters:
            raise refusal("Choose an adapter first.")
        return label

    def rearranged(session: Session, adapters: list, chosen: list[str], label: str | None) -> list:
        session.arrange(adapters)
        fields.store_choice(session, lambda _: chosen)
        return [fields.choices(session, chosen), gr.Dropdown(choices=list(session.adapters), value=label)]

    def renamed(session: Session, label: str | None, text: str, chosen: list[str]) -> list:
        own, new = session.adapters[known(session, label)], name_of(text, MAX_LABEL)
        if not text.strip():
            raise refusal("Write the adapter's new name first.")
        if new != label and new in session.adapters:
            raise refusal(f"Another adapter is called {new}.")
        adapters = [replace(own, label=new) if a.label == label else a for a in session.adapters.values()]
        return rearranged(session, adapters, [new if c == label else c for c in chosen], new)

    def moved(session: Session, label: str | None, chosen: list[str]) -> list:
        adapters = list(session.adapters.values())
        place = list(session.adapters).index(known(session, label))
        if place:
            adapters[place - 1 : place + 1] = [adapters[place], adapters[place - 1]]
        return rearranged(session, adapters, chosen, label)

    def removed(session: Session, label: str | None, chosen: list[str]) -> list:
        known(session, label)
        adapters = [adapter for adapter in session.adapters.values() if adapter.label != label]
        return rearranged(session, adapters, [c for c in chosen if c != label], None)

    adapters, joined, of_runs = fields.adapters, fields.joined, fields.of_runs
    uploads = latest.on([fields.files.upload], add_files, [fields.files], [adapters, joined], adds=True)
    from_runs = latest.on([of_runs.input], add_of_runs, [of_runs], [adapters, joined, of_runs], adds=True)
    for event in (uploads, from_runs):
        fields.tick_after(event)
    latest.on([adapters.change], offered, [], [one])
    one.change(None, one, name, js="(label) => label || ''", **PRIVATE)
    latest.on([rename.click], renamed, [one, name, adapters], outputs, in_turn=True)
    latest.on([earlier.click], moved, [one, adapters], outputs, in_turn=True)
    latest.on([remove.click], removed, [one, adapters], outputs, in_turn=True)
