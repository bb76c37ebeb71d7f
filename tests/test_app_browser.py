"""The real page in headless Chromium: generate, look, flip, vote, stop, race, train, take away, and be refused."""

import json
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")
pytest.importorskip("playwright", reason="playwright is not installed: pip install '.[app,dev]'")
pytest.importorskip("axe_playwright_python", reason="axe is not installed: pip install '.[app,dev]'")

import gradio as gr
from axe_playwright_python.sync_playwright import Axe
from playwright import sync_api

from app import run_views
from app.adapters import AdapterShelf
from app.forms import read_request
from app.serve import launch, open_studio
from app_fixtures import make_lora_file, make_pipeline, make_run
from test_app_page import asked_of
from test_app_training import STAND_IN

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE_MS = 120_000  # of one step on a machine with other work; steps usually take a tenth of a second
TABS = {  # and what each shows when all of it is there
    "Compare": "#grid img",
    "Race": "#race_validation_loss svg.marks",
    "Blind vote": "#vote_second",
    "Measures": "#measures .message",
    "Files": "#card .facts",
    "Train": "#train_status .message",
}
SCREENS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here, the page was not driven: apt-get install chromium, or set CHROMIUM"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    make_pipeline(folder / "base")
    for seed, (name, shortcut) in enumerate((("lora", None), ("reslora", "input"))):
        make_lora_file(folder / "runs" / name, folder / "base", seed)
        make_run(folder / "runs" / name, name, shortcut, seed=seed)
    make_lora_file(folder / "runs" / "lora" / "checkpoint-20", folder / "base", 7)
    make_lora_file(folder / "foreign", folder / "wide", 0, wide=True)
    make_pipeline(folder / "bases" / "wide", wide=True)
    shutil.copytree(folder / "base", folder / "bases" / "damaged")
    (folder / "bases" / "damaged" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    (folder / "broken.safetensors").write_bytes(b"\x80\x04a pickle")
    for number in range(2):
        shutil.copy(folder / "runs" / "lora" / "samples" / "step-000000" / f"{number}-0.png", folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def studio(folder):
    studio = open_studio(
        folder / "base",
        (folder / "runs",),
        folder / "images",
        "a cat",
        train_dir=folder / "trained",
        bases=[folder / "bases"],
        first_steps=2,
    )
    studio.trainer.script = folder / "script.py"
    studio.trainer.script.write_text(STAND_IN)
    yield studio
    studio.trainer.close()


@pytest.fixture(scope="module")
def address(studio):
    demo = launch(studio, prevent_thread_lock=True, quiet=True)
    yield demo.local_url
    demo.close()


@pytest.fixture(scope="module")
def browser():
    sync_api.expect.set_options(timeout=PATIENCE_MS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def screens(browser):
    """A browser of its own for each screen; what it has fetched once, later pages of it need not fetch again."""
    contexts = {
        (width, scheme): browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        for width, scheme in SCREENS
    }
    yield contexts
    for context in contexts.values():
        context.close()


@pytest.fixture
def visit(screens, address):
    """Open the page; afterwards nothing may have gone wrong or been asked of other machines."""
    pages, faults, foreign = [], [], []
    ours = (address, "data:", "blob:", "file:")

    def opened(width: int = 1280, scheme: str = "light"):
        page = screens[width, scheme].new_page()
        pages.append(page)
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}") or dialog.dismiss())
        page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith(ours) else None)
        page.goto(address)
        arrived(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert not faults
    assert not foreign, "the page asks other machines for something"


def arrived(page) -> None:
    page.wait_for_selector("#grid img")
    expect(page.locator("#expected")).to_contain_text("images, about")


def eventually(page, holds: Callable[[], bool]) -> None:
    """Wait for what the page cannot be asked for, letting it go on meanwhile."""
    end = time.monotonic() + PATIENCE_MS / 1000
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        page.wait_for_timeout(20)


def expect(locator):
    return sync_api.expect(locator)


def fill(page, name: str, text: str) -> None:
    field = page.locator(f"#{name} :is(textarea, input)").first
    field.fill(text)
    field.blur()  # as whoever goes on to something else


def choose(page, name: str, option: str) -> None:
    """An option of a dropdown. The list is looked for by the field it belongs to: that of a dropdown chosen from just
    before may still be fading."""
    field = page.locator(f"#{name}").get_by_role("combobox")
    field.click()
    expect(field).to_have_attribute("aria-expanded", "true")
    page.locator(f"#{field.get_attribute('aria-controls')}").get_by_role("option", name=option, exact=True).click()


def unfold(page, name: str) -> None:
    heading = page.get_by_role("button", name=name)
    expect(heading).to_have_attribute("aria-expanded", re.compile("true|false"))
    if heading.get_attribute("aria-expanded") == "false":
        heading.click()


def set_steps(page, steps: int) -> None:
    unfold(page, "Sampling")
    page.locator("#steps input[type=number]").fill(str(steps))
    page.locator("#steps input[type=number]").press("Tab")


def upload(page, button: str, *files: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click(button)
    chooser.value.set_files(files)


def downloaded(page, button: str, path: Path) -> Path:
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(path)
    return path


def show(page, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()
    expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")


def toast(page):
    return page.locator("[data-testid=toast-body]").first


# ----------------------------------------------------------------------------------------------------- layout


UNSAID = "document.querySelectorAll('fieldset:not([aria-label]), button.label-wrap:not([aria-expanded])').length"


def faults_of_access(page) -> list[str]:
    """What axe-core finds: names, contrast, roles, order of headings and the like."""
    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:200]} {node['failureSummary']}" for fault in found for node in fault["nodes"]
    ]


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_every_tab_fits_the_width_is_labelled_and_stands_out(visit, width, scheme):
    page = visit(width, scheme)
    assert page.locator("#grid img").count() == 6
    for tab, last in TABS.items():
        show(page, tab)
        expect(page.locator(last).first).to_be_visible()
        expect(page.locator(".empty:visible")).to_have_count(0)  # of a chart that is to come
        page.mouse.move(0, 0)
        page.wait_for_function("!document.getAnimations().some((a) => a instanceof CSSTransition)")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{tab} is too wide"
        assert page.evaluate(UNSAID) == 0, f"{tab}: groups without a name, or sections not said to be open"
        assert faults_of_access(page) == [], tab
    assert page.evaluate("[...document.images].every((image) => !image.alt || image.naturalWidth > 0)")


# ---------------------------------------------------------------------------------------------------- compare


def test_generate_look_flip_and_take_away(visit, address, tmp_path):
    page = visit()
    set_steps(page, 2)
    fill(page, "prompts", "a {x} <img src=x onerror=alert(1)>")
    unfold(page, "Prompt matrix")
    fill(page, "placeholders", "x = cat, dog")
    fill(page, "seeds", "3")
    fill(page, "strengths", "0.5, 1")
    expect(page.locator("#expected")).to_contain_text("10 images, about")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("10 images in")
    expect(page.locator("#grid img")).to_have_count(10)
    assert page.locator("#grid").inner_text().count("<img src=x onerror=alert(1)>") == 2

    page.click("#transpose")
    expect(page.locator("#grid tbody th[data-column]")).to_have_count(5)
    page.click("#transpose")
    expect(page.locator("#grid thead th[data-column]")).to_have_count(5)
    choose(page, "pages", "prompt")
    expect(page.locator("#grid .pager")).to_contain_text("page 1 of 2")
    expect(page.locator("#grid img:visible")).to_have_count(5)
    page.get_by_role("button", name="Next page").press("Enter")
    expect(page.locator("#grid .pager")).to_contain_text("a dog")
    expect(page.get_by_role("button", name="Next page")).to_be_focused()
    page.locator("#grid button.cell").last.press("Enter")
    viewer, first, second = page.locator("#viewer"), page.locator("#viewer .first"), page.locator("#viewer .second")
    expect(viewer).to_be_visible()
    expect(second.locator("figcaption")).to_have_text("reslora × 1")
    expect(first).to_be_hidden()
    page.keyboard.press("Space")  # wherever the focus is
    expect(first).to_be_visible()
    expect(second).to_be_hidden()
    expect(first.locator("figcaption")).to_have_text("base")
    page.keyboard.press("ArrowLeft")
    expect(second.locator("figcaption")).to_have_text("reslora × 0.5")
    page.keyboard.press("Shift+ArrowRight")
    expect(first.locator("figcaption")).to_have_text("lora × 0.5")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#viewer .row")).to_contain_text("a cat")
    page.keyboard.press("2")
    expect(viewer.locator(".pane img")).to_have_count(2)
    page.mouse.move(600, 400)
    page.mouse.wheel(0, -300)
    moved = "[...document.querySelectorAll('#viewer .pane img')].map((image) => image.style.transform)"
    eventually(page, lambda: "scale(1.15)" in page.evaluate(moved)[0])
    assert len(set(page.evaluate(moved))) == 1, "both images zoom together"
    assert page.evaluate("getComputedStyle(document.querySelector('#viewer figcaption')).transform") == "none"
    page.locator("#viewer select.left").focus()
    page.keyboard.press("Space")  # no list opens: it flips here, too
    expect(page.locator("#viewer .stage.turned")).to_have_count(0)
    page.keyboard.press("Space")
    expect(page.locator("#viewer .stage.turned")).to_have_count(1)
    page.locator("#viewer [data-view]").first.focus()
    page.keyboard.press("3")
    handle = page.get_by_label("Where the left image ends")
    handle.focus()
    handle.press("Home")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('#viewer .stage')).getPropertyValue('--split')") == "0%"
    )
    page.keyboard.press("4")
    expect(viewer.locator(".heat figcaption")).to_contain_text(re.compile(r"mean [0-9.]+ %"))
    expect(viewer.locator(".pane")).to_have_count(3)
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(page.locator("#grid button.cell").last).to_be_focused()

    with zipfile.ZipFile(downloaded(page, "#download_zip", tmp_path / "all.zip")) as archive:
        archive.extract("report.html", tmp_path)
        assert len(archive.namelist()) == 13
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("[...document.images].map((image) => image.naturalWidth)") == [64] * 10


WATCH_EXPECTED = """window.expectations = [];
new MutationObserver(() => window.expectations.push(document.getElementById('expected').innerText))
  .observe(document.getElementById('expected'), {subtree: true, childList: true, characterData: true});"""


def test_what_is_expected_is_that_of_the_latest_fields(visit, monkeypatch):
    """Each look at fields that are not whole yet ends after the look at those that are. Answers come in the order in
    which looks end, so that when another look's answer is there, those of the slow ones have come."""
    page, shown, ended = visit(), threading.Event(), threading.Semaphore(0)

    def slow(prompts, placeholders, *values, **here):
        is_whole = placeholders or "{x}" not in prompts
        assert is_whole or shown.wait(PATIENCE_MS / 1000)
        try:
            return read_request(prompts, placeholders, *values, **here)
        finally:
            if not is_whole:
                ended.release()

    monkeypatch.setattr("app.tabs.fields.read_request", slow)
    unfold(page, "Prompt matrix")
    page.evaluate(WATCH_EXPECTED)
    fill(page, "prompts", "an {x}")
    fill(page, "prompts", "a {x}")
    fill(page, "placeholders", "x = cat, dog, owl")
    expect(page.locator("#expected")).to_contain_text("18 images, about")
    shown.set()
    for _ in range(2):
        assert ended.acquire(timeout=PATIENCE_MS / 1000)
    fill(page, "seeds", "0")
    expect(page.locator("#expected")).to_contain_text("9 images, about")
    texts = page.evaluate("window.expectations")
    first = next(i for i, text in enumerate(texts) if "18 images" in text)
    assert not any("nothing fills" in text for text in texts[first:])
    assert page.locator("#placeholders textarea").input_value() == "x = cat, dog, owl"


def test_of_two_events_at_one_time_of_a_rounded_clock_the_later_is_shown(visit, monkeypatch):
    page, shown, ended = visit(), threading.Event(), threading.Event()

    def slow(prompts, *values, **here):
        if prompts != "early":
            return read_request(prompts, *values, **here)
        assert shown.wait(PATIENCE_MS / 1000)
        try:
            return read_request(prompts, *values, **here)
        finally:
            ended.set()

    monkeypatch.setattr("app.tabs.fields.read_request", slow)
    page.evaluate("() => { const now = performance.now(); performance.now = () => now; }")
    fill(page, "prompts", "early")
    fill(page, "prompts", "late\nand later")
    expect(page.locator("#expected")).to_contain_text("12 images, about")
    page.evaluate(WATCH_EXPECTED)
    shown.set()
    assert ended.wait(PATIENCE_MS / 1000)
    fill(page, "seeds", "0-2")
    expect(page.locator("#expected")).to_contain_text("18 images, about")  # asked later, and answered later
    assert not any("6 images" in text for text in page.evaluate("window.expectations"))


HOLD_FRAMES = """() => {
  const soon = window.requestAnimationFrame;
  window.held = [];
  window.requestAnimationFrame = (next) => window.held ? window.held.push(next) : soon(next);
}"""
LET_FRAMES_GO = "() => { const held = window.held; window.held = null; held.forEach((next) => next()); }"


def test_what_is_typed_into_a_section_that_opens_stays_while_an_earlier_look_lasts(visit, monkeypatch):
    """Gradio sets the fields of a section that opens in the frame after they come, to what it knows of them."""
    page, go_on = visit(), threading.Event()

    def slow(prompts, placeholders, *values, **here):
        assert placeholders or "{x}" not in prompts or go_on.wait(PATIENCE_MS / 1000)
        return read_request(prompts, placeholders, *values, **here)

    monkeypatch.setattr("app.tabs.fields.read_request", slow)
    fill(page, "prompts", "a {x}")
    page.evaluate(HOLD_FRAMES)
    unfold(page, "Prompt matrix")
    page.locator("#placeholders textarea").fill("x = cat, dog")
    page.evaluate(LET_FRAMES_GO)
    page.locator("#placeholders textarea").blur()
    go_on.set()
    expect(page.locator("#expected")).to_contain_text("12 images, about")
    assert page.locator("#placeholders textarea").input_value() == "x = cat, dog"


def state(page) -> dict:
    """Everything that a person can set, and what is looked at."""
    for name, field in (("Sampling", "negative"), ("Prompt matrix", "placeholders")):
        unfold(page, name)
        expect(page.locator(f"#{field} :is(textarea, input)").first).to_be_visible()  # it comes after the click
    names = (
        "prompts",
        "placeholders",
        "seeds",
        "strengths",
        "negative",
        "scheduler",
    )
    fields = {name: page.locator(f"#{name} :is(textarea, input)") for name in names}
    fields |= {name: page.locator(f"#{name} input[type=number]") for name in ("steps", "guidance")}
    values = {name: field.first.input_value() for name, field in fields.items() if field.count()}
    checked = "[...document.querySelectorAll('#adapters input, #base_column input')].map((e) => e.checked)"
    return values | {"checked": page.evaluate(checked)}


def images_in(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(".png")}


def test_a_comparison_that_was_taken_away_comes_back(visit, studio, tmp_path):
    """The archive with images and view; settings alone with every control, and the same images when generated."""
    page = visit()
    set_steps(page, 3)
    fill(page, "prompts", "a {x} 猫")
    unfold(page, "Prompt matrix")
    fill(page, "placeholders", "x = cat, dog")
    fill(page, "seeds", "3, 9")
    fill(page, "strengths", "0.3333333, 1.25")
    fill(page, "negative", "rain")
    page.locator("#guidance input[type=number]").fill("3.7")
    page.locator("#guidance input[type=number]").press("Tab")
    choose(page, "scheduler", "DDIM")
    page.get_by_role("checkbox", name="Base column").uncheck()
    page.get_by_role("checkbox", name="reslora", exact=True).uncheck()
    expect(page.locator("#expected")).to_contain_text("8 images, about")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("8 images in")
    page.locator("#grid button.cell").nth(4).click()
    page.keyboard.press("4")
    expect(page.locator("#viewer .heat figcaption")).to_contain_text("mean")
    eventually(page, lambda: any(s.view.name == "Difference" for s in studio.sessions.open.values()))
    page.evaluate("document.getElementById('viewer').remove()")  # closing it would be another view
    before = state(page)
    archive = downloaded(page, "#download_zip", tmp_path / "all.zip")
    settings = downloaded(page, "#download_settings", tmp_path / "settings.json")

    other = visit()
    assert state(other) != before
    upload(other, "#saved_files", archive)
    expect(other.locator("#status")).to_contain_text("Opened with 8 images")
    expect(other.locator("#viewer .heat canvas")).to_be_visible()
    expect(other.locator("#viewer .row")).to_contain_text("a dog 猫 · seed 3")
    other.keyboard.press("Escape")
    expect(other.locator("#expected")).to_contain_text("8 images, about")
    eventually(other, lambda: state(other) == before)
    assert images_in(downloaded(other, "#download_zip", tmp_path / "again.zip")) == images_in(archive)

    alone = visit()
    upload(alone, "#saved_files", settings)
    expect(alone.locator("#status")).to_contain_text("Opened with 0 of 8 images")
    expect(alone.locator("#viewer .heat figcaption")).to_contain_text("not both of these images are generated")
    alone.keyboard.press("Escape")
    expect(alone.locator("#expected")).to_contain_text("8 images, about")
    eventually(alone, lambda: state(alone) == before)
    alone.get_by_role("button", name="Generate again").click()
    expect(alone.locator("#status")).to_contain_text("8 images in")
    eventually(alone, lambda: state(alone) == before)
    assert images_in(downloaded(alone, "#download_zip", tmp_path / "alone.zip")) == images_in(archive)


def test_sweep_on_a_narrow_screen_shows_its_images(visit):
    page = visit(390, "dark")
    set_steps(page, 1)
    fill(page, "seeds", "0")
    page.click("#sweep")
    expect(page.locator("#expected")).to_contain_text("15 images, about")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("15 images in")
    expect(page.locator("#status")).to_be_in_viewport()
    expect(page.locator("#grid thead small")).to_have_count(14)


@pytest.fixture
def slow(studio):
    """Steps that take a while, and leave the processor to the browser."""
    hook = studio.comparer.pipe.unet.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    yield
    hook.remove()


def test_stop_keeps_what_is_there_and_the_page_answers_meanwhile(visit, slow):
    page = visit()
    set_steps(page, 20)
    fill(page, "seeds", "0-60")
    expect(page.locator("#expected")).to_contain_text("183 images")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text(re.compile(r"\d+ of 183 images"))
    show(page, "Blind vote")
    page.click("#vote_begin")
    page.wait_for_selector("#vote_pair img, [data-testid=toast-body]")
    show(page, "Compare")
    assert "of 183" in page.locator("#status").inner_text(), "it was still generating"
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Stopped:")
    generated = int(re.search(r"Stopped: (\d+) of 183", page.locator("#status").inner_text())[1])
    assert 0 < generated < 183
    expect(page.locator("#grid img")).to_have_count(generated)


def test_stop_while_waiting_for_another_visitors_images(visit, slow, studio):
    one, other = visit(), visit()
    set_steps(one, 20)
    fill(one, "seeds", "0-60")
    expect(one.locator("#expected")).to_contain_text("183 images")
    one.click("#run")
    expect(one.locator("#status")).to_contain_text("of 183 images")
    other.click("#run")
    expect(other.locator("#line")).to_contain_text("A comparison of another visitor comes first")
    eventually(other, lambda: any(session.waits for session in studio.sessions.open.values()))
    waiting = next(session for session in studio.sessions.open.values() if session.waits)
    other.click("#stop")
    eventually(other, waiting.cancel.is_set)
    one.click("#stop")
    expect(one.locator("#status")).to_contain_text("Stopped:")
    expect(other.locator("#status")).to_contain_text("Stopped: 0 of 6 images")


def test_an_adapter_of_a_checkpoint_joins_the_comparison(visit):
    page = visit()
    unfold(page, "adapters of runs")
    choose(page, "adapters_of_runs", "lora/checkpoint-20")
    expect(page.get_by_role("checkbox", name="lora/checkpoint-20")).to_be_checked()
    expect(page.locator("#expected")).to_contain_text("8 images, about")


def test_uploads_beside_each_other_are_not_lost_and_leave_alone_what_is_ticked_meanwhile(visit, folder, monkeypatch):
    page, go_on, card = visit(), threading.Event(), AdapterShelf.card
    for seed, name in ((11, "slow"), (12, "quick")):
        make_lora_file(folder / name, folder / "base", seed).rename(folder / f"{name}.safetensors")

    def held(shelf, path, label=None):
        assert label != "slow" or go_on.wait(PATIENCE_MS / 1000)
        return card(shelf, path, label)

    monkeypatch.setattr(AdapterShelf, "card", held)
    upload(page, "#adapter_files", folder / "slow.safetensors")
    upload(page, "#adapter_files", folder / "quick.safetensors")
    page.get_by_role("checkbox", name="lora", exact=True).uncheck()
    expect(page.locator("#expected")).to_contain_text("4 images, about")
    go_on.set()
    for name in ("slow", "quick"):
        expect(page.get_by_role("checkbox", name=name, exact=True)).to_be_checked()
    expect(page.locator("#expected")).to_contain_text("8 images, about")
    assert not page.get_by_role("checkbox", name="lora", exact=True).is_checked()


def test_uploads_whose_answers_come_in_one_moment_are_both_ticked(visit, folder, monkeypatch):
    page, prepare, second = visit(), gr.JSON.postprocess, threading.Event()
    both = [folder / f"{name}.safetensors" for name in ("left", "right")]
    for seed, file in enumerate(both, start=21):
        make_lora_file(folder / file.stem, folder / "base", seed).rename(file)

    def held(joined, value):
        """Gradio prepares the first answer until it has been overtaken by the second."""
        if "right" in str(value):
            second.set()
        assert "left" not in str(value) or second.wait(PATIENCE_MS / 1000)
        return prepare(joined, value)

    monkeypatch.setattr(gr.JSON, "postprocess", held)
    for file in both:
        upload(page, "#adapter_files", file)
    for file in both:
        expect(page.get_by_role("checkbox", name=file.stem, exact=True)).to_be_checked()


def test_a_comparison_that_is_asked_for_while_another_runs_takes_its_place(visit, slow):
    page = visit()
    set_steps(page, 20)
    fill(page, "seeds", "0-60")
    expect(page.locator("#expected")).to_contain_text("183 images")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("of 183 images")
    set_steps(page, 1)
    fill(page, "prompts", "a lighthouse")
    fill(page, "seeds", "3")
    expect(page.locator("#expected")).to_contain_text("3 images")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("3 images in")
    expect(page.locator("#grid")).to_contain_text("a lighthouse")
    expect(page.locator("#stop")).to_be_disabled()


def test_another_base_is_chosen_on_the_page_and_a_damaged_one_changes_nothing(visit, folder):
    page = visit()
    choose(page, "base", "damaged")
    expect(toast(page)).to_contain_text("The base damaged cannot be loaded")
    expect(page.locator("#base input")).to_have_value("base")
    page.get_by_role("button", name="Close").first.click()
    choose(page, "base", "wide")
    expect(page.locator("#status")).to_contain_text("The base is wide")
    expect(page.locator("#status")).to_contain_text("lora is not chosen any more")
    expect(page.get_by_role("checkbox", name="lora", exact=True)).not_to_be_checked()
    upload(page, "#adapter_files", folder / "foreign" / "pytorch_lora_weights.safetensors")
    expect(page.locator("#adapters input:checked")).to_have_count(1)
    set_steps(page, 1)
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("4 images in")
    page.reload()
    expect(page.locator("#base input")).to_have_value("wide")
    expect(page.locator("#grid img")).to_have_count(4)
    expect(visit(390).locator("#base input")).to_have_value("base")  # a choice is one visitor's own


def test_adapters_are_renamed_moved_and_removed(visit, tmp_path):
    page = visit()
    names = "[...document.querySelectorAll('#adapters label')].map((label) => label.innerText.trim())"
    assert page.evaluate(names) == ["lora", "reslora"]
    unfold(page, "Rename, reorder")
    choose(page, "one_adapter", "reslora")
    expect(page.locator("#new_name :is(input, textarea)")).to_have_value("reslora")
    page.click("#move_up")
    eventually(page, lambda: page.evaluate(names) == ["reslora", "lora"])
    fill(page, "new_name", "ours")
    page.click("#rename")
    expect(page.get_by_role("checkbox", name="ours", exact=True)).to_be_checked()
    page.reload()
    eventually(page, lambda: page.evaluate(names) == ["ours", "lora"])
    expect(page.get_by_role("checkbox", name="ours", exact=True)).to_be_checked()
    archive = downloaded(page, "#download_zip", tmp_path / "all.zip")
    unfold(page, "Rename, reorder")
    choose(page, "one_adapter", "ours")
    page.click("#remove")
    eventually(page, lambda: page.evaluate(names) == ["lora"])
    page.reload()
    arrived(page)
    assert page.evaluate(names) == ["lora"]
    upload(page, "#saved_files", archive)  # whose images are of it
    eventually(page, lambda: page.evaluate(names) == ["lora", "reslora"])
    page.reload()
    arrived(page)
    assert page.evaluate(names) == ["lora", "reslora"]


def test_steps_along_the_columns_and_guidance_along_the_rows(visit):
    page = visit()
    unfold(page, "More axes")
    for side, axis, values in (("columns", "steps", "1, 2"), ("rows", "guidance", "1, 7.5")):
        choose(page, f"{side}_axis", axis)
        fill(page, f"{side}_values", values)
    fill(page, "seeds", "0")
    expect(page.locator("#expected")).to_contain_text("12 images, about")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("12 images in")
    heads = page.locator("#grid thead small").all_inner_texts()
    assert heads == ["1 step", "2 steps", *["× 1 · 1 step", "× 1 · 2 steps"] * 2]
    assert page.locator("#grid tbody small").all_inner_texts() == ["seed 0 · guidance 1", "seed 0 · guidance 7.5"]


def test_two_visitors_do_not_see_each_other(visit, tmp_path):
    one, other = visit(), visit(390)  # a browser of its own
    set_steps(one, 1)
    fill(one, "prompts", "a lighthouse of one's own")
    expect(one.locator("#expected")).to_contain_text("6 images, about")
    one.click("#run")
    expect(one.locator("#grid")).to_contain_text("lighthouse")
    expect(one.locator("#status")).to_contain_text("6 images in")
    assert "lighthouse" not in other.content()
    assert "lighthouse" not in downloaded(other, "#download_settings", tmp_path / "settings.json").read_text()
    assert "lighthouse" in downloaded(one, "#download_settings", tmp_path / "settings.json").read_text()


# ------------------------------------------------------------------------------------------- vote and measures


def test_a_reload_loses_nothing_and_starting_afresh_does(visit, folder, studio):
    page = visit()
    file = make_lora_file(folder / "added", folder / "base", 5)
    upload(page, "#adapter_files", file.rename(folder / "added.safetensors"))
    expect(page.get_by_role("checkbox", name="added", exact=True)).to_be_checked()
    page.get_by_role("checkbox", name="lora", exact=True).uncheck()
    set_steps(page, 1)
    fill(page, "prompts", "a lighthouse")
    fill(page, "seeds", "3-5")
    expect(page.locator("#expected")).to_contain_text("9 images, about")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("9 images in")
    show(page, "Blind vote")
    expect(page.locator("#vote_second input")).to_have_value("added × 1")
    unfold(page, "Images to vote by")
    upload(page, "#vote_references button", folder / "0.png", folder / "1.png")
    expect(page.locator("#vote_subject img")).to_have_count(2)
    page.click("#vote_begin")
    page.click("#vote_left")
    expect(page.locator("#vote_pair")).to_contain_text("2 of 3")
    show(page, "Compare")
    fill(page, "prompts", "not yet {asked")
    expect(page.locator("#expected")).to_contain_text("braces do not pair")
    show(page, "Measures")
    page.click("#measure")
    expect(page.locator("#measures")).to_contain_text("diversity")
    show(page, "Compare")
    page.locator("#grid button.cell").last.click()
    page.keyboard.press("2")
    eventually(page, lambda: any(s.view.name == "Side by side" for s in studio.sessions.open.values()))

    page.reload()
    expect(page.locator("#viewer .pane")).to_have_count(2)
    page.keyboard.press("Escape")
    expect(page.locator("#verdict")).to_contain_text("diversity")
    expect(page.locator("#grid")).to_contain_text("a lighthouse")
    expect(page.locator("#grid img")).to_have_count(9)
    expect(page.locator("#status")).to_contain_text("9 images in")
    expect(page.locator("#prompts textarea")).to_have_value("not yet {asked")
    expect(page.locator("#seeds :is(input, textarea)")).to_have_value("3-5")
    expect(page.get_by_role("checkbox", name="added", exact=True)).to_be_checked()
    expect(page.get_by_role("checkbox", name="lora", exact=True)).not_to_be_checked()
    show(page, "Blind vote")
    expect(page.locator("#vote_pair")).to_contain_text("2 of 3")
    expect(page.locator("#vote_second input")).to_have_value("added × 1")
    expect(page.locator("#vote_subject img")).to_have_count(2)
    show(page, "Measures")
    expect(page.locator("#measures")).to_contain_text("diversity")
    show(page, "Compare")
    fill(page, "prompts", "a harbour")
    expect(page.locator("#expected")).to_contain_text("9 images, about")
    page.click("#run")
    expect(page.locator("#grid")).to_contain_text("a harbour")
    expect(page.locator("#history button")).to_have_count(2)
    expect(page.locator("#verdict")).to_have_text("")
    page.locator("#history button").last.click()
    expect(page.locator("#grid")).to_contain_text("a lighthouse")
    expect(page.locator("#verdict")).to_contain_text("diversity")
    expect(page.locator("#prompts textarea")).to_have_value("a lighthouse")
    page.click("#afresh")
    expect(page.locator("#grid")).to_contain_text("a cat")
    arrived(page)
    expect(page.get_by_role("checkbox", name="added", exact=True)).to_have_count(0)


def test_vote_by_keyboard_and_without_a_leak(visit, tmp_path):
    page = visit(390)
    page.get_by_role("tab", name="Blind vote").press("Enter")
    expect(page.locator("#vote_second input")).to_have_value("reslora × 1")
    page.locator("#vote_begin").press("Enter")
    page.wait_for_selector("#vote_pair img")
    shown = page.locator("#vote_pair").inner_html()
    assert not any(word in shown for word in ("lora", "base", "×"))
    page.keyboard.press("Alt+t")  # a key of the browser's
    page.get_by_role("tab", name="Blind vote").press("ArrowRight")  # moves between tabs
    assert "1 of 2" in page.locator("#vote_pair").inner_text()
    page.locator("#vote_begin").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#vote_pair")).to_contain_text("2 of 2")
    page.keyboard.press("T")
    expect(page.locator("#vote_pair")).to_contain_text("All 2 pairs have a vote")
    page.locator("#vote_reveal").press("Enter")
    expect(page.locator("#vote_result")).to_contain_text("too few to say anything")
    expect(page.locator("#verdict")).to_contain_text("1 of 1 decided votes are for")
    assert downloaded(page, "#download_votes", tmp_path / "votes.csv").read_text().count("\n") == 3


def test_measures_and_file_card(visit):
    page = visit()
    show(page, "Measures")
    page.click("#measure")
    expect(page.locator("#measures")).to_contain_text("diversity")
    expect(page.locator("#measures")).to_contain_text("Relative to the base")
    expect(page.locator("#contact_sheet img")).to_have_count(4)  # by drift, which the base has none of
    page.get_by_label("Subject's word").fill("cat")
    expect(page.locator("#measures")).to_contain_text("made with other fields")
    show(page, "Compare")
    expect(page.locator("#verdict")).to_contain_text("lora × 1 against reslora × 1")
    expect(page.locator("#verdict")).to_contain_text("that is not to say that there is none")
    set_steps(page, 1)
    fill(page, "seeds", "5")
    expect(page.locator("#expected")).to_contain_text("3 images, about")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("3 images in")
    show(page, "Measures")
    expect(page.locator("#measures")).to_contain_text("the figures stand here")  # those of the images before are gone
    expect(page.locator("#verdict")).to_have_text("")
    show(page, "Files")
    expect(page.locator("#card")).to_contain_text("Fits the loaded base")
    expect(page.locator("#card")).to_contain_text("sha256")


# ---------------------------------------------------------------------------------------------- race and train


def test_runs_that_are_not_chosen_are_not_said_to_be_absent(address):
    assert "Choose the runs" in asked_of(address, "race_notes", "race_runs", [[], 0.9, 1])[0]


def test_race_shows_curves_gap_and_samples_at_any_step(visit):
    page = visit()
    show(page, "Race")
    for chart in ("race_loss", "race_validation_loss"):
        expect(page.locator(f"#{chart} :is(canvas, svg.marks)").first).to_be_visible()
    expect(page.locator("#race_legend")).to_contain_text("reslora input")
    expect(page.locator("#race_merges")).to_contain_text("+1.0e-02")
    expect(page.locator("#race_samples img")).to_have_count(8)
    expect(page.locator("#race_samples thead")).to_contain_text("step 40")
    page.locator("#race_step input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#race_samples thead")).to_contain_text("step 30")
    page.locator("#race_step input[type=range]").press("Home")
    expect(page.locator("#race_samples thead")).to_contain_text("step 0")


@pytest.fixture
def trainer(studio):
    yield studio.trainer
    studio.trainer.close()


def test_train_watch_reload_stop_and_compare(visit, folder, trainer, tmp_path):
    page = visit()
    show(page, "Train")
    upload(page, "#train_files button", folder / "0.png", folder / "1.png")
    expect(page.locator("#train_files").get_by_role("cell", name="0.png")).to_be_visible()  # it has been uploaded
    page.locator("#train_steps input").fill("9000")
    page.click("#train_start")
    expect(page.locator("#train_status")).to_contain_text(re.compile(r"step \d+ of 9000"))
    expect(page.locator("#train_loss canvas, #train_loss svg.marks").first).to_be_visible()
    config = downloaded(page, "#download_config", tmp_path / "config.yaml").read_text()
    assert config == (trainer.all()[0].folder / "config.yaml").read_text()
    assert "max_train_steps: 9000" in config

    page.reload()
    arrived(page)
    show(page, "Train")
    expect(page.locator("#train_status")).to_contain_text(re.compile(r"step \d+ of 9000"))
    other = visit(390, "dark")
    show(other, "Train")
    expect(other.locator("#train_status")).to_contain_text("No training of yours")
    make_lora_file(trainer.all()[0].folder, folder / "base", 9)
    page.click("#train_stop")
    expect(page.locator("#train_status")).to_contain_text("was stopped at step")
    show(page, "Compare")
    name = trainer.all()[0].folder.name
    expect(page.get_by_role("checkbox", name=name)).to_be_checked()
    page.reload()
    expect(page.get_by_role("checkbox", name=name)).to_be_checked()
    expect(page.get_by_role("checkbox", name="reslora", exact=True)).to_be_checked()


def test_a_training_that_ends_while_it_is_looked_at_is_looked_at_once_more(visit, folder, trainer, monkeypatch):
    status = run_views.training_status

    def late(training):
        assert training.process is None or training.process.wait(PATIENCE_MS / 1000) == 0
        return status(training)

    monkeypatch.setattr(run_views, "training_status", late)
    page = visit()
    show(page, "Train")
    upload(page, "#train_files button", folder / "0.png", folder / "1.png")
    expect(page.locator("#train_files").get_by_role("cell", name="0.png")).to_be_visible()
    fill(page, "train_prompt", "a brief cat")
    page.locator("#train_steps input").fill("2")
    page.click("#train_start")
    expect(page.locator("#train_status")).to_contain_text("no adapter was written")
    expect(page.locator("#train_start")).to_be_enabled()
    expect(page.locator("#train_stop")).to_be_disabled()  # the look that saw it run left it enabled


def test_training_on_nothing_is_refused_in_words(visit):
    page = visit()
    show(page, "Train")
    fill(page, "train_prompt", "")
    page.click("#train_start")
    expect(toast(page)).to_contain_text("0 images of the subject")
    expect(toast(page)).to_contain_text("no prompt")


# -------------------------------------------------------------------------------------------------- bad input


def test_bad_files_are_refused_in_words(visit, folder):
    page = visit()
    expected = {"broken.safetensors": "is a pickle", "foreign/pytorch_lora_weights.safetensors": "other shapes"}
    for file, words in expected.items():
        upload(page, "#adapter_files", folder / file)
        expect(toast(page)).to_contain_text(words)
        page.get_by_role("button", name="Close").first.click()
    assert page.get_by_role("checkbox", name="foreign").count() == 0
    show(page, "Files")
    for file, words in expected.items():
        upload(page, "#card_file", folder / file)
        expect(page.locator("#card")).to_contain_text(words)


WATCH_CARD = WATCH_EXPECTED.replace("'expected'", "'card'")


def test_the_card_of_an_upload_stays_when_the_slower_one_of_the_first_adapter_comes(visit, folder, monkeypatch):
    """The first adapter's card is asked for when the tab is opened, and here answered after that of the upload."""
    page, shown, ended, card = visit(), threading.Event(), threading.Event(), AdapterShelf.card

    def slow(shelf, path, label=None):
        if label != "lora":
            return card(shelf, path, label)
        assert shown.wait(PATIENCE_MS / 1000)
        try:
            return card(shelf, path, label)
        finally:
            ended.set()

    monkeypatch.setattr(AdapterShelf, "card", slow)
    show(page, "Files")
    upload(page, "#card_file", folder / "broken.safetensors")
    expect(page.locator("#card")).to_contain_text("is a pickle")
    page.evaluate(WATCH_CARD)
    shown.set()
    assert ended.wait(PATIENCE_MS / 1000)
    show(page, "Compare")
    fill(page, "seeds", "0-8")
    expect(page.locator("#expected")).to_contain_text("27 images, about")  # asked later, and answered later
    assert page.evaluate("window.expectations") == []
    show(page, "Files")  # finds it as it was left
    expect(page.locator("#card_adapter input")).to_have_value("lora")
    expect(page.locator("#card")).to_contain_text("is a pickle")


def test_bad_settings_are_refused_in_words(visit, tmp_path):
    page = visit(390)
    (tmp_path / "settings.json").write_text(json.dumps({"format_version": 1, "seeds": "all", "evil": 1}))
    upload(page, "#saved_files", tmp_path / "settings.json")
    expect(toast(page)).to_contain_text("evil is not known")


def test_ten_thousand_images_are_refused_in_words(visit):
    page = visit()
    fill(page, "seeds", "0-9998")
    expect(page.locator("#expected")).to_contain_text("at most 200 are generated at once")
    page.click("#run")
    expect(toast(page)).to_contain_text("images; at most 200")
