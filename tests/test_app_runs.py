"""What training runs left behind: found, read while they are written, drawn, and refused when broken."""

import csv
import dataclasses
import io
import json
import os
import re

import pytest
from PIL import Image

from app import run_views
from app.charts import chart, curves_csv, curves_svg, panels
from app.request import CompareRequest
from app.runs import (
    MAX_POINTS,
    METRICS,
    find_adapters,
    find_runs,
    labelled,
    read_run,
    siblings,
    thinned,
)
from app.sessions import MAX_THUMBNAILS, Sessions
from app.studio import PROMPT, first_guidance, first_options, first_prompt, first_subject, subjects_in
from app_fixtures import make_run
from dreambooth import demo

NASTY = "<img src=x onerror=alert(1)>"


@pytest.fixture
def race(tmp_path):
    """demo/lora, demo/reslora, and runs/other."""
    make_run(tmp_path / "demo" / "lora", "lora")
    make_run(tmp_path / "demo" / "reslora", "reslora", "input", seed=1)
    make_run(tmp_path / "runs" / "other", "lora", seed=2)
    return tmp_path


def test_runs_are_found_below_their_roots_and_nowhere_else(race):
    roots = (race / "demo", race / "runs", race / "absent")
    runs = find_runs(roots)
    assert list(runs) == ["lora", "reslora", "other"]
    assert siblings(runs) == ["lora", "reslora"]
    outside = make_run(race / "secret", "lora")
    (race / "runs" / "way-out").symlink_to(outside)
    (race / "runs" / "other" / METRICS).unlink()
    (race / "runs" / "other" / METRICS).symlink_to(outside / METRICS)
    assert list(find_runs(roots)) == ["lora", "reslora"]


def test_two_runs_of_one_name_get_two_labels(race):
    make_run(race / "runs" / "lora", "lora")
    assert list(find_runs((race / "demo", race / "runs"))) == ["lora", "reslora", "runs/lora", "other"]
    assert list(labelled((race / "demo" / "lora",), METRICS)) == ["lora"]


def test_no_run_takes_the_label_of_another(tmp_path):
    roots = tuple(tmp_path / place / "runs" for place in "abc")
    folders = [make_run(root / "lora", "lora", steps=1) for root in roots]
    assert find_runs(roots) == dict(zip(("lora", "runs/lora", "runs/lora 2"), folders, strict=True))


def test_samples_stand_in_the_row_of_their_prompt(race):
    """Runs number their prompts each for itself."""
    options = {"validation_prompt": ["a dog", "a bird"]}
    (race / "demo" / "reslora" / "run.json").write_text(json.dumps({"options": options}))
    runs = [read_run(label, folder) for label, folder in find_runs((race / "demo",)).items()]
    table = run_views.samples(runs, 40, lambda path: f"/{path.parent.parent.parent.name}/{path.name}")
    rows = [row for row in table.split('<tr role="row">') if "rowheader" in row]
    shown = {re.search(r'title="(.*?)"', row)[1]: re.findall(r'src="(.*?)"', row) for row in rows if "image 1" in row}
    assert shown == {
        "a cat": ["/lora/0-0.png"],
        "a dog": ["/lora/1-0.png", "/reslora/0-0.png"],
        "a bird": ["/reslora/1-0.png"],
    }


def test_runs_and_checkpoints_are_in_the_order_of_names_and_numbers(tmp_path):
    names = ["run", "run/checkpoint-20", "run/checkpoint-100", "run 2", "run-2", "run-10", "run.old"]
    for name in reversed(names):
        make_run(tmp_path / name, name, steps=1)
    assert list(find_runs((tmp_path,))) == names


def test_adapters_of_checkpoints_come_last_in_the_order_of_their_steps(race):
    for place in ("checkpoint-100", "checkpoint-20", "."):
        (race / "demo" / "lora" / place).mkdir(exist_ok=True)
        (race / "demo" / "lora" / place / "pytorch_lora_weights.safetensors").touch()
    (race / "runs" / "other" / "pytorch_lora_weights.safetensors").touch()
    wanted = ["lora", "other", "lora/checkpoint-20", "lora/checkpoint-100"]
    assert list(find_adapters((race / "demo", race / "runs"))) == wanted


def test_a_run_is_read_as_the_trainer_wrote_it(race):
    run = read_run("reslora", race / "demo" / "reslora")
    assert run.method == "reslora input"
    assert [step for step, _ in run.losses] == list(range(1, 41))
    assert run.validation == [(step, 0.1 + 0.3 / step) for step in (10, 20, 30, 40)]
    assert run.merge.gap == pytest.approx(0.01)
    assert list(run.samples) == [0, 10, 20, 30, 40]
    assert (run.step_shown(25), run.step_shown(-1)) == (20, None)
    assert run.smoothed(0.0) == run.losses


def with_estimates(folder, estimates: dict[int, float], report: dict) -> None:
    lines = [{"step": step, "validation_loss": 0.2, "merge_gap": gap} for step, gap in estimates.items()]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "merge_report.json").write_text(json.dumps(report))


def test_the_merge_gap_is_one_number_in_chart_and_table(race):
    """The last estimate while training may be another than the gap of the export, which comes after a better merge."""
    folder = race / "demo" / "reslora"
    with_estimates(folder, {10: 0.05, 20: 0.04}, {"loss_trained": 0.2, "loss_merged": 0.21, "step": 20})
    run = read_run("reslora", folder)
    assert run.gaps == [(10, 0.05), (20, pytest.approx(0.01))]
    assert run_views.said_gap(run.gaps[-1][1]) in run_views.merges([run])
    assert panels([run], 0.9)[-1].name == "merge_gap"
    with_estimates(folder, {10: -3e-8, 20: 0.0}, {"loss_trained": 0.2, "loss_merged": 0.2 + 6e-8, "step": 20})
    assert all(panel.name != "merge_gap" for panel in panels([read_run("reslora", folder)], 0.9))


def test_a_report_is_of_its_own_step_when_training_has_gone_on(race):
    folder = race / "demo" / "reslora"
    with_estimates(folder, {10: 0.05, 20: 0.04, 30: 0.03}, {"loss_trained": 0.2, "loss_merged": 0.21, "step": 20})
    run = read_run("reslora", folder)
    assert (run.last_step, run.merged_at) == (30, 20)
    assert run.gaps == [(10, 0.05), (20, pytest.approx(0.01)), (30, 0.03)]
    assert "<td class=short>20</td>" in run_views.merges([run])
    (folder / "merge_report.json").write_text('{"loss_trained": 0.2, "loss_merged": 0.21}')
    assert read_run("reslora", folder).merged_at == 30


def test_smoothing_is_the_moving_average_without_bias(race):
    run, keep = read_run("lora", race / "demo" / "lora"), 0.9
    for n, (_, smoothed) in enumerate(run.smoothed(keep), start=1):
        weights = [keep ** (n - 1 - i) for i in range(n)]
        expected = sum(w * loss for w, (_, loss) in zip(weights, run.losses, strict=False)) / sum(weights)
        assert smoothed == pytest.approx(expected)


def test_a_run_under_way_is_read_as_far_as_it_is(race):
    folder = race / "demo" / "lora"
    for name in ("merge_report.json", "run.json"):
        (folder / name).unlink()
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 41, "lo')
    (folder / "samples" / "step-000040" / "1-1.png").write_bytes(b"half an image")
    run = read_run("lora", folder)
    assert (run.last_step, run.merge, run.method) == (40, None, "not said")
    session = Sessions(race / "images").of("a")
    table = run_views.samples([run], 40, session.thumbnail)
    assert table.count("<img") == 3
    assert table.count("no sample") == 1
    assert "not yet" in run_views.merges([run])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (METRICS, "{}\n{}", "line 1 is no row"),
        (METRICS, '{"step": 1, "loss": 2}\nnonsense\n', "line 2 is no row"),
        (METRICS, '{"step": true}\n', "line 1 is no row"),
        (METRICS, '{"step": 1' + "0" * 400 + "}\n", "line 1 is no row"),
        (METRICS, "[" * 100_000 + "\n", "line 1 is no row"),
        (METRICS, '{"step": 1, "name": "\\ud800"}\n', "line 1 is no row"),
        ("run.json", "[" * 100_000, "no JSON"),
        ("run.json", '{"options": {"method": "\\udfff"}}', "no JSON"),
        ("merge_report.json", '{"loss_base": "low"}', "lacks loss_trained"),
        ("merge_report.json", "[1]", "no object"),
        ("run.json", "{", "no JSON"),
    ],
)
def test_broken_files_of_a_run_are_named(race, name, content, words):
    (race / "demo" / "lora" / name).write_text(content)
    with pytest.raises(ValueError, match=f"lora/{name}.*{words}"):
        read_run("lora", race / "demo" / "lora")


def test_what_is_not_finite_is_not_drawn(race):
    with (race / "demo" / "lora" / METRICS).open("a") as file:
        file.write('{"step": 41, "loss": NaN}\n{"step": 42, "loss": "high"}\n')
        file.write(f'{{"step": 43, "loss": 1{"0" * 400}}}\n{{"step": 44, "loss": 1e999}}\n\n')
    assert read_run("lora", race / "demo" / "lora").last_step == 40


def test_long_curves_are_thinned_and_keep_their_ends():
    curve = [(step, 1.0) for step in range(100_000)]
    short = thinned(curve)
    assert len(short) <= MAX_POINTS + 1
    assert (short[0], short[-1]) == (curve[0], curve[-1])
    assert thinned([]) == []


# ------------------------------------------------------------------------------------------------------ looks


def rows_of(spec: dict) -> list[list[dict]]:
    """Values of each layer; Altair writes equal ones once."""
    return [spec["datasets"][layer["data"]["name"]] for layer in spec["layer"]]


def test_charts_hold_every_run_and_can_be_hovered_and_zoomed(race):
    runs = [read_run(label, folder) for label, folder in find_runs((race / "demo",)).items()]
    loss, validation = panels(runs, 0.9)
    assert (loss.name, validation.name) == ("loss", "validation_loss")
    spec = chart(validation).to_dict()
    json.dumps(spec)
    faint, bold, dots, ends = rows_of(spec)
    assert faint == []
    assert bold == dots
    assert {row["run"] for row in bold} == {"lora", "reslora"}
    assert [row["validation_loss"] for row in ends] == [run.merge.exported for run in runs]
    assert "scales" in [param.get("bind") for param in spec["params"]]
    assert any(param["select"].get("nearest") for param in spec["params"])
    assert any("tooltip" in layer["encoding"] for layer in spec["layer"])
    raw = rows_of(chart(loss).to_dict())[0]
    assert [row["loss"] for row in raw if row["run"] == "lora"] == [value for _, value in runs[0].losses]
    assert panels([read_run("none", race)], 0.9) == []


def test_a_curve_of_one_step_is_a_point(race):
    long = read_run("lora", race / "demo" / "lora")
    first = dataclasses.replace(long, label="first", losses=long.losses[:1])
    [loss, *_] = panels([long, first], 0.9)
    spec = chart(loss).to_dict()
    dots = rows_of(spec)[2]
    assert [row["run"] for row in dots if row.get("alone")] == ["first"]
    assert {"test": "datum.alone", "value": 1} in spec["layer"][2]["encoding"]["opacity"]["condition"]
    assert curves_svg([first], 0.9).count("<use") > curves_svg([long], 0.9).count("<use")


def test_thousands_of_steps_of_many_runs_are_drawn(race):
    """Altair refuses more than 5,000 rows of a table unless they are inline."""
    run = dataclasses.replace(read_run("lora", race / "demo" / "lora"), losses=[(s, 1.0) for s in range(100_000)])
    runs = [dataclasses.replace(run, label=str(number)) for number in range(8)]
    assert len(rows_of(chart(panels(runs, 0.9)[0]).to_dict())[0]) > 5000


def test_curves_are_taken_away_as_svg_and_csv(race):
    runs = [read_run(label, folder) for label, folder in find_runs((race / "demo",)).items()]
    runs[0] = dataclasses.replace(runs[0], label="=1+1 $x")
    drawing = curves_svg(runs, 0.9)
    assert drawing.count("<svg") == 1
    for words in ("Training loss", "Fixed-noise validation loss", "=1+1 $x", "#0d9488", "#ea580c"):
        assert words in drawing
    lines = list(csv.DictReader(io.StringIO(curves_csv(runs, 0.9))))
    assert lines[0] == {"run": "'=1+1 $x", "curve": "loss", "step": "1", "value": str(runs[0].losses[0][1])}
    curves = [line["curve"] for line in lines if line["run"] == "reslora"]
    assert curves.count("loss") == curves.count("loss, smoothed") == 40
    assert curves.count("validation_loss") == 4
    assert curves.count("validation_loss, as exported") == 1
    assert "<svg" in curves_svg([], 0.9)


def test_words_of_runs_are_escaped(race):
    folder = race / "demo" / "lora"
    options = {"method": NASTY, "validation_prompt": [NASTY, NASTY]}
    (folder / "run.json").write_text(json.dumps({"options": options}))
    run = read_run(NASTY, folder)
    texts = [run_views.legend([run]), run_views.merges([run]), run_views.log([NASTY])]
    texts += [run_views.samples([run], 40, lambda _: "/x"), run_views.sample_history(run, lambda _: "/x")]
    texts.append(run_views.progress(1, 2, NASTY))
    for text in texts:
        assert NASTY not in text
        assert "onerror=alert(1)" in text


def test_samples_of_one_step_stand_beside_each_other(race):
    runs = [read_run(label, folder) for label, folder in find_runs((race / "demo",)).items()]
    table = run_views.samples(runs, 25, lambda path: f"/{path.parent.name}/{path.name}")
    assert table.count("/step-000020/") == 8
    assert table.index("a cat") < table.index("a dog")
    assert "step 20" in table
    history = run_views.sample_history(runs[0], lambda path: f"/{path.parent.name}/{path.name}")
    assert history.index("step 40") < history.index("step 0<")


def test_thumbnails_are_small_copies_made_once_and_bounded(race, monkeypatch):
    session = Sessions(race / "images").of("a")
    large = race / "large.png"
    Image.new("RGB", (2000, 1000)).save(large)
    address = session.thumbnail(large)
    assert session.thumbnail(large) == address
    with Image.open(address.partition("=")[2]) as small:
        assert small.size == (384, 192)
    assert session.thumbnail(race / "absent.png") is None
    assert MAX_THUMBNAILS > 100
    monkeypatch.setattr("app.sessions.MAX_THUMBNAILS", 1)
    session.thumbnail(race / "demo" / "lora" / "samples" / "step-000000" / "0-0.png")
    assert len(list((session.folder / "samples").iterdir())) == 1


def test_the_first_subject_is_the_one_that_was_taught(race):
    for name in ("sun_hat", "teapot"):
        (race / "subjects" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(race / "subjects" / name / "0.png")
    subjects = subjects_in(race / "subjects")
    assert list(subjects) == ["sun hat", "teapot"]
    options = {"instance_data_dir": str(race / "subjects" / "teapot")}
    (race / "demo" / "lora" / "run.json").write_text(json.dumps({"options": options}))
    assert first_subject(first_options((race / "demo",)), subjects) == "teapot"
    assert first_subject({}, subjects) == "sun hat"
    assert first_subject({"instance_data_dir": "/elsewhere"}, subjects) is None
    assert first_subject({}, {}) is None
    assert subjects_in(race / "absent") == {}


def test_the_first_prompt_is_what_was_taught(race):
    assert first_prompt(first_options((race / "absent",))) == PROMPT
    assert first_prompt({"instance_prompt": "a sticker of sks animal"}) == PROMPT
    assert first_prompt({"instance_prompt": "a photo of sks dog"}) == "a photo of sks dog"
    assert first_prompt({"instance_prompt": None}) == PROMPT
    for taught in ("a {subject}", "{", "x" * 601, "two\nlines", "\ud800"):
        assert first_prompt({"instance_prompt": taught}) == PROMPT


@pytest.mark.parametrize(
    ("said", "wanted"), [(7.5, 7.5), (0, 0), (None, 2.5), ("x", 2.5), (-1, 2.5), (1e9, 2.5), (float("nan"), 2.5)]
)
def test_the_first_guidance_is_that_of_the_runs_own_images(said, wanted):
    assert first_guidance({"validation_guidance_scale": said}) == wanted
    assert first_guidance({}) == demo.parse_args([]).guidance_scale == CompareRequest.guidance_scale == 2.5


def test_a_broken_run_does_not_keep_the_page_from_starting(race, capsys):
    (race / "demo" / "lora" / "run.json").write_text("[" * 100_000)
    assert first_options((race / "demo",))["method"] == "reslora"
    assert "lora/run.json is no JSON" in capsys.readouterr().out


def test_a_language_models_run_is_shown_without_the_bases_loss(race):
    folder = race / "demo" / "lora"
    (folder / "merge_report.json").write_text(json.dumps({"loss_trained": 1.5, "loss_merged": 1.75}))
    run = read_run("lora", folder)
    assert (run.merge.base, run.merge.gap) == (None, 0.25)
    assert "–" in run_views.merges([run])


def test_a_run_that_vanishes_while_the_folder_is_read_hides_no_other(tmp_path, monkeypatch):
    make_run(tmp_path / "stays", "lora")
    make_run(tmp_path / "vanishes", "lora")
    scan = os.scandir

    def gone(path):
        if os.fspath(path).endswith("vanishes"):
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", gone)
    assert list(find_runs((tmp_path,))) == ["stays"]
