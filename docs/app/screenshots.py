"""Renew the screenshots of the documents: `make screenshots`, after `make demo`.

The real page, with the embedded pipeline and the demo's runs, in headless Chromium. A training of the page is started
and shown when it has ended. Wanted: the packages of the `app` and `dev` extras, and Chromium (or CHROMIUM set to one).
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from app.serve import launch, open_studio

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PROMPTS = "a sticker of sks animal on a blue background\na sticker of sks animal on a yellow background"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "demo", help="folder of the demo's runs")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--max_train_steps", type=int, default=240, help="of the training that is shown")
    parser.add_argument("--patience", type=float, default=1200, help="seconds that one step of the page may take")
    return parser.parse_args()


def show(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()
    page.mouse.move(0, 0)


def choose_subject(page: Page, field: str) -> None:
    box = page.locator(f"#{field}").get_by_role("combobox")
    box.click()
    expect(box).to_have_attribute("aria-expanded", "true")
    page.locator(f"#{box.get_attribute('aria-controls')}").get_by_role("option", name="panda", exact=True).click()


def compare(page: Page) -> None:
    page.locator("#prompts textarea").fill(PROMPTS)
    page.locator("#prompts textarea").blur()
    expect(page.locator("#expected")).to_contain_text("12 images")
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("12 images in")
    expect(page.locator("#grid img")).to_have_count(12)


def difference(page: Page) -> None:
    page.locator("#grid button.cell").nth(2).click()
    page.keyboard.press("4")
    expect(page.locator("#viewer .heat figcaption")).to_contain_text("mean")


def race(page: Page) -> None:
    show(page, "Race")
    for chart in ("race_loss", "race_validation_loss"):
        expect(page.locator(f"#{chart} :is(canvas, svg.marks)").first).to_be_visible()
    expect(page.locator("#race_samples img").first).to_be_visible()


def measures(page: Page) -> None:
    show(page, "Measures")
    choose_subject(page, "measure_subject")
    page.click("#measure")
    expect(page.locator("#contact_sheet img").first).to_be_visible()


def vote(page: Page) -> None:
    show(page, "Blind vote")
    expect(page.locator("#vote_second input")).to_have_value("reslora × 1")
    page.click("#vote_begin")
    expect(page.locator("#vote_pair img")).to_have_count(2)


def train(page: Page, steps: int) -> None:
    show(page, "Train")
    choose_subject(page, "train_subject")
    expect(page.locator("#train_preview img").first).to_be_visible()
    page.locator("#train_steps input").fill(str(steps))
    page.locator("#train_method").get_by_text("ResLoRA, block").click()
    page.click("#train_start")
    expect(page.locator("#train_status")).to_contain_text(f"{steps} steps done")
    expect(page.locator("#train_loss :is(canvas, svg.marks)").first).to_be_visible()


def main(args: argparse.Namespace) -> None:
    expect.set_options(timeout=args.patience * 1000)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        studio = open_studio(
            ROOT / "assets" / "sticker-sd",
            (args.runs.resolve(),),
            Path(folder) / "images",
            train_dir=Path(folder) / "trained",
            subjects_dir=ROOT / "assets" / "subjects",
        )
        demo = launch(studio, prevent_thread_lock=True, quiet=True)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])

        def visit(viewport: dict[str, int]) -> Page:
            page = browser.new_page(viewport=viewport, color_scheme="light")
            page.goto(demo.local_url)
            expect(page.locator("#grid img").first).to_be_visible()
            expect(page.locator("#expected")).to_contain_text("images, about")
            return page

        def shot(page: Page, name: str, whole: bool = False) -> None:
            page.wait_for_timeout(500)  # transitions
            page.screenshot(path=args.output_dir / f"{name}.png", full_page=whole)
            print(f"{name}.png", flush=True)

        try:
            narrow, wide = visit(NARROW), visit(WIDE)
            vote(narrow)
            shot(narrow, "vote-narrow", whole=True)
            shot(wide, "compare")
            race(wide)
            shot(wide, "race", whole=True)
            show(wide, "Compare")
            compare(wide)
            difference(wide)
            shot(wide, "viewer")
            wide.keyboard.press("Escape")
            measures(wide)
            shot(wide, "measures", whole=True)
            train(wide, args.max_train_steps)
            shot(wide, "train", whole=True)
        finally:
            studio.trainer.close()
            browser.close()
            demo.close()


if __name__ == "__main__":
    main(parse_args())
