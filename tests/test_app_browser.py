"""The real page in headless Chromium: paint, look, flip, vote, stop, take away, and be refused."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from app.serve import launch, open_studio
from app_fixtures import make_lora_file, make_pipeline

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 10_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page was not driven (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    make_pipeline(folder / "base")
    for seed, name in enumerate(("lora", "reslora")):
        make_lora_file(folder / "runs" / name, folder / "base", seed)
    make_lora_file(folder / "foreign", folder / "wide", 0, wide=True)
    (folder / "broken.safetensors").write_bytes(b"\x80\x04a pickle")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    studio = open_studio(
        folder / "base", (folder / "runs",), folder / "pictures", "a cat", train_dir=folder / "trained", first_steps=2
    )
    demo = launch(studio, prevent_thread_lock=True, quiet=True)
    yield demo.local_url
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide-light", "narrow-dark"])
def page(request, browser, address):
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    faults, foreign = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}") or dialog.dismiss())
    page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    page.goto(address)
    page.wait_for_selector("#grid img")
    yield page
    context.close()
    assert not faults
    assert not foreign, "the page asks other machines for something"


def fill(page, name: str, text: str) -> None:
    page.locator(f"#{name} :is(textarea, input)").first.fill(text)


def run(page, pictures: int) -> None:
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_contain_text(f"{pictures} pictures in", timeout=PATIENCE_MS)


def set_steps(page, steps: int) -> None:
    page.get_by_role("button", name="Sampling").click()
    page.locator("#steps input[type=number]").fill(str(steps))
    page.locator("#steps input[type=number]").press("Tab")


def upload(page, button: str, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click(button)
    chooser.value.set_files(file)


def test_the_first_screen_shows_pictures_and_fits_the_width(page):
    assert page.locator("#grid img").count() == 6
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('input, textarea, select')].filter((e) => e.offsetParent && !e.labels?.length"
        " && !e.ariaLabel && !e.getAttribute('aria-labelledby') && !e.title).map((e) => e.outerHTML)"
    )
    assert unlabelled == []


def test_paint_look_flip_and_take_away(page, tmp_path):
    set_steps(page, 2)
    fill(page, "prompts", "a {x} <img src=x onerror=alert(1)>")
    fill(page, "placeholders", "x = cat, dog")
    fill(page, "seeds", "3")
    fill(page, "strengths", "0.5, 1")
    sync_api.expect(page.locator("#expected")).to_contain_text("10 pictures, about")
    run(page, 10)
    sync_api.expect(page.locator("#grid img")).to_have_count(10)
    assert page.locator("#grid").inner_text().count("<img src=x onerror=alert(1)>") == 2

    page.locator("#grid button.cell").last.click()
    page.wait_for_selector("#slider img")
    handle = page.locator("#slider").bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + 200)
    page.mouse.down()
    page.mouse.move(handle["x"] + handle["width"] / 4, handle["y"] + 200)
    page.mouse.up()
    page.get_by_label("Flip", exact=True).check()
    front = page.locator("#flip .front")
    sync_api.expect(front).to_be_visible()
    page.locator("#flip .turn").press("Space")
    sync_api.expect(front).to_be_hidden()
    sync_api.expect(page.locator("#flip .back figcaption")).to_have_text("reslora × 1")
    page.get_by_label("Difference", exact=True).check()
    sync_api.expect(page.locator("#difference")).to_contain_text("mean difference")

    with page.expect_download() as download:
        page.click("#download_zip")
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        archive.extract("settings.json", tmp_path)
        assert len(archive.namelist()) == 13
    page.reload()
    page.wait_for_selector("#grid img")
    upload(page, "#settings_file", tmp_path / "settings.json")
    sync_api.expect(page.locator("#placeholders :is(textarea, input)")).to_have_value("x = cat, dog")
    sync_api.expect(page.locator("#strengths :is(textarea, input)")).to_have_value("0.5, 1")


def test_stop_keeps_what_is_there(page):
    set_steps(page, 60)
    fill(page, "seeds", "0-20")
    sync_api.expect(page.locator("#expected")).to_contain_text("63 pictures")
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_contain_text("2 of 63 pictures", timeout=PATIENCE_MS)
    page.click("#stop")
    sync_api.expect(page.locator("#status")).to_contain_text("Stopped:")
    painted = int(re.search(r"Stopped: (\d+) of 63", page.locator("#status").inner_text())[1])
    assert 0 < painted < 63
    assert page.locator("#grid img").count() == painted


def test_the_page_answers_while_it_paints(page):
    set_steps(page, 100)
    fill(page, "seeds", "0-20")
    sync_api.expect(page.locator("#expected")).to_contain_text("63 pictures")
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_contain_text("2 of 63 pictures", timeout=PATIENCE_MS)
    page.get_by_role("tab", name="Blind vote").click()
    page.locator("#vote_begin").click()
    page.wait_for_selector("#vote_pair img, .toast-wrap")
    page.get_by_role("tab", name="Compare").click()
    assert "of 63" in page.locator("#status").inner_text(), "it was still painting"
    page.click("#stop")
    sync_api.expect(page.locator("#status")).to_contain_text("Stopped:")


def test_vote_by_keyboard_and_without_a_leak(page, tmp_path):
    page.get_by_role("tab", name="Blind vote").click()
    page.click("#vote_begin")
    page.wait_for_selector("#vote_pair img")
    shown = page.locator("#vote_pair").inner_html()
    assert not any(word in shown for word in ("lora", "base", "×"))
    page.locator("#vote_pair").click()
    page.keyboard.press("ArrowLeft")
    sync_api.expect(page.locator("#vote_pair")).to_contain_text("2 of 2")
    page.keyboard.press("t")
    sync_api.expect(page.locator("#vote_pair")).to_contain_text("All 2 pairs have a vote")
    page.click("#vote_reveal")
    sync_api.expect(page.locator("#vote_result")).to_contain_text("too few to say anything")
    with page.expect_download() as download:
        page.click("#download_votes")
    download.value.save_as(tmp_path / "votes.csv")
    assert (tmp_path / "votes.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("file", "words"),
    [("broken.safetensors", "is a pickle"), ("foreign/pytorch_lora_weights.safetensors", "other shapes")],
)
def test_bad_files_are_refused_in_words(page, folder, file, words):
    upload(page, "#adapter_files", folder / file)
    toast = page.locator(".toast-wrap, [data-testid=toast-body]").first
    sync_api.expect(toast).to_contain_text(words)
    assert page.get_by_role("checkbox", name="foreign").count() == 0
    page.reload()  # the message covers a narrow page until it is closed
    page.wait_for_selector("#grid img")
    page.get_by_role("tab", name="Files").click()
    upload(page, "#card_file", folder / file)
    sync_api.expect(page.locator("#card")).to_contain_text(words)


def test_bad_settings_are_refused_in_words(page, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"format_version": 1, "seeds": "all", "evil": 1}))
    upload(page, "#settings_file", tmp_path / "settings.json")
    toast = page.locator(".toast-wrap, [data-testid=toast-body]").first
    sync_api.expect(toast).to_contain_text("evil is not known")


def test_measures_and_card(page, folder):
    page.get_by_role("tab", name="Measures").click()
    page.click("#measure")
    sync_api.expect(page.locator("#measures")).to_contain_text("diversity")
    page.get_by_role("tab", name="Files").click()
    sync_api.expect(page.locator("#card")).to_contain_text("Fits the loaded base")
    sync_api.expect(page.locator("#card")).to_contain_text("sha256")
