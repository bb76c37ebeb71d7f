"""Blind vote: which of two images is better, without knowing whose it is."""

from pathlib import Path

import gradio as gr

from .. import measure_views, views
from ..images import images_in, read_images
from ..raters import MAX_BYTES, read_votes
from ..sessions import Session
from ..studio import Studio
from ..tabs import refusal
from ..tabs.compare import CompareTab
from ..votes import QUESTION, Choice, default_pair, make_ballot, write_rounds
from .latest import Latest
from .subject import image_files

KEYS = {Choice.LEFT: "←", Choice.TIE: "T", Choice.NEITHER: "N", Choice.RIGHT: "→"}
NAMES = {Choice.LEFT: "Left", Choice.TIE: "Tie", Choice.NEITHER: "Both bad", Choice.RIGHT: "Right"}
MAX_REFERENCES = 6
IDS = {Choice.LEFT: "vote_left", Choice.TIE: "vote_tie", Choice.NEITHER: "vote_neither", Choice.RIGHT: "vote_right"}
INTRODUCTION = (
    "Two images of one prompt from the same noise, sides shuffled. Votes are on the images of the Compare tab: "
    "more seeds there make more pairs here."
)


def vote_tab(studio: Studio, tab: gr.Tab, compare: CompareTab) -> None:
    gr.HTML(views.message(INTRODUCTION), padding=False)
    with gr.Row():
        question = gr.Textbox(label="The question", value=QUESTION, min_width=200, elem_id="vote_question")
        rater = gr.Textbox(label="Rater", placeholder="you", min_width=100, scale=0, elem_id="vote_rater")
    with gr.Row():
        first = gr.Dropdown(label="One column", choices=[], min_width=140, elem_id="vote_first")
        second = gr.Dropdown(label="The other", choices=[], min_width=140, elem_id="vote_second")
        begin = gr.Button(
            "Begin a round", variant="primary", min_width=140, elem_id="vote_begin", elem_classes="beside"
        )
    with gr.Accordion("Images to vote by", open=False):
        own = image_files("Images of my own", "vote_references", 120)
    subject = gr.HTML(elem_id="vote_subject", padding=False)
    pair = gr.HTML(elem_id="vote_pair", padding=False)
    with gr.Row(elem_classes="verdicts"):
        buttons = {
            choice: gr.Button(f"{name}  ({KEYS[choice]})", interactive=False, elem_id=IDS[choice], min_width=70)
            for choice, name in NAMES.items()
        }
    with gr.Row(elem_classes="tools tally"):
        back = gr.Button("Take the last vote back", size="sm", interactive=False, min_width=140)
        reveal = gr.Button("Show the result", size="sm", interactive=False, elem_id="vote_reveal", min_width=140)
        out = gr.DownloadButton("Votes .csv", size="sm", interactive=False, elem_id="download_votes", min_width=110)
    result = gr.HTML(elem_id="vote_result", padding=False)
    with gr.Accordion("Several raters", open=False):
        files = gr.File(
            label="Votes .csv of each rater, this page's own",
            file_count="multiple",
            file_types=[".csv"],
            height=120,
            elem_id="vote_files",
        )
        together = gr.HTML(elem_id="vote_pool", padding=False)

    controls = [*buttons.values(), back]
    place = gr.Number(0, visible=False)  # of the pair that is shown: a vote is for that one, and counts once
    outputs = [pair, *controls, reveal, place]

    def state(session: Session) -> list:
        """The pair to be voted on, and which buttons work; the round is kept as it is now."""
        ballot = session.ballot
        if session.visit and ballot.request is session.request:
            session.visit.write_rounds([*session.earlier, ballot])
        voting = [gr.Button(interactive=ballot.current is not None)] * len(buttons)
        can_undo = gr.Button(interactive=bool(ballot.votes))
        has_result = gr.Button(interactive=bool(ballot.votes or session.earlier))
        return [views.ballot(session), *voting, can_undo, has_result, len(ballot.votes)]

    def columns(session: Session, first: str | None, second: str | None) -> list:
        """The columns of the comparison, and the round that goes on. What is chosen stays while there is such."""
        if session.request is None:
            return [gr.skip()] * (3 + len(outputs))
        labels, ballot = [column.label for column in session.request.columns], session.ballot
        pair = [first, second] if {first, second} <= {*labels} else None
        pair = pair or [labels[i] for i in default_pair(session.request.columns)]
        if ballot and ballot.request is session.request:
            pair = [ballot.first.label, ballot.second.label]
        pickers = [gr.Dropdown(choices=labels, value=label) for label in pair]
        return [*pickers, references(session), *(state(session) if ballot else [gr.skip()] * len(outputs))]

    def start(session: Session, first: str | None, second: str | None, asked: str, rater: str) -> list:
        if session.request is None or first is None or second is None:
            raise refusal("Compare something first: votes are on the images of the Compare tab.")
        listed = {column.label: column for column in session.request.columns}
        if gone := [label for label in (first, second) if label not in listed]:
            raise refusal(f"The comparison has no column {gone[0]} any more: choose from the ones it has.")
        try:
            ballot = make_ballot(session.request, session.cells, listed[first], listed[second], asked, rater)
        except ValueError as problem:
            raise refusal(problem) from None
        session.begin_round(ballot)
        return [*state(session), "", gr.DownloadButton(interactive=False), references(session)]

    def cast(choice: Choice):
        def vote(session: Session, shown: float) -> list:
            if session.ballot is None or session.ballot.current is None:
                raise refusal("There is no pair to vote on: begin a round.")
            if shown == len(session.ballot.votes):
                session.ballot.vote(choice)
            return state(session)

        return vote

    def undo(session: Session, shown: float) -> list:
        if session.ballot is None:
            raise refusal("There is no vote to take back: begin a round.")
        if shown == len(session.ballot.votes):
            session.ballot.take_back()
        return state(session)

    def show(session: Session) -> list:
        """Only here do the columns' names reach the page."""
        path = write_rounds(session.folder, [*session.earlier, session.ballot])
        if session.ballot.votes:
            session.ballot.seen.append(len(session.ballot.votes))
        state(session)
        found = measure_views.verdict(studio.findings(session))
        shown = views.earlier_rounds(session.earlier) + views.vote_result(session.ballot) + views.recap(session)
        button = gr.DownloadButton(f"Votes {path.suffix}", value=str(path), interactive=True)
        return [shown, button, found]

    def references(session: Session) -> str:
        """Show images to vote by: the visitor's own, or of the subject that the first adapters were taught."""
        name = studio.first_subject
        paths = images_in(studio.subjects[name])[:MAX_REFERENCES] if name in studio.subjects else []
        shown = (session.thumbnail(Path(path)) for path in session.references or paths)
        return views.strip([*filter(None, shown)], "my own" if session.references else f"subject: {name}")

    def refer(session: Session, paths: list[str] | None) -> str:
        try:
            images = read_images(paths or [], MAX_REFERENCES)
        except ValueError as problem:
            raise refusal(problem) from None
        session.references = [Path(path) for path in paths or []]
        if session.visit:
            session.references = session.visit.write_references(images)
        return references(session)

    def pool(session: Session, paths: list[str] | None) -> str:
        if not paths:
            return ""
        try:
            if long := [Path(path).name for path in paths if Path(path).stat().st_size > MAX_BYTES]:
                raise ValueError(f"{long[0]} has more than {MAX_BYTES >> 20} MiB, and cannot be votes")
            texts = {Path(path).name: Path(path).read_text(encoding="utf-8", errors="replace") for path in paths}
            return views.pooled(read_votes(texts))
        except ValueError as problem:
            return views.message(str(problem), "bad")

    latest = Latest(studio)
    sides = [first, second]
    latest.on([tab.select], columns, sides, [*sides, subject, *outputs], in_turn=True)
    latest.on([begin.click], start, [*sides, question, rater], [*outputs, result, out, subject], in_turn=True)
    latest.on([files.change], pool, [files], [together])
    latest.on([own.upload, own.clear, own.delete], refer, [own], [subject], in_turn=True)
    for choice, button in buttons.items():
        latest.on([button.click], cast(choice), [place], outputs, adds=True)
    latest.on([back.click], undo, [place], outputs, adds=True)
    latest.on([reveal.click], show, [], [result, out, compare.verdict], in_turn=True)
