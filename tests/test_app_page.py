"""What stands between the page and its floors: forms, files to take away, sessions, HTML; and the page's API."""

import html
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")

import gradio as gr
import httpx
from gradio_client import Client

from app import measure_views, views
from app.__main__ import main, parse_args
from app.adapters import MAX_LABEL, AdapterShelf, default_label
from app.compare import Cell
from app.figure import KINDS as FIGURES
from app.figure import figure
from app.foreign import ALONE, name_of
from app.forms import fields_of, read_placeholders, read_request, read_seeds, read_strengths, unwritable
from app.guard import Guard
from app.measures import measure
from app.output import column_lines, difference, enlarged, png, report, settings_line, sheet
from app.pages import PageAxis, pages
from app.raters import read_votes
from app.request import Adapter, Axis, Column, CompareRequest, Limits, Scheduler, Setting, digests_in, problems
from app.saved import View, saved_view, write_zip
from app.serve import launch, open_studio
from app.sessions import MAX_SESSIONS, Sessions
from app.tabs.latest import SKIP
from app.tabs.taking import KINDS
from app.verdict import findings
from app.visits import Entry
from app.votes import Choice, make_ballot
from app_fixtures import make_lora_file, make_pipeline
from dreambooth import generate

PATIENCE = 120  # seconds of one answer on a machine with other work
get, post = (partial(method, timeout=PATIENCE) for method in (httpx.get, httpx.post))
program = partial(Client, verbose=False, httpx_kwargs={"timeout": PATIENCE})
NASTY = "<script>alert(1)</script> ${1+1} {{value}} <img src=x onerror=alert(1)> \x1b[2J \u202e"
ADAPTERS = {name: Adapter(name, f"/somewhere/{name}.safetensors", name * 8) for name in ("one", "two")}


def comparison(prompt: str = "a panda", label: str = "one") -> tuple[CompareRequest, list[Cell]]:
    adapter = Adapter(label, "/somewhere/file.safetensors", "d" * 64)
    request = CompareRequest(prompts=(prompt,), seeds=(0, 1), adapters=(adapter,))
    cells = [
        Cell(row, column, Image.new("RGB", (64, 64), (60 * i, 80 * j, 9)), column.label, 0.5)
        for i, row in enumerate(request.rows)
        for j, column in enumerate(request.columns)
    ]
    return request, cells


# ---------------------------------------------------------------------------------------------------- forms


def test_fields_and_request_are_inverses():
    request = CompareRequest(
        prompts=("a {subject}", "b"), seeds=(1, 2, 7), adapters=tuple(ADAPTERS.values()), strengths=(0.1234567, 1.0),
        placeholders={"subject": ("red cat", "dog")}, include_base=False, negative_prompt="blur",
        num_inference_steps=9, guidance_scale=2.5, scheduler=Scheduler.DPM, strengths_first=True,
        rows_by=(Setting(Axis.GUIDANCE, 1.0), Setting(Axis.GUIDANCE, 7.5)),
        columns_by=(Setting(Axis.SCHEDULER, Scheduler.DDIM), Setting(Axis.SCHEDULER, Scheduler.EULER)),
    )  # fmt: skip
    assert read_request(*fields_of(request), adapters=ADAPTERS, limits=Limits()) == request


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [(read_seeds, "1-3, 7;2", (1, 2, 3, 7)), (read_strengths, "0 .5, 1", (0.0, 0.5, 1.0)),
     (read_placeholders, "{a} = x, y\n\nb=z", {"a": ("x", "y"), "b": ("z",)})],
)  # fmt: skip
def test_what_people_type_is_read(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    ("read", "text"),
    [(read_seeds, "one"), (read_seeds, "3-1"), (read_seeds, "0-99999999"), (read_strengths, "half"),
     (read_placeholders, "a: x"), (read_placeholders, "0 = x")],
)  # fmt: skip
def test_what_cannot_be_read_is_said(read, text):
    with pytest.raises(ValueError, match="got"):
        read(text)


def test_what_the_fields_would_change_is_named():
    """Such a request would be another one when it is generated again."""
    adapters = (ADAPTERS["one"],)
    sound = CompareRequest(prompts=("a {x}",), seeds=(1,), adapters=adapters, placeholders={"x": ("cat", "big dog")})
    assert unwritable(sound) == []
    assert unwritable(replace(sound, placeholders={"x": ("red, big",)})) == ["placeholders"]
    assert unwritable(replace(sound, prompts=(" a {x}",), seeds=(1, 1))) == ["prompts", "seeds"]


def test_a_line_is_what_a_text_field_shows_as_one():
    """`str.splitlines` ends lines at more characters than a text field does."""
    fields = ["a\u2028b\x0bc\x85d\r\ne", "x = p\u2028q", "0", [], "1", True, "", 5, 4, "DDIM"]
    asked = read_request(*fields, adapters={}, limits=Limits())
    assert asked.prompts == ("a\u2028b\x0bc\x85d", "e")
    assert asked.placeholders == {"x": ("p\u2028q",)}
    assert unwritable(asked) == []


@pytest.mark.parametrize(("place", "value"), [(7, None), (7, 2.5), (7, float("inf")), (8, None), (8, 10**400)])
def test_numbers_that_are_none_are_said(place, value):
    fields = ["a", "", "0", [], "1", True, "", 5, 4, "DDIM"]
    fields[place] = value
    with pytest.raises(ValueError, match="steps is a whole number|guidance is a number"):
        read_request(*fields, adapters={}, limits=Limits())


def test_all_fields_are_read_before_anything_is_said():
    fields = ["a", "?", "x", ["gone"], "y", True, "", 5, 4, "DDIM"]
    with pytest.raises(ValueError, match=r"(?s)placeholder.*seeds.*strengths.*gone is not here"):
        read_request(*fields, adapters=ADAPTERS, limits=Limits())
    fields = ["a {b}", "", "x", [], "1", True, "", 999, 4, "DDIM"]
    with pytest.raises(ValueError, match=r"(?s)seeds are.*nothing fills \{b\}.*steps lie"):
        read_request(*fields, adapters=ADAPTERS, limits=Limits())


# --------------------------------------------------------------------------------------------------- output


def test_difference_and_heat_map():
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    assert difference(black, black).max() == 0
    assert difference(black, white).min() == 1


def test_enlarging_repeats_whole_pixels():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    large = enlarged(image, 20)
    assert large.size == (24, 24)
    assert np.array_equal(np.asarray(large)[1::3, 1::3], np.asarray(image))


def test_the_sheet_holds_every_image_and_leaves_the_ungenerated_empty():
    request, cells = comparison()
    full, partial = sheet(request, cells, "base"), sheet(request, cells[:-1], "base")
    assert full.size == partial.size
    colours = {colour for _, colour in full.getcolors(100_000)}
    assert {cell.image.getpixel((0, 0)) for cell in cells} <= colours
    assert cells[-1].image.getpixel((0, 0)) not in {colour for _, colour in partial.getcolors(100_000)}


def test_the_zip_opens_the_page_again_and_names_no_path(tmp_path):
    request, cells = comparison(NASTY.replace("{{", "(").replace("}}", ")").replace("${1+1}", ""), label="../../evil")
    with zipfile.ZipFile(write_zip(tmp_path / "all.zip", request, cells, View(), "base")) as archive:
        names = archive.namelist()
        settings = json.loads(archive.read("settings.json"))
        assert Image.open(archive.open("images/row001-column01-base.png")).size == (64, 64)
    assert {"sheet.png", "report.html", "settings.json"} < set(names)
    assert not any(".." in Path(name).parts or name.startswith("/") for name in names)
    assert "/somewhere" not in json.dumps(settings)
    assert CompareRequest.from_dict(settings, {"d" * 64: "/somewhere/file.safetensors"}) == request


def test_the_report_is_whole_and_escaped():
    request, cells = comparison(NASTY.replace("{", "").replace("}", ""), label="<b>bold</b>")
    text = report(request, cells[:-1], "sticker <b>base")
    assert "<script" not in text
    assert "<b>bold" not in text
    assert "onerror=alert(1)&gt;" in text
    assert text.count("src=") == 3 + text.count("src=x")
    assert text.count('src="data:image/png;base64,') == 3
    assert "default-src 'none'" in text
    assert "not generated" in text
    assert "base sticker &lt;b&gt;base · 25 steps" in text


def test_sheet_and_report_say_what_the_images_have_in_common():
    request, _ = comparison()
    said = settings_line(replace(request, negative_prompt="blur"), "sticker-sd")
    sampling = "25 steps · guidance 2.5 · scheduler as saved · negative prompt “blur”"
    assert said == f"base sticker-sd · {sampling} · same noise in a row"


def test_settings_in_the_report_are_those_of_the_comparison():
    """Also where their words cannot be printed as they are."""
    asked = CompareRequest(prompts=("e\u0301 \u202e \u2028 \x07 猫",), seeds=(0,))
    text = html.unescape(re.search(r"<pre>(.*)</pre>", report(asked, [], "base"), re.DOTALL)[1])
    assert all(c.isprintable() or c == "\n" for c in text)
    assert CompareRequest.from_dict(json.loads(text), {}) == asked


def test_images_carry_no_words():
    image = Image.new("RGB", (4, 4))
    image.info["parameters"] = "secret"
    assert b"secret" not in png(image)
    assert b"tEXt" not in png(image)


# ------------------------------------------------------------------------------------------------- sessions


def test_sessions_do_not_mix_and_are_forgotten(tmp_path):
    sessions = Sessions(tmp_path, [ADAPTERS["one"]])
    request, cells = comparison()
    one, two = sessions.of("a"), sessions.of("b")
    one.show(request, cells)
    assert (len(one.cells), two.cells, two.request) == (4, [], None)
    assert one.folder != two.folder
    two.add_adapter(ADAPTERS["two"])
    assert list(one.adapters) == ["one"]
    cancel = one.begin(request)
    sessions.close("a")
    assert cancel.is_set()
    assert not one.folder.exists()
    assert sessions.of("a").request is None
    for number in range(MAX_SESSIONS):
        sessions.of(str(number))
    assert len(list(tmp_path.iterdir())) == MAX_SESSIONS


def test_a_comparison_can_be_stopped_while_it_waits_for_its_turn(tmp_path):
    session, (request, _) = Sessions(tmp_path).of("a"), comparison()
    running = session.begin(request)
    assert not running.is_set()
    session.ask()
    assert running.is_set(), "asking anew stops what runs"
    session.cancel.set()
    assert session.begin(request).is_set()
    assert not session.begin(request).is_set(), "the next one starts afresh"


def test_rows_and_columns_can_be_swapped_and_stay_so(tmp_path):
    session = Sessions(tmp_path).of("a")
    request, cells = comparison()
    session.show(request, cells)
    plain = views.grid(session)
    session.view = replace(session.view, transposed=True)
    turned = views.grid(session)
    place = 'data-row="{}" data-column="{}"'.format
    order = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [plain.index(place(i, j)) for i, j in order] == sorted(plain.index(place(i, j)) for i, j in order)
    assert turned.index(place(1, 0)) < turned.index(place(0, 1))
    assert 'scope="row" role="rowheader" data-column="1"' in turned
    assert 'scope="col" role="columnheader" data-row="1"' in turned
    session.show(request, cells)
    assert session.view.transposed
    saved = {"view": {"name": "Grid", "row": 0, "left": 0, "right": 1}}
    assert saved_view(saved, request) == View(right=1), "an older file says nothing of it"


@pytest.mark.parametrize(
    ("axis", "names", "rows", "columns"),
    [
        (PageAxis.NOTHING, [], [None] * 4, [None] * 5),
        (PageAxis.PROMPT, ["cat", "dog"], [0, 0, 1, 1], [None] * 5),
        (PageAxis.SEED, ["seed 3", "seed 4"], [0, 1, 0, 1], [None] * 5),
        (PageAxis.ADAPTER, ["one", "two"], [None] * 4, [None, 0, 0, 1, 1]),
        (PageAxis.STRENGTH, ["strength 0.5", "strength 1"], [None] * 4, [None, 0, 1, 0, 1]),
        (PageAxis.ROWS, [], [None] * 4, [None] * 5),
    ],
)
def test_a_page_holds_rows_or_columns_of_one_value_and_the_base_is_on_all(axis, names, rows, columns):
    adapters = tuple(ADAPTERS.values())
    request = CompareRequest(prompts=("cat", "dog"), seeds=(3, 4), adapters=adapters, strengths=(0.5, 1.0))
    assert pages(request, axis) == (names, rows, columns)


def test_the_grid_shows_one_page_and_holds_them_all(tmp_path):
    session = Sessions(tmp_path).of("a")
    request, cells = comparison()
    session.show(request, cells)
    assert "pager" not in views.grid(session)
    session.view = replace(session.view, pages=PageAxis.SEED, page=1)
    for transposed in (False, True):
        session.view = replace(session.view, transposed=transposed)
        grid = views.grid(session)
        assert "<b>seed 1</b> <small>page 2 of 2" in grid
        assert grid.count("<img") == 4
        assert grid.count(" hidden") == (3 if transposed else 1), "of a row its line, of a column its head and cells"
    saved = {"view": {**asdict(session.view), "pages": str(session.view.pages)}}
    assert saved_view(json.loads(json.dumps(saved)), request) == session.view
    for part in ({"pages": "epoch"}, {"page": 7}, {"page": True}):
        assert saved_view({"view": saved["view"] | part}, request).page == 0
    session.show(*comparison("a dog"))
    assert (session.view.pages, session.view.page) == (PageAxis.SEED, 0)


def test_the_place_in_the_queue_is_said_in_words(tmp_path):
    sessions = Sessions(tmp_path)
    one, two, three = (sessions.of(key) for key in "abc")
    one.ask()
    one.begin(CompareRequest(prompts=("a",), seeds=(0,)))
    one.generates = True
    two.ask()
    three.ask()
    assert [sessions.ahead(session) for session in (one, two, three)] == [0, 1, 2]
    assert "2 comparisons of other visitors come first" in views.place_in_line(2)
    one.generates = False
    assert [sessions.ahead(session) for session in (two, three)] == [0, 1]
    four, five = sessions.of("d"), sessions.of("e")
    four.abandon()  # as where a file is opened: nobody waits for it
    five.ask()
    assert sessions.ahead(five) == 2


def test_the_report_has_votes_and_measures(tmp_path):
    session = Sessions(tmp_path).of("a")
    request = CompareRequest(prompts=("a <b>",), seeds=(0, 1), adapters=(Adapter("mine", "", "0"),))
    session.show(
        request,
        [
            Cell(row, column, Image.new("RGB", (8, 8), "red"), "", 0.1)
            for row in request.rows
            for column in request.columns
        ],
    )
    session.measured = measure(request, session.cells, [], "")
    session.ballot = make_ballot(request, session.cells, *request.columns)
    session.ballot.vote(Choice.LEFT)

    def reported() -> str:
        evidence = measure_views.evidence(session, findings(request, session.measured, session.ballot, {}))
        return report(request, session.cells, "base", evidence)

    sealed = reported()
    assert "diversity" in sealed
    assert "sign test" not in sealed, "the result was not looked at"
    session.ballot.seen.append(1)
    text = reported()
    assert "sign test" in text
    assert "too few to say anything" in text
    assert "<b>," not in text


def test_names_keep_what_differs_and_fit():
    """The ends of names, where kohya's epochs and the strengths are."""
    long = "a-very-long-name-of-a-training-that-somebody-thought-of-at-length"
    names = [default_label(Path(f"runs/x/kohya/{long}-{epoch:06d}.safetensors")) for epoch in (5, 10)]
    labels = [name_of(name, MAX_LABEL) for name in names]
    assert [label[-7:] for label in labels] == ["-000005", "-000010"]
    assert {len(label) for label in labels} == {MAX_LABEL}
    column = Column(Adapter(labels[0], "p", "s"), 0.25)
    assert column_lines(column, 10) == ["a-very-lon", "th-000005".rjust(10, "…"), "× 0.25"]
    others = [Column(Adapter(label, "p", label), 0.25, Setting(Axis.STEPS, 9)) for label in labels]
    heads = views.short_heads([Column(), *others])
    assert [re.sub("<[^>]*>", "|", head) for head in heads] == [
        "|base|", "|000005||× 0.25 · 9 steps|", "|000010||× 0.25 · 9 steps|"
    ]  # fmt: skip
    assert name_of("caf\u0065\u0301 \u202egnp.exe\n\x1b[2J", 60) == "caf\u00e9  gnp.exe  [2J"


def test_a_second_file_of_the_longest_name_can_be_compared(tmp_path):
    session = Sessions(tmp_path).of("a")
    added = [session.add_adapter(Adapter("x" * MAX_LABEL, "p", sha)) for sha in "ab"]
    asked = CompareRequest(prompts=("a",), seeds=(0,), adapters=tuple(added))
    assert problems(asked, Limits()) == []


def test_two_files_of_one_name_get_two_labels(tmp_path):
    session = Sessions(tmp_path).of("a")
    first = session.add_adapter(Adapter("lora", "p", "1"))
    second = session.add_adapter(Adapter("lora", "q", "2"))
    again = session.add_adapter(Adapter("lora", "p", "1"))
    assert (first.label, second.label, again.label) == ("lora", "lora 2", "lora")


# ----------------------------------------------------------------------------------------------------- HTML


def test_the_page_escapes_what_people_write(tmp_path):
    session = Sessions(tmp_path).of("a")
    request, cells = comparison("PROMPT", label="<b>bold</b>")
    session.show(request, cells)
    texts = [
        views.message(f"{NASTY} \ud800"),
        views.grid(session),
        views.history([Entry(1, NASTY, 2, Path("a"), True), Entry(2, NASTY, 2, Path("b"), False)], lambda _: "/file"),
    ]
    texts.append(views.table((NASTY,), [(NASTY, NASTY)], NASTY))
    for text in texts:
        assert "<script" not in text
        assert "<img src=x" not in text
        assert "<b>bold" not in text
        assert not {"\x1b", "\u202e", "\ud800"} & set(text)
    assert html.escape("<b>bold</b>") in texts[1]


def test_words_in_a_files_header_are_escaped(tmp_path):
    make_pipeline(tmp_path / "base")
    path = make_lora_file(tmp_path / "lora", tmp_path / "base", 0)
    header = {"ss_output_name": NASTY, "reslora.trigger_words": NASTY, NASTY: NASTY}
    save_file(load_file(path), path, header)
    text = views.file_card(AdapterShelf(make_pipeline(tmp_path / "base")).card(path, "<b>bold</b>"))
    assert "Fits the loaded base" in text
    assert "trigger words" in text
    for words in ("<script", "<img src=x", "<b>bold"):
        assert words not in text


def test_captions_say_what_the_column_heads_do_not(tmp_path):
    session = Sessions(tmp_path).of("a")
    request, cells = comparison()
    cells = [replace(cell, generated_with=cell.column.held) for cell in cells]
    session.show(request, [*cells[:-1], replace(cells[-1], generated_with="one × 0.5")])
    assert views.grid(session).count('class="held"') == 1
    assert re.search("the layers held <span[^>]*>one × 0.5</span>", views.grid(session))


def test_a_ballot_gives_no_side_away(tmp_path):
    session = Sessions(tmp_path).of("a")
    request, cells = comparison()
    session.show(request, cells)
    session.ballot = make_ballot(request, cells, *request.columns)
    text = views.ballot(session)
    assert text.count("<img") == 2
    assert not any(word in text for word in ("base", "one", "× 1", "file.safetensors"))
    assert not any(address in text for address in session.addresses.values())


def test_figures_and_rounds_of_an_earlier_comparison_are_not_taken_for_this_one(tmp_path):
    session = Sessions(tmp_path).of("a")
    request, cells = comparison()
    session.show(request, cells)
    session.measured = measure(request, cells, [], "sks")
    session.ballot = make_ballot(request, cells, *request.columns)
    assert "earlier comparison" not in views.ballot(session)
    session.show(*comparison())
    assert session.measured == []
    assert "earlier comparison" in views.ballot(session)


# ------------------------------------------------------------------------------------------ command and API


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    make_pipeline(folder / "base")
    for seed, name in enumerate(("lora", "reslora")):
        make_lora_file(folder / "runs" / name, folder / "base", seed)
    make_lora_file(folder / "runs" / "foreign", folder / "wide", 0, wide=True)
    (folder / "secret.txt").write_text("hidden words")
    return open_studio(
        folder / "base", (folder / "runs",), folder / "images", "a cat", train_dir=folder / "trained", first_steps=2
    )


@pytest.fixture(scope="module")
def address(studio):
    demo = launch(studio, prevent_thread_lock=True, quiet=True, server_port=None)
    yield demo.local_url
    demo.close()


FIELDS = ("a {x}", "x = cat, dog", "0-1", ["lora"], "0.5", True, "", 2, 4.0, "as saved")


def test_only_adapters_that_fit_are_offered(studio):
    assert [adapter.label for adapter in studio.sessions.adapters] == ["lora", "reslora"]
    assert len(studio.first_cells) == 6


def test_the_first_images_are_those_of_the_script_that_the_demo_generates_with(studio, tmp_path):
    asked = studio.first_request
    words = ["--pretrained_model_name_or_path", str(studio.bases.source(None)), "--output_dir", str(tmp_path)]
    words += ["--lora", *(f"{adapter.label}={adapter.path}" for adapter in asked.adapters)]
    words += ["--prompt", *asked.prompts, "--seed", *map(str, asked.seeds)]
    words += [f"--num_inference_steps={asked.num_inference_steps}", f"--guidance_scale={asked.guidance_scale}"]
    generate.main(generate.parse_args(words))
    for cell in studio.first_cells:
        name = cell.column.adapter.label if cell.column.adapter else generate.BASE
        with Image.open(tmp_path / name / f"0-{cell.row.seed}.png") as image:
            np.testing.assert_array_equal(np.asarray(cell.image), np.asarray(image))


def test_the_api_generates(address):
    client = program(address)
    found = client.predict(*FIELDS, api_name="/compare")
    assert (found["complete"], found["count"], len(found["images"])) == (True, 8, 8)
    last = found["images"][-1]
    assert (last["prompt"], last["seed"], last["column_label"]) == ("a dog", 1, "lora × 0.5")
    assert get(f"{address}{last['url'].removeprefix('/')}").headers["content-type"] == "image/png"
    assert CompareRequest.from_dict(found["settings"], dict.fromkeys(digests_in(found["settings"]), "")).seeds == (0, 1)
    with zipfile.ZipFile(client.predict(api_name="/zip")) as archive:
        assert len([name for name in archive.namelist() if name.startswith("images/")]) == 8


def test_the_api_goes_by_names(address):
    client = program(address)
    named = client.view_api(return_format="dict")["named_endpoints"]["/compare"]["parameters"]
    names = [parameter["parameter_name"] for parameter in named]
    assert names == [
        "prompts", "placeholders", "seeds", "adapters", "strengths", "include_base", "negative_prompt",
        "num_inference_steps", "guidance_scale", "scheduler",
        "columns_axis", "columns_values", "rows_axis", "rows_values", "strengths_first",
    ]  # fmt: skip
    asked = dict(zip(names, FIELDS, strict=False))
    found = client.predict(**dict(reversed(asked.items())), api_name="/compare")
    assert found["count"] == 8
    swept = client.predict("a cat", columns_axis="steps", columns_values="1, 2", api_name="/compare")
    assert [image["column_label"] for image in swept["images"]] == ["base · 1 step", "base · 2 steps"]
    client.predict(**asked, api_name="/compare")
    settings = json.loads(Path(client.predict(api_name="/settings")).read_text())
    assert [settings["num_inference_steps"], len(settings["images"])] == [2, 8]


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 200), ({"Host": "localhost:1"}, 200), ({"Host": "[::1]:7860"}, 200), ({"Host": "evil.example"}, 403),
     ({"Host": "127.0.0.1.evil.example"}, 403), ({"Host": "["}, 403), ({"Origin": "http://localhost:1"}, 200),
     ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403)],
)  # fmt: skip
def test_requests_under_foreign_names_are_refused(address, headers, status):
    answer = get(f"{address}config", headers=headers)
    assert answer.status_code == status
    upload = post(f"{address}gradio_api/upload", headers=headers, files={"files": ("a.txt", b"a")})
    assert upload.status_code == status
    preflight = {"Origin": "http://localhost:1", "Access-Control-Request-Method": "POST"} | headers
    assert httpx.options(f"{address}gradio_api/upload", headers=preflight, timeout=PATIENCE).status_code == status
    if status == 200:
        assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"
        assert "frame-ancestors 'self'" in answer.headers["Content-Security-Policy"]


def test_names_are_left_alone_where_others_are_to_look():
    assert Guard(None, None).foreign("gallery.example", "https://gallery.example") is None
    assert Guard(None, {*ALONE, "gallery.example"}).foreign("gallery.example", "https://gallery.example") is None


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [(0, "x" * 700, "700 characters"), (2, "0-9999", "images; at most 200"),
     (3, ["../../etc/passwd"], "is not here any more"), (4, "9", "strengths lie between"),
     (9, "nope", "schedulers are"), (0, "<b>{y}</b>", "nothing fills")],
)  # fmt: skip
def test_the_api_refuses_in_words(address, place, value, words):
    fields = list(FIELDS)
    fields[place] = value
    with pytest.raises(Exception, match=words) as caught:
        program(address).predict(*fields, api_name="/compare")
    assert "<b>" not in str(caught.value)


def test_two_visitors_at_once_get_their_own_images(address):
    def visit(word: str) -> str:
        client = program(address)
        return client.predict(word, "", "0-3", ["lora"], "1", *FIELDS[5:], api_name="/compare")["images"]

    words = ("cat", "dog", "cake")
    with ThreadPoolExecutor(len(words)) as pool:
        found = list(pool.map(visit, words))
    for word, images in zip(words, found, strict=True):
        assert [image["prompt"] for image in images] == [word] * 8


def test_only_the_comparison_and_its_files_are_an_api(address):
    client = program(address)
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/compare", *(f"/{kind}" for kind in KINDS)}
    with pytest.raises(Exception, match="compare something first"):
        client.predict(api_name="/sheet")


def test_a_password_is_asked_for_when_one_is_set(studio):
    demo = launch(studio, prevent_thread_lock=True, quiet=True, auth=("me", "secret"))
    try:
        assert get(f"{demo.local_url}config").status_code == 401
        with pytest.raises(Exception, match="(?i)auth|credentials"):
            program(demo.local_url)
        assert program(demo.local_url, auth=("me", "secret")).predict(*FIELDS, api_name="/compare")
    finally:
        demo.close()


def test_a_machine_that_is_busy_serves_the_page_all_the_same(studio, monkeypatch):
    """Gradio looks at the page itself, and ends the server where a busy machine takes more than 3 s to answer."""
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: False)
    demo = launch(studio, prevent_thread_lock=True, quiet=True)
    try:
        assert get(demo.local_url).status_code == 200
        assert get(f"{demo.local_url}config").json()["title"] == demo.title
    finally:
        demo.close()


def test_nothing_else_is_served(address, studio):
    secret = studio.sessions.root.parent / "secret.txt"
    for path in (secret, "/etc/passwd", studio.sessions.root / ".." / "secret.txt"):
        assert get(f"{address}gradio_api/file={path}").status_code == 403
    page = get(address).text
    assert "hidden words" not in page


def test_no_path_of_the_machine_is_taken_for_an_upload(address, studio):
    """Events that the page keeps to itself can still be sent by hand: a file that nobody uploaded is refused."""
    config = get(f"{address}config").json()
    labels = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
    hidden = studio.sessions.root.parent / "secret.txt"
    tried = 0
    for event in config["dependencies"]:
        kinds = [labels.get(number) for number in event["inputs"]]
        if not {"adapter_files", "saved_files", "card_file"} & set(kinds):
            continue
        file = {"path": str(hidden), "meta": {"_type": "gradio.FileData"}}
        values = {"adapter_files": [file], "saved_files": [file], "card_file": file}
        data = [values.get(kind, 0) for kind in kinds]
        asked = {"fn_index": event["id"], "session_hash": "me", "data": data}
        answer = post(f"{address}gradio_api/queue/join", json=asked)
        if answer.status_code == 200:
            stream = get(f"{address}gradio_api/queue/data", params={"session_hash": "me"}).text
            assert '"success": false' in stream or '"success":false' in stream
            assert "hidden words" not in stream
        tried += 1
    assert tried == 3


def event_of(address: str, output: str, trigger: str) -> int:
    """The number of the page's event with this output that this triggers."""
    config = get(f"{address}config").json()
    names = ((component["id"], component["props"]) for component in config["components"])
    ids = {props.get("elem_id") or props.get("id"): number for number, props in names}
    return next(
        event["id"]
        for event in config["dependencies"]
        if ids[output] in event["outputs"] and ids[trigger] in [target for target, _ in event["targets"]]
    )


def ask(address: str, event: int, data: list, visitor: str, **said: object) -> None:
    asked = {"fn_index": event, "session_hash": visitor, "data": data, "event_data": said}
    assert post(f"{address}gradio_api/queue/join", json=asked).status_code == 200


def answers_to(address: str, visitor: str) -> Iterator[list]:
    """What a visitor's events answer, in the order in which a browser gets it, until there is no event."""
    params = {"session_hash": visitor}
    with httpx.stream("GET", f"{address}gradio_api/queue/data", params=params, timeout=PATIENCE) as stream:
        for line in stream.iter_lines():
            said = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {"msg": ""}
            if said["msg"] == "process_completed":
                yield said["output"].get("data", [said["output"].get("error")])


def asked_of(address: str, output: str, trigger: str, data: list, visitor: str = "latest") -> list:
    """What an event of the page answers, sent as the browser would: by its output and what triggers it."""
    ask(address, event_of(address, output, trigger), data, visitor)
    [found] = answers_to(address, visitor)
    return found


def test_an_event_that_was_triggered_earlier_does_not_replace_the_answer_of_a_later_one(address):
    assert "sha256" in asked_of(address, "card", "files", [None, 5])[1]
    assert "sha256" in asked_of(address, "card", "card_adapter", ["lora", 20])[1]
    assert "value" not in asked_of(address, "card", "card_adapter", ["reslora", 10])[1]
    assert "reslora" in asked_of(address, "card", "card_adapter", ["reslora", 30])[1]


def test_an_event_without_outputs_that_comes_late_has_no_answer(address, recwarn):
    """Gradio warns of values that no output is for."""
    config = get(f"{address}config").json()
    [grid] = [c["id"] for c in config["components"] if c["props"].get("elem_id") == "grid"]
    [looked] = [e["id"] for e in config["dependencies"] if not e["outputs"] and [grid, "click"] in e["targets"]]
    for when in (20, 10):
        ask(address, looked, [when], "late", page=0)
        assert list(answers_to(address, "late")) == [[]]
    assert not [warning for warning in recwarn if "too many output values" in str(warning.message)]


def test_an_answer_that_is_overtaken_on_its_way_is_not_shown(address, monkeypatch):
    """Gradio prepares an answer in a thread, which may take longer than that of a later event."""
    event, prepare = event_of(address, "expected", "seeds"), gr.HTML.postprocess
    on_its_way, overtaken = threading.Event(), threading.Event()

    def held(html, value):
        if "2 images" in str(value):
            on_its_way.set()
            assert overtaken.wait(PATIENCE)
        return prepare(html, value)

    monkeypatch.setattr(gr.HTML, "postprocess", held)
    fields = [["lora"], *FIELDS[4:], "nothing more", "", "nothing more", "", False]
    ask(address, event, ["a", "", "0", *fields, 1], "overtaken")
    assert on_its_way.wait(PATIENCE)
    ask(address, event, ["a", "", "0-1", *fields, 2], "overtaken")
    answers = answers_to(address, "overtaken")
    assert "4 images" in next(answers)[0]
    overtaken.set()
    assert [*answers] == [[SKIP]]


def test_one_pair_has_one_vote_however_often_its_buttons_are_pressed(address, studio):
    session = studio.sessions.of("rater")
    session.show(studio.first_request, studio.first_cells)
    session.ballot = make_ballot(session.request, session.cells, *session.request.columns[1:3])
    for when, side in enumerate(("left", "right", "left")):  # all before the first answer has come
        answer = asked_of(address, "vote_pair", f"vote_{side}", [0, when], "rater")
        assert answer[-1] == 1
    assert len(session.ballot.votes) == 1


def test_another_round_leaves_the_votes_of_the_one_before(address, studio):
    session = studio.sessions.of("rounds")
    session.show(studio.first_request, studio.first_cells)
    session.visit = studio.visits.of("ab" * 16)
    session.visit.show(session.request, session.cells, "base", session.view)
    labels = [column.label for column in session.request.columns]

    def begun(first: str, second: str, rater: str, when: int) -> list:
        return asked_of(address, "vote_pair", "vote_begin", [first, second, "Which?", rater, when], "rounds")

    asked_of(address, "vote_first", "vote", [None, None, 0], "rounds")
    begun(*labels[1:], "Ann", 1)
    asked_of(address, "vote_pair", "vote_left", [0, 2], "rounds")
    begun(*labels[:2], "Bob", 3)
    begun(*labels[:2], "Bob", 4)  # the one before has no vote
    assert [len(ballot.votes) for ballot in session.visit.rounds(session.request, session.cells)] == [1, 0]
    result, button, _ = asked_of(address, "vote_result", "vote_reveal", [5], "rounds")
    assert button["value"]["orig_name"] == "votes.csv"
    assert session.ballot.seen == []
    asked_of(address, "vote_pair", "vote_tie", [0, 6], "rounds")
    result, button, _ = asked_of(address, "vote_result", "vote_reveal", [7], "rounds")
    assert f"{labels[1]} against {labels[2]}, 1 vote of Ann" in html.unescape(result)
    assert (button["label"], button["value"]["orig_name"]) == ("Votes .zip", "votes.zip")
    with zipfile.ZipFile(io.BytesIO(get(button["value"]["url"]).content)) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert [*files] == ["votes-1.csv", "votes-2.csv"]
    assert [[*read_votes({name: text}).by_rater] for name, text in files.items()] == [["Ann"], ["Bob"]]


def test_figures_of_images_that_were_replaced_meanwhile_are_refused(address, studio, monkeypatch):
    def slow(asked, cells, images, word):
        session = studio.sessions.open["measurer"]
        session.show(replace(asked, seeds=(8, 9)), [])
        return []

    session = studio.sessions.of("measurer")
    session.show(studio.first_request, studio.first_cells)
    monkeypatch.setattr("app.tabs.measures.measure", slow)
    fields = ["images of my own", None, "sks", "", ""]
    assert "measure again" in asked_of(address, "measures", "measure", [*fields, 1], "measurer")[0]
    assert session.measured == []


def test_the_command_refuses_before_it_loads(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--base", str(tmp_path), "--auth", "nobody", "--server_port", "99999", "--runs", "/no/such"])
    message = capsys.readouterr().err
    for words in ("no model_index.json", "a user and a password", "between 1 and 65535", "no folder"):
        assert words in message


@pytest.mark.parametrize(
    ("options", "warned"),
    [([], False), (["--share"], True), (["--server_name", "0.0.0.0"], True), (["--share", "--auth", "me:a:b"], False)],
)
def test_the_command_warns_when_others_can_look(studio, monkeypatch, capsys, options, warned):
    served = {}
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(studio.sessions.root))  # main sets its own
    monkeypatch.setattr("app.serve.open_studio", lambda *_, **__: studio)
    monkeypatch.setattr("app.serve.launch", lambda _, **given: served.update(given))
    main(["--base", str(studio.sessions.root.parent / "base"), *options])
    words = capsys.readouterr().err
    assert ("no password is asked for" in words) == warned
    assert ("passes through a relay" in words) == ("--share" in options) == served["share"]
    assert served["auth"] == (("me", "a:b") if "--auth" in options else None)


def test_the_command_listens_on_this_machine_alone(studio):
    base = studio.sessions.root.parent / "base"
    args = parse_args(["--base", str(base)])
    assert (args.server_name, args.share, args.auth) == ("127.0.0.1", False, None)


@pytest.mark.parametrize("kind", FIGURES)
def test_a_figure_holds_what_was_chosen_and_says_what_it_is_of(kind):
    request, cells = comparison("a $x$ panda")
    drawn = figure(request, cells, request.rows[:1], request.columns, "sticker-sd", kind, "2026-01-02")
    again = figure(request, cells, request.rows[:1], request.columns, "sticker-sd", kind, "2026-01-02")
    assert drawn == again
    if kind == "png":
        with Image.open(io.BytesIO(drawn)) as image:
            pixels = np.asarray(image.convert("RGB"))[::9, ::9].reshape(-1, 3)
        colours = set(map(tuple, pixels.tolist()))
        assert {cell.image.getpixel((0, 0)) for cell in cells[:2]} <= colours
        assert cells[-1].image.getpixel((0, 0)) not in colours, "the other row was not chosen"
    elif kind == "svg":
        text = re.sub("<[^>]*>", " ", drawn.decode())
        for words in ("sticker-sd", "dddddddddddd", "seeds 0.", "2026-01-02", "torch ", "one × 1", "a $x$ panda"):
            assert words in re.sub(r"\s+", " ", text), words
    else:
        assert drawn.startswith(b"%PDF")


def test_a_figure_of_nothing_is_refused():
    request, cells = comparison()
    with pytest.raises(ValueError, match="Choose rows and columns"):
        figure(request, cells, [], request.columns, "base", "png")
