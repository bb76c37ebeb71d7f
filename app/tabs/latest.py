"""Several events that write one output: it shows the answer to the one that was triggered last, in whichever order
they end.

Gradio shows answers in the order in which they come, so that a slow answer would replace that of a later event; and by
default it drops an event whose like is still under way, such as a second upload.

An answer can be overtaken after its function ended, too, since Gradio prepares its values in threads. So the last word
is spoken where messages are put in line for the browser: `drop_overtaken`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import gradio as gr
from gradio.events import Dependency
from gradio.queueing import Event, Queue
from gradio.server_messages import EventMessage, ProcessCompletedMessage

from ..sessions import Session, Sessions
from ..studio import LIGHT, PRIVATE, Studio

# The last input of such an event: the time at which the browser triggered it, as `stamp` of static/page.js says.
WITH_TIME = "(...values) => [...values.slice(0, -1), stamp()]"
SKIP = gr.skip()
MARK = "answers_with_time"  # on functions of such events


def is_skip(value: Any) -> bool:
    return isinstance(value, dict) and value == SKIP


class Latest:
    """Joins events to functions `fn(session, *values of inputs)`, for one tab."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.clock = gr.Number(0, visible=False, elem_classes="clock")

    def on(self, triggers: Sequence, fn: Callable, inputs: Sequence, outputs: Sequence, **options: Any) -> Dependency:
        """Let `fn` answer the triggers; for the options see `event`."""
        return gr.on(triggers, **self.event(fn, inputs, outputs, **options))

    def after(
        self, before: Dependency, fn: Callable, inputs: Sequence, outputs: Sequence, **options: Any
    ) -> Dependency:
        """Let `fn` answer when another event has ended; for the options see `event`."""
        return before.then(**self.event(fn, inputs, outputs, **options))

    def event(
        self,
        fn: Callable,
        inputs: Sequence,
        outputs: Sequence,
        *,
        keep: Callable[[Session, Sequence], None] | None = None,
        in_turn: bool = False,
        adds: bool = False,
        says: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Arguments of a listener of gradio's.

        Args:
            keep: gets the session and the inputs' values whose answer is shown.
            in_turn: `fn` changes the session. A visitor's functions of this kind run one after another and are shown
                in that order; one that comes after another of the same outputs that was triggered later does not run.
            adds: `fn` adds to the session, in its turn, however late it comes: nothing that is handed in is lost.
            says: `fn` gets the event as its last argument.
            options: those of gradio that differ from those of quick events.
        """
        ids = tuple(output._id for output in outputs)
        nothing = SKIP if ids else None  # gradio warns of a value that no output is for

        def answered(session: Session, values: Sequence, *event: gr.EventData) -> Any:
            *values, when = values
            with session.turn if in_turn or adds else nullcontext():
                if in_turn and session.has_later(ids, when):
                    return nothing
                found = fn(session, *values, *event)
                if in_turn:
                    session.shows(ids, when)
                if is_skip(found):
                    return nothing
                answers = found if isinstance(found, list) else [found][: len(ids)]
                pairs = zip(ids, answers, strict=True)
                shown = [is_skip(value) or session.shows(output, when, in_turn or adds) for output, value in pairs]
                if keep:
                    with session.keeping:
                        if all(session.shown[output] == when for output in ids):
                            keep(session, values)
            answers = [value if show else SKIP for value, show in zip(answers, shown, strict=True)]
            return answers if len(ids) > 1 else next(iter(answers), None)

        def answer(request: gr.Request, *values: Any) -> Any:
            return answered(self.studio.sessions.of(request.session_hash), values)

        def answer_to(event: gr.EventData, request: gr.Request, *values: Any) -> Any:
            return answered(self.studio.sessions.of(request.session_hash), values, event)

        fn_of_page = answer_to if says else answer
        setattr(fn_of_page, MARK, True)
        own = {"fn": fn_of_page, "inputs": [*inputs, self.clock], "outputs": list(outputs)}
        return {**own, "js": WITH_TIME, "trigger_mode": "multiple", **LIGHT, **PRIVATE, **options}


def drop_overtaken(queue: Queue, sessions: Sessions) -> None:
    """Leave out of each answer what an output has a later answer to, at the moment when it is put in line."""
    send = queue.send_message

    def send_latest(event: Event, message: EventMessage) -> None:
        session = sessions.open.get(event.session_hash)
        completed = isinstance(message, ProcessCompletedMessage) and message.success
        if session and completed and hasattr(event.fn.fn, MARK):
            when, pairs = event.data.data[-1], zip(event.fn.outputs, message.output["data"], strict=True)
            data = [value if session.shown.get(output._id) == when else SKIP for output, value in pairs]
            message.output = {**message.output, "data": data}
        send(event, message)

    queue.send_message = send_latest  # type: ignore[method-assign]
