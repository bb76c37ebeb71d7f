"""Generating a comparison: for the page, which looks on, and for programs, which get JSON."""

import math
import time
from collections.abc import Callable, Iterator

import gradio as gr

from .. import views
from ..forms import NOTHING_SWEPT
from ..request import CompareRequest, Scheduler
from ..saved import settings_data
from ..sessions import Session
from ..studio import HEAVY, Studio
from ..tabs import refusal
from ..visits import sound_fields
from .fields import Fields

SECONDS_BETWEEN_LOOKS = 0.25


class Pace:
    """Lets a thing be done again when some time has passed: small images are generated faster than a page is drawn."""

    def __init__(self, seconds: float = SECONDS_BETWEEN_LOOKS):
        self.seconds, self.last = seconds, -math.inf

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


def generate(
    studio: Studio, session: Session, asked: CompareRequest, on_step: Callable[[int, int], None] | None = None
) -> Iterator[int]:
    """Generate a comparison into a session and its visit; yields the number of images after each. It ends early where
    the visitor stops it or looks at another.

    Raises:
        ValueError, RuntimeError: of a file, or of the machine, such as its memory.
    """
    with session.turn:
        cancel = session.begin(asked)
        base = studio.base_of(session)
        if session.visit:
            session.visit.show(asked, [], base, session.view)
    session.generates = True
    try:
        for cell in studio.comparer_of(session).compare(asked, cancel, on_step):
            with session.turn:
                if session.cancel is not cancel:
                    return
                session.add(cell)
                if session.visit:
                    session.visit.add(asked, session.cells, base, session.view)
            yield len(session.cells)
    finally:
        session.generates = False


def for_the_page(studio: Studio, fields: Fields) -> Callable[..., Iterator[tuple]]:
    """The event of the Compare button: values of the fields in, status and grid out."""

    def run(
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
        *values: object,
    ) -> Iterator[tuple]:
        session = studio.sessions.of(request.session_hash)
        try:
            asked = fields.read(session, values)
            count, seconds = studio.comparer_of(session).estimate(asked)
        except ValueError as problem:
            session.waits = False
            raise refusal(problem) from None
        told, shown = Pace(), Pace()

        def on_step(cell: int, step: int) -> None:
            if told.is_due():
                progress((cell, count), desc=f"image {cell + 1} of {count}, step {step}", unit="images")

        images = generate(studio, session, asked, on_step)
        yield views.message(f"Generating {count} images, about {views.duration(seconds)}."), gr.skip()
        try:
            for done in images:
                if shown.is_due() and session.request is asked:
                    yield views.message(f"{done} of {count} images."), views.grid(session)
        except (ValueError, RuntimeError) as problem:
            if session.request is asked:
                done = f"Ended by an error after {len(session.cells)} of {count} images, which stay."
                yield views.message(done, "bad"), views.grid(session)
            raise refusal(problem) from None
        if session.request is asked:
            yield finished(session, count), views.grid(session)

    return run


def for_programs(studio: Studio, fields: Fields) -> None:
    """`/compare` of the API. What it generated is also what `/zip`, `/sheet`, `/report` and `/settings` take away."""

    def compare(
        request: gr.Request,
        prompts: str,
        placeholders: str = "",
        seeds: str = "0",
        adapters: list[str] = [],  # noqa: B006 (the API shows it)
        strengths: str = "1",
        include_base: bool = True,
        negative_prompt: str = "",
        num_inference_steps: int = CompareRequest.num_inference_steps,
        guidance_scale: float = CompareRequest.guidance_scale,
        scheduler: str = str(Scheduler.AS_SAVED),
        columns_axis: str = NOTHING_SWEPT,
        columns_values: str = "",
        rows_axis: str = NOTHING_SWEPT,
        rows_values: str = "",
        strengths_first: bool = False,
    ) -> dict:
        session = studio.sessions.of(request.session_hash)
        values = (prompts, placeholders, seeds, adapters, strengths, include_base, negative_prompt)
        values += (num_inference_steps, guidance_scale, scheduler)
        values += (columns_axis, columns_values, rows_axis, rows_values, strengths_first)
        try:
            if not sound_fields(list(values)):
                raise ValueError("A parameter has another type than its own: /info of the API says which it is")
            asked = fields.read(session, values)
            for _ in generate(studio, session, asked):
                pass
        except (ValueError, RuntimeError) as problem:
            raise refusal(problem) from None
        return answer(studio, session)

    gr.api(compare, api_name="compare", **HEAVY)


def answer(studio: Studio, session: Session) -> dict:
    """A comparison as JSON: its settings; the place of every image, what it was generated with, and its address."""
    request = session.request
    images = [
        {
            "row": request.rows.index(cell.row),
            "column": request.columns.index(cell.column),
            "prompt": cell.row.prompt,
            "seed": cell.row.seed,
            "row_label": cell.row.label,
            "column_label": cell.column.label,
            "generated_with": cell.generated_with,
            "seconds": round(cell.seconds, 3),
            "url": session.addresses[id(cell)],
        }
        for cell in session.cells
    ]
    wanted = len(request.rows) * len(request.columns)
    settings = settings_data(request, [], session.view, studio.base_of(session))
    return {"complete": len(images) == wanted, "count": len(images), "images": images, "settings": settings}


def finished(session: Session, count: int) -> str:
    """Say how a comparison ended."""
    generated = len(session.cells)
    if generated < count:
        return views.message(f"Stopped: {generated} of {count} images were generated, and stay.", "warn")
    seconds = sum(cell.seconds for cell in session.cells)
    return views.message(f"{count} image{'s' * (count != 1)} in {views.duration(seconds)}.", "good")
