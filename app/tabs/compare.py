"""Compare: what to paint on the left, the pictures on the right, as a grid or pair by pair."""

from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from app import views
from app.forms import SWEEP, fields_of, read_request
from app.output import enlarged, heat_map, png, report, settings_json, sheet, write_zip
from app.request import CompareRequest, Scheduler, digests_in, read_settings
from app.sessions import Session
from app.studio import HEAVY, LIGHT, PRIVATE, Studio

VIEWS = ("Grid", "Slider", "Flip", "Difference")
PAIR_SIDE = 512
GRID_CLICKS = """element.addEventListener('click', (event) => {
  const cell = event.target.closest('[data-row]');
  if (cell) trigger('click', {row: Number(cell.dataset.row), column: Number(cell.dataset.column)});
});"""
FLIP_CLICKS = """element.addEventListener('click', (event) => {
  if (event.target.closest('.turn, .flip')) element.querySelector('.flip').classList.toggle('turned');
});"""

# On a narrow screen the pictures stand above the button.
SHOW_STATUS = """() => {
  if (window.innerWidth < 700) document.getElementById('status').scrollIntoView();
}"""


def compare_tab(studio: Studio, demo: gr.Blocks) -> tuple[gr.CheckboxGroup, Dependency]:
    """Returns the adapters' control, which a training adds to, and the event that fills it when somebody comes."""
    comparer, limits = studio.comparer, studio.comparer.limits

    with gr.Row(equal_height=False, elem_classes="tab-body"):
        with gr.Column(scale=4, min_width=300, elem_classes="controls"):
            prompts = gr.Textbox(
                label="Prompts",
                info="One to a line. {words} in braces are filled from below.",
                lines=2,
                max_lines=12,
                elem_id="prompts",
            )
            placeholders = gr.Textbox(
                label="Placeholders",
                info="subject = panda, cactus",
                lines=1,
                max_lines=8,
                elem_id="placeholders",
                value="",
            )
            seeds = gr.Textbox(label="Seeds", info="0-3, 7", elem_id="seeds")
            adapters = gr.CheckboxGroup(
                label="Adapters",
                info="Each gets a column for every strength.",
                choices=[adapter.label for adapter in studio.sessions.adapters],
                elem_id="adapters",
            )
            more = gr.Dropdown(
                label="Add from runs",
                info="Adapters of runs and their checkpoints.",
                choices=[],
                value=None,
                elem_id="adapters_of_runs",
            )
            strengths = gr.Textbox(
                label="Strengths", info=f"Of every adapter, between 0 and {limits.strength:g}.", elem_id="strengths"
            )
            include_base = gr.Checkbox(label="Base column, without an adapter", value=True)
            with gr.Row(elem_classes="tools"):
                files = gr.UploadButton(
                    "Add files (.safetensors)", file_count="multiple", size="sm", min_width=120, elem_id="adapter_files"
                )
                sweep = gr.Button("Sweep 0 to 1.5", size="sm", min_width=110, elem_id="sweep")
            with gr.Accordion("Sampling", open=False):
                negative = gr.Textbox(label="Negative prompt", lines=1, value="")
                steps = gr.Slider(1, limits.steps, step=1, label="Steps", elem_id="steps")
                guidance = gr.Slider(0, limits.guidance, step=0.5, label="Guidance")
                scheduler = gr.Dropdown(list(Scheduler), label="Scheduler")
            expected = gr.HTML(elem_id="expected", padding=False)
            with gr.Row(elem_classes="tools"):
                run = gr.Button("Compare", variant="primary", elem_id="run", min_width=120)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
            settings_file = gr.UploadButton("Open settings (.json)", size="sm", elem_id="settings_file")
        with gr.Column(scale=9, min_width=320, elem_classes="results"):
            status = gr.HTML(elem_id="status", min_height=48, padding=False)
            view = gr.Radio(VIEWS, value="Grid", label="View", elem_id="view", elem_classes="views")
            with gr.Row(visible=False) as pickers:
                row = gr.Dropdown(label="Prompt and seed", choices=[], scale=2, min_width=160, elem_id="pair_row")
                left = gr.Dropdown(label="Left", choices=[], min_width=120, elem_id="pair_left")
                right = gr.Dropdown(label="Right", choices=[], min_width=120, elem_id="pair_right")
            grid = gr.HTML(js_on_load=GRID_CLICKS, elem_id="grid", padding=False)
            slider = gr.ImageSlider(
                label="Drag to compare", type="pil", format="png", visible=False, elem_id="slider", max_height=560
            )
            flip = gr.HTML(js_on_load=FLIP_CLICKS, visible=False, elem_id="flip", padding=False)
            with gr.Column(visible=False, elem_id="difference") as difference:
                note = gr.HTML(padding=False)
                heat = gr.Image(
                    label="Difference", format="png", interactive=False, height=460, buttons=["download", "fullscreen"]
                )
            with gr.Row(elem_classes="tools"):
                out = [
                    gr.DownloadButton(name, size="sm", interactive=False, min_width=110, elem_id=f"download_{key}")
                    for key, name in (("sheet", "Sheet .png"), ("zip", "All .zip"), ("report", "Report .html"),
                                      ("settings", "Settings .json"))
                ]  # fmt: skip

    fields = [prompts, placeholders, seeds, adapters, strengths, include_base, negative, steps, guidance, scheduler]
    pair = [row, left, right]

    def session_of(request: gr.Request) -> Session:
        return studio.sessions.of(request.session_hash)

    def read(session: Session, values: tuple) -> CompareRequest:
        return read_request(*values, adapters=session.adapters, limits=limits)

    def expect(request: gr.Request, *values) -> str:
        try:
            asked = read(session_of(request), values)
        except ValueError as problem:
            return views.message(str(problem), "warn")
        count, seconds = comparer.estimate(asked)
        long = comparer.prompt_warnings(asked)
        text = f"{count} picture{'s' * (count != 1)}, about {views.duration(seconds)}"
        return views.message("\n".join([text, *long]), "warn" if long else "note")

    def paint(request: gr.Request, progress: gr.Progress = gr.Progress(), *values) -> Iterator[tuple]:  # noqa: B008
        session = session_of(request)
        try:
            asked = read(session, values)
        except ValueError as problem:
            raise gr.Error(views.plain(problem), duration=None) from None
        count, seconds = comparer.estimate(asked)
        cancel = session.begin(asked)

        def on_step(cell: int, step: int) -> None:
            done = cell * asked.num_inference_steps + step
            progress((done, count * asked.num_inference_steps), desc=f"picture {cell + 1} of {count}", unit="steps")

        idle = [gr.skip()] * len(out)
        yield views.message(f"Painting {count} pictures, about {views.duration(seconds)}."), views.grid(session), *idle
        try:
            for cell in comparer.compare(asked, cancel, on_step):
                session.add(cell)
                text = f"{len(session.cells)} of {count} pictures."
                yield views.message(text), views.grid(session), *idle
        except ValueError as problem:
            raise gr.Error(views.plain(problem), duration=None) from None
        yield finished(session, count), views.grid(session), *downloads(session)

    def choices(request: gr.Request) -> list:
        session = session_of(request)
        if session.request is None:
            return [gr.skip()] * 3
        rows, columns = views.pair_choices(session.request)
        return [
            gr.Dropdown(choices=rows, value=0),
            gr.Dropdown(choices=columns, value=0),
            gr.Dropdown(choices=columns, value=len(columns) - 1),
        ]

    def show(chosen: str, i: int | None, a: int | None, b: int | None, request: gr.Request) -> list:
        """Fill the chosen view and hide the others."""
        session = session_of(request)
        single = chosen != "Grid"
        shown = [gr.update(visible=single), gr.update(visible=not single)]
        shown += [gr.update(visible=chosen == name) for name in VIEWS[1:]] + [gr.skip(), gr.skip()]
        if not single or session.request is None or None in (i, a, b):
            return shown
        painted = {(c.row, c.column): c for c in session.cells}
        columns, line = session.request.columns, session.request.rows[i]
        cells = [painted.get((line, columns[j])) for j in (a, b)]
        if None in cells:
            raise gr.Error("This picture was not painted: the comparison was stopped before it.")
        first, second = cells
        if chosen == "Slider":
            images = tuple(enlarged(c.image, PAIR_SIDE) for c in cells)
            label = f"{first.column.label}  |  {second.column.label}"
            shown[2] = gr.ImageSlider(value=images, label=label, visible=True)
        elif chosen == "Flip":
            shown[3] = gr.HTML(value=views.flip(session, first, second), visible=True)
        else:
            shown[5] = views.difference_note(first, second)
            shown[6] = enlarged(heat_map(first.image, second.image), PAIR_SIDE)
        return shown

    def look_closer(event: gr.EventData, request: gr.Request) -> tuple:
        """A cell of the grid was chosen: hold it against the first column, or the first against the last."""
        columns = len(session_of(request).request.columns)
        chosen = event.column
        return "Slider", event.row, 0, chosen if chosen else columns - 1

    def add_files(paths: list[str] | None, chosen: list[str], request: gr.Request) -> gr.CheckboxGroup:
        return added({Path(path).name: Path(path) for path in paths or []}, None, chosen, session_of(request))

    def add_of_runs(label: str | None, chosen: list[str], request: gr.Request) -> list:
        files = studio.adapter_files()
        if label is None:
            return [gr.skip()] * 2
        if label not in files:
            raise gr.Error(views.plain(f"There is no adapter {label} any more."))
        return [added({label: files[label]}, label, chosen, session_of(request)), None]

    def added(paths: dict[str, Path], label: str | None, chosen: list[str], session: Session) -> gr.CheckboxGroup:
        """The files that fit join the adapters; the others are named with the reason."""
        problems = []
        for name, path in paths.items():
            try:
                card = comparer.shelf.card(path, label)
            except ValueError as problem:
                problems.append(str(problem).replace(str(path), name))
                continue
            if card.fits:
                chosen = [*chosen, session.add_adapter(card.adapter).label]
            else:
                problems.append("\n".join([f"{name} does not fit the loaded base:", *card.mismatches]))
        if problems:
            gr.Warning(views.plain("\n".join(problems)), duration=None, title="Not added")
        return gr.CheckboxGroup(choices=list(session.adapters), value=list(dict.fromkeys(chosen)))

    def open_settings(path: str | None, request: gr.Request) -> list:
        if path is None:
            return [gr.skip()] * len(fields)
        session = session_of(request)
        try:
            data = read_settings(Path(path))
            at_hand = {a.sha256: a.path for a in studio.adapters_by_content(digests_in(data))} | session.paths
            asked = CompareRequest.from_dict(data, at_hand)
        except ValueError as problem:
            raise gr.Error(views.plain(problem), duration=None, title="These settings cannot be opened") from None
        renamed = [session.add_adapter(adapter).label for adapter in asked.adapters]
        values = list(fields_of(asked))
        values[3] = gr.CheckboxGroup(choices=list(session.adapters), value=renamed)
        return values

    def arrive(request: gr.Request) -> list:
        session, asked = session_of(request), studio.first_request
        session.show(asked, studio.first_cells)
        values = list(fields_of(asked))
        values[3] = gr.CheckboxGroup(choices=list(session.adapters), value=values[3])
        of_runs = gr.Dropdown(choices=list(studio.adapter_files()), value=None)
        done = finished(session, len(studio.first_cells))
        return [*values, of_runs, views.grid(session), done, *downloads(session)]

    def halt(request: gr.Request) -> None:
        session_of(request).cancel.set()

    gr.on([f.change for f in fields], expect, fields, expected, trigger_mode="always_last", **LIGHT, **PRIVATE)
    sweep.click(lambda: SWEEP, None, strengths, **LIGHT, **PRIVATE)
    painting = run.click(
        paint,
        fields,
        [status, grid, *out],
        api_name="compare",
        show_progress="full",
        show_progress_on=[status],
        **HEAVY,
    )
    painting.then(choices, None, pair, **LIGHT, **PRIVATE)
    run.click(lambda: "Grid", None, view, **LIGHT, **PRIVATE)
    run.click(None, js=SHOW_STATUS, **PRIVATE)
    stop.click(halt, None, None, **LIGHT, **PRIVATE)
    shown = [pickers, grid, slider, flip, difference, note, heat]
    changes = [view.change, *(p.change for p in pair)]
    gr.on(changes, show, [view, *pair], shown, trigger_mode="always_last", **LIGHT, **PRIVATE)
    grid.click(look_closer, None, [view, *pair], **LIGHT, **PRIVATE)
    files.upload(add_files, [files, adapters], adapters, **LIGHT, **PRIVATE)
    more.input(add_of_runs, [more, adapters], [adapters, more], **LIGHT, **PRIVATE)
    settings_file.upload(open_settings, settings_file, fields, **LIGHT, **PRIVATE)
    arrival = demo.load(arrive, None, [*fields, more, grid, status, *out], **LIGHT, **PRIVATE)
    arrival.then(choices, None, pair, **LIGHT, **PRIVATE)
    return adapters, arrival


def finished(session: Session, count: int) -> str:
    painted = len(session.cells)
    if painted < count:
        return views.message(f"Stopped: {painted} of {count} pictures were painted, and stay.", "warn")
    seconds = sum(cell.seconds for cell in session.cells)
    return views.message(f"{count} pictures in {views.duration(seconds)}.", "good")


def downloads(session: Session) -> list[gr.DownloadButton]:
    """Write the session's pictures as files to take away."""
    if not session.cells:
        return [gr.DownloadButton(interactive=False)] * 4
    folder = session.folder / "out"
    folder.mkdir(exist_ok=True)
    asked, cells = session.request, session.cells
    paths = [folder / f"comparison.{ending}" for ending in ("png", "zip", "html")] + [folder / "settings.json"]
    paths[0].write_bytes(png(sheet(asked, cells)))
    write_zip(paths[1], asked, cells)
    paths[2].write_text(report(asked, cells))
    paths[3].write_text(settings_json(asked))
    return [gr.DownloadButton(value=str(path), interactive=True) for path in paths]
