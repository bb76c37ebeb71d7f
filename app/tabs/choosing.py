"""Which adapters a comparison may choose from: files that are added, adapters of runs; renamed, moved, taken away."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gradio as gr

from .. import views
from ..foreign import name_of
from ..runs import is_checkpoint
from ..sessions import MAX_LABEL, Session
from ..studio import LIGHT, PRIVATE, Studio
from ..tabs import refusal
from .fields import Fields

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


def add_files(studio: Studio, fields: Fields) -> Callable:
    def add(paths: list[str] | None, chosen: list[str], request: gr.Request) -> gr.CheckboxGroup:
        files = {Path(path).name: Path(path) for path in paths or []}
        return added(studio, fields, files, True, chosen, studio.sessions.of(request.session_hash))

    return add


def add_of_runs(studio: Studio, fields: Fields) -> Callable:
    def add(label: str | None, chosen: list[str], request: gr.Request) -> list:
        if label is None:
            return [gr.skip()] * 2
        single, together = studio.adapter_files(), checkpoints_of_runs(studio)
        files = {label: single[label]} if label in single else together.get(label)
        if files is None:
            raise refusal(f"There is no adapter {label} any more.")
        return [added(studio, fields, files, False, chosen, studio.sessions.of(request.session_hash)), None]

    return add


def added(
    studio: Studio, fields: Fields, paths: dict[str, Path], uploaded: bool, chosen: list[str], session: Session
) -> gr.CheckboxGroup:
    """The files that fit join the adapters; the others are named with the reason. Uploads go by their own names."""
    problems = []
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
            chosen = [*chosen, own.label]
        else:
            problems.append("\n".join([f"{name} does not fit the loaded base:", *card.mismatches]))
    if problems:
        gr.Warning(views.plain("\n".join(problems)), duration=None, title="Not added")
    return fields.choices(session, chosen)


def manage_adapters(studio: Studio, fields: Fields) -> None:
    """Rename, reorder and take away adapters, where the page stands now."""
    with gr.Accordion("Rename, reorder, remove adapters", open=False):
        one = gr.Dropdown(label="Adapter", choices=[], value=None, elem_id="one_adapter")
        name = gr.Textbox(label="Its name", max_length=MAX_LABEL, elem_id="new_name")
        with gr.Row(elem_classes="tools"):
            rename = gr.Button("Rename", size="sm", min_width=70, elem_id="rename")
            earlier = gr.Button("Move up", size="sm", min_width=70, elem_id="move_up")
            remove = gr.Button("Remove", size="sm", min_width=70, elem_id="remove")
    outputs = [fields.adapters, one]

    def session_of(request: gr.Request) -> Session:
        return studio.sessions.of(request.session_hash)

    def offered(chosen: list[str], label: str | None, request: gr.Request) -> gr.Dropdown:
        labels = list(session_of(request).adapters)
        return gr.Dropdown(choices=labels, value=label if label in labels else None)

    def known(session: Session, label: str | None) -> str:
        if label not in session.adapters:
            raise refusal("Choose an adapter first.")
        return label

    def rearranged(session: Session, adapters: list, chosen: list[str], label: str | None) -> list:
        session.adapters = {adapter.label: adapter for adapter in adapters}
        if session.visit:
            session.visit.write_labels(session.adapters.values())
        return [fields.choices(session, chosen), gr.Dropdown(choices=list(session.adapters), value=label)]

    def renamed(label: str | None, text: str, chosen: list[str], request: gr.Request) -> list:
        session = session_of(request)
        own, new = session.adapters[known(session, label)], name_of(text, MAX_LABEL)
        if not text.strip():
            raise refusal("Write the adapter's new name first.")
        if new != label and new in session.adapters:
            raise refusal(f"Another adapter is called {new}.")
        adapters = [replace(own, label=new) if a.label == label else a for a in session.adapters.values()]
        return rearranged(session, adapters, [new if c == label else c for c in chosen], new)

    def moved(label: str | None, chosen: list[str], request: gr.Request) -> list:
        session = session_of(request)
        adapters = list(session.adapters.values())
        place = list(session.adapters).index(known(session, label))
        if place:
            adapters[place - 1 : place + 1] = [adapters[place], adapters[place - 1]]
        return rearranged(session, adapters, chosen, label)

    def removed(label: str | None, chosen: list[str], request: gr.Request) -> list:
        session = session_of(request)
        known(session, label)
        adapters = [adapter for adapter in session.adapters.values() if adapter.label != label]
        return rearranged(session, adapters, [c for c in chosen if c != label], None)

    fields.adapters.change(offered, [fields.adapters, one], one, **LIGHT, **PRIVATE)
    one.change(lambda label: label or "", one, name, **LIGHT, **PRIVATE)
    rename.click(renamed, [one, name, fields.adapters], outputs, **LIGHT, **PRIVATE)
    earlier.click(moved, [one, fields.adapters], outputs, **LIGHT, **PRIVATE)
    remove.click(removed, [one, fields.adapters], outputs, **LIGHT, **PRIVATE)
