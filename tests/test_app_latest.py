"""Events that write one output: whatever the order in which they end, the latest is shown, and none is lost."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")

import gradio as gr

from app.sessions import Sessions
from app.tabs.latest import Latest, is_skip

REQUEST = gr.Request(session_hash="visitor")


@pytest.fixture
def page(tmp_path):
    """Two outputs, and what joins an event to them: `page.event(fn)(*values, when)` is the answer."""
    with gr.Blocks():
        latest = Latest(SimpleNamespace(sessions=Sessions(tmp_path)))
        outputs = [gr.HTML(), gr.HTML()]

    def event(fn, outputs=outputs, **options):
        answer = latest.event(fn, [], outputs, **options)["fn"]
        return lambda *values: answer(REQUEST, *values)

    return SimpleNamespace(event=event, outputs=outputs)


def test_each_output_shows_the_answer_to_the_latest_event_of_its_own(page):
    both = page.event(lambda session, word: [word, word])
    second = page.event(lambda session, word: word, page.outputs[1:])
    assert second("later", 20) == "later"
    first, skipped = both("earlier", 10)
    assert first == "earlier"
    assert is_skip(skipped)
    assert both("latest", 30) == ["latest", "latest"]


def test_an_output_that_an_answer_leaves_out_still_shows_an_earlier_one(page):
    assert is_skip(page.event(lambda session: [gr.skip(), "second"])(20)[0])
    first, second = page.event(lambda session: ["first", "first"])(10)
    assert first == "first"
    assert is_skip(second)


def test_what_is_kept_is_what_is_shown(page):
    kept = []
    event = page.event(lambda session, word: word, page.outputs[:1], keep=lambda _, values: kept.extend(values))
    event("later", 2)
    event("earlier", 1)
    assert kept == ["later"]


def test_of_changes_that_come_in_the_wrong_order_the_earlier_one_is_not_made(page):
    made = []

    def change(session, word):
        made.append(word)
        return [word, word]

    event = page.event(change, in_turn=True)
    assert event("later", 2) == ["later", "later"]
    assert is_skip(event("earlier", 1))
    assert made == ["later"]


def test_what_is_handed_in_is_added_however_late_it_comes(page):
    added = []

    def add(session, word):
        added.append(word)
        return [list(added), ""]

    event = page.event(add, adds=True)
    assert event("later", 2)[0] == ["later"]
    assert event("earlier", 1)[0] == ["later", "earlier"]


def test_a_change_waits_for_the_one_before_it(page):
    begun, go_on, order = threading.Event(), threading.Event(), []

    def slow(session):
        begun.set()
        assert go_on.wait(60)
        order.append("slow")
        return ["slow", "slow"]

    def quick(session):
        order.append("quick")
        return ["quick", "quick"]

    with ThreadPoolExecutor() as pool:
        one = pool.submit(page.event(slow, adds=True), 1)
        assert begun.wait(60)
        other = pool.submit(page.event(quick, in_turn=True), 2)
        assert not order
        go_on.set()
        assert one.result() == ["slow", "slow"]
        assert other.result() == ["quick", "quick"]
    assert order == ["slow", "quick"]
