"""Training from the page: what is asked becomes a configuration file, a process, and an adapter to compare."""

import dataclasses
import io
import os
import time
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from app.forms import read_train_request
from app.images import MAX_SIDE, images_in, read_images
from app.run_views import search, standing, training_status
from app.runs import ADAPTER, read_run
from app.trainer import CONFIG, LOG_LINES, PROCESS, Trainer, slug
from app.training import Method, TrainLimits, TrainRequest, options_of, request_problems
from app_fixtures import make_pipeline
from reslora_diffusion.diffusion.data.scan import open_upright
from reslora_diffusion.diffusion.options import known_flags, parse
from reslora_diffusion.diffusion.options.checks import check
from reslora_diffusion.utils.names import file_name_problem
from test_utils_images import WIDE

# Behaves as the script does towards its caller: rows, a bar, an end on SIGTERM after the step under way.
STAND_IN = """
import json, signal, sys, time, yaml
from pathlib import Path
options = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
folder, told = Path(options["output_dir"]), []
if options["learning_rate"] > 0.5:
    sys.exit("the loss of step 1 is nan")
signal.signal(signal.SIGTERM, lambda *_: told.append(1) or signal.signal(signal.SIGTERM, signal.SIG_DFL))
for step in range(1, options["max_train_steps"] + 1):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step}) + "\\n")
    print(f"\\rtraining: {step}", end="", flush=True)
    time.sleep(0.02)
    if told:
        break
print("\\nsaved")
"""
IMAGE = Image.new("RGB", (64, 64), "teal")
ASKED = TrainRequest("a photo of sks cat", max_train_steps=5, validation_prompt=("a cat", "a dog"))


@pytest.fixture
def trainer(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STAND_IN)
    trainer = Trainer(tmp_path / "trained", "base", 64, script)
    yield trainer
    trainer.close()


def wait(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("method", list(Method))
def test_every_option_is_one_of_the_scripts(method, tmp_path):
    asked = dataclasses.replace(ASKED, method=method, class_prompt="a photo of a cat")
    options = options_of(asked, "base", 64, tmp_path)
    assert {f"--{name}" for name in options} <= set(known_flags())
    if method is Method.PAIR:
        assert options["compare"] == ["lora", "reslora-block"]
    else:
        assert options["method"] == ("lora" if method is Method.LORA else "reslora")
        assert ("shortcut" in options) == (method is not Method.LORA)
    assert options["with_prior_preservation"] is True


def test_class_images_and_samples_only_where_asked_for(tmp_path):
    options = options_of(dataclasses.replace(ASKED, validation_prompt=()), "base", 64, tmp_path)
    assert not {"class_prompt", "with_prior_preservation", "validation_prompt"} & options.keys()


def test_everything_wrong_is_said_at_once(trainer):
    bad = TrainRequest(
        "", max_train_steps=0, rank=999, learning_rate=0.0, train_batch_size=0, seed=-1, class_prompt="x" * 999
    )
    with pytest.raises(ValueError, match="Nothing was started") as caught:
        trainer.start(bad, [], "me")
    for words in ("0 images", "no prompt", "steps", "rank", "batch size", "learning rate", "999 characters", "seed"):
        assert words in str(caught.value)
    assert not trainer.root.exists()
    assert request_problems(ASKED, 1, trainer.limits) == []


def test_the_tabs_fields_are_read_and_empty_numbers_named():
    fields = [" a cat ", "ResLoRA, block", 5, "one\n\n two ", 4, 1e-4, 2, False, "", 9, 3, " My Run "]
    asked = read_train_request(*fields)
    assert (asked.instance_prompt, asked.method, asked.validation_prompt) == ("a cat", Method.BLOCK, ("one", "two"))
    fields[2] = fields[5] = fields[10] = None
    with pytest.raises(ValueError, match=r"(?s)steps is empty.*learning rate is empty.*seed is empty"):
        read_train_request(*fields)


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "C:\\x", "a" * 500, "..", "☃", "con", "猫 1"])
def test_no_name_leads_out_of_the_folder(trainer, name):
    folder = trainer.new_folder(dataclasses.replace(ASKED, name=name))
    assert folder.parent == trainer.root
    assert slug(folder.name) == folder.name
    assert file_name_problem(folder.name) is None
    assert (folder.name == "猫-1") == (name == "猫 1")


def test_a_search_is_for_one_method_and_holds_images_out(trainer):
    asked = dataclasses.replace(ASKED, tune=True, method=Method.PAIR)
    with pytest.raises(ValueError, match=r"(?s)two different images or more.*one method"):
        trainer.start(asked, [IMAGE], "me")
    assert request_problems(dataclasses.replace(ASKED, tune=True), 2, trainer.limits) == []


def test_a_search_goes_before_the_training_and_its_plot_is_shown(trainer, tmp_path):
    make_pipeline(tmp_path / "base")
    trainer.base = str(tmp_path / "base")
    asked = dataclasses.replace(ASKED, tune=True, rank=2, max_train_steps=40, validation_prompt=(), train_batch_size=1)
    asked = dataclasses.replace(asked, train_text_encoder=False)
    images = [Image.new("RGB", (64, 64), colour) for colour in ("teal", "red", "blue")]
    training = trainer.start(asked, images, "me")
    assert training.is_searching
    assert standing(training) == "searching learning rate and alpha"
    assert search(training, lambda path, side: str(path)) == ""
    wait(lambda: not training.running, 240)
    assert training.finished, training.log()
    assert not training.is_searching
    found = yaml.safe_load((training.folder / "tune" / "run.yaml").read_text())
    assert not {"keep_best", "validation_split"} & set(found), "the training has all images"
    assert found["output_dir"] == str(training.folder)
    assert training.step() == 40  # the stand-in trained with that file
    assert f"{training.folder / 'tune' / 'tune.png'}" in search(training, lambda path, side: str(path))
    training.note(stopped=True)
    again = trainer.resume(training)  # without a search: it has ended
    assert not again.is_searching
    wait(lambda: not again.running)
    assert "trial" not in "".join(again.log()[-2:])


# --------------------------------------------------------------------------------------------------- images


def test_images_are_upright_small_and_white_behind(tmp_path):
    turned = Image.new("RGB", (20, 10))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4000, 2000)).save(tmp_path / "large.png")
    clear, large, upright = read_images(images_in(tmp_path), 3)
    assert upright.size == (10, 20)
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert large.size == (MAX_SIDE, MAX_SIDE // 2)


def test_images_are_converted_as_the_trainer_converts_them(tmp_path):
    """Grey of 16 bits keeps its shades, and a colour profile is followed."""
    ramp = Image.new("I;16", (4, 1))
    ramp.putdata([0, 16_000, 32_000, 65_535])
    ramp.save(tmp_path / "grey.png")
    Image.new("RGB", (4, 4), (120, 220, 90)).save(tmp_path / "wide.png", icc_profile=WIDE)
    grey, wide = read_images(images_in(tmp_path), 3)
    assert [grey.getpixel((x, 0))[0] for x in range(4)] == [0, 62, 125, 255]
    assert wide.getpixel((0, 0)) == open_upright(tmp_path / "wide.png").getpixel((0, 0))
    assert wide.getpixel((0, 0))[0] < 60, "no longer the numbers of the file"


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x80\x04 pickle")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"no images: a\.png$"):
        read_images(images_in(tmp_path), 3)
    with pytest.raises(ValueError, match="at most 1"):
        read_images(images_in(tmp_path), 1)


def outcome(path: str) -> Image.Image | str:
    """The image, or what is said of it."""
    try:
        return read_images([path], 1)[0]
    except ValueError as problem:
        return str(problem)


def test_damaged_and_foreign_images_are_named_and_nothing_else_is_raised(tmp_path):
    good = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(good, "PNG")
    Image.new("F", (2, 2)).save(tmp_path / "float.tiff")
    (tmp_path / "float.tiff").rename(tmp_path / "float.png")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for place in range(8, len(good.getvalue()), 3):
        content = bytearray(good.getvalue())
        content[place] ^= 0xFF
        (tmp_path / f"{place:03}.png").write_bytes(content)
    named = {Path(path).name for path in images_in(tmp_path) if isinstance(outcome(path), str)}
    assert {"float.png", "script.png"} < named
    with pytest.raises(ValueError, match=r"float\.png \(floating point.*, script\.png$"):
        read_images([str(tmp_path / "float.png"), str(tmp_path / "script.png")], 2)


# ---------------------------------------------------------------------------------------------------- process


def test_a_training_runs_to_its_end_and_can_be_read(trainer):
    training = trainer.start(ASKED, [IMAGE] * 3, "me")
    assert len(images_in(training.folder / "images")) == 3
    assert trainer.of("me") == [training]
    assert trainer.of("somebody else") == trainer.of("") == []
    training.process.wait(60)
    assert not training.failed
    assert training.step() == 5
    assert "5 steps done" in training_status(training)
    assert training.log() == ["training: 5", "saved"]
    assert read_run("x", training.folder).last_step == 5
    assert training.folder.name == "sks-cat-reslora-block"
    assert trainer.start(ASKED, [IMAGE], "me").folder.name == "sks-cat-reslora-block-2"


def test_one_at_a_time_and_stopped_on_request(trainer):
    training = trainer.start(dataclasses.replace(ASKED, max_train_steps=100_00), [IMAGE], "me")
    wait(lambda: training.step() > 3)
    assert "step" in training_status(training)
    with pytest.raises(ValueError, match="one at a time"):
        trainer.start(ASKED, [IMAGE], "you")
    assert training.seconds_left(training.step() + 1) > 0
    training.stop()
    training.process.wait(60)
    assert training.log()[-1] == "saved"
    assert not training.failed
    assert "was stopped at step" in training_status(training)


def test_the_servers_end_ends_the_training(trainer):
    training = trainer.start(dataclasses.replace(ASKED, max_train_steps=100_00), [IMAGE], "me")
    wait(lambda: training.step() > 0)
    trainer.close()
    assert not training.running
    assert training.log()[-1] == "saved"


def test_what_became_of_a_training_is_said_as_it_is(trainer):
    training = trainer.start(ASKED, [IMAGE], "me")
    training.process.wait(60)
    assert "no adapter was written" in training_status(training)
    (training.folder / "checkpoint-3").mkdir()
    (training.folder / "checkpoint-3" / ADAPTER).touch()
    assert f"{training.folder.name}/checkpoint-3 is offered" in training_status(training)
    (training.folder / ADAPTER).touch()
    assert f"{training.folder.name} is offered" in training_status(training)


def test_a_training_that_was_killed_says_so(trainer):
    training = trainer.start(dataclasses.replace(ASKED, max_train_steps=100_00), [IMAGE], "me")
    wait(lambda: training.step() > 0)
    training.process.kill()
    training.process.wait(60)
    assert training.failed
    assert "was killed from outside (SIGKILL)" in training_status(training)


def test_another_server_finds_a_training_stops_it_and_goes_on_with_it(trainer):
    """As after a crash of the server: what the folder says is all that is known."""
    asked = dataclasses.replace(ASKED, max_train_steps=100_00)
    training = trainer.start(asked, [IMAGE], "me")
    wait(lambda: training.step() > 3)
    other = Trainer(trainer.root, "base", 64, trainer.script)
    (found,) = other.of("me")
    assert found.running
    assert other.of("somebody else") == []
    assert "step" in standing(found)
    with pytest.raises(ValueError, match="one at a time"):
        other.start(ASKED, [IMAGE], "you")
    found.stop()
    training.process.wait(60)
    assert not found.running
    assert "was stopped at step" in training_status(found)
    resumed = other.resume(found)
    assert "resume_from_checkpoint" in " ".join(psutil.Process(resumed.process.pid).cmdline())
    assert other.of("me") == [resumed]
    wait(lambda: len(resumed.log()) > 1)
    resumed.process.kill()
    resumed.process.wait(60)
    (unseen,) = Trainer(trainer.root, "base", 64, trainer.script).of("me")
    assert unseen.failed
    assert "it was killed, or the machine stopped" in training_status(unseen)


def test_a_process_with_the_number_of_another_is_not_taken_for_it(trainer):
    training = trainer.start(ASKED, [IMAGE], "me")
    training.process.wait(60)
    training.note(pid=os.getpid())
    (found,) = Trainer(trainer.root, "base", 64, trainer.script).of("me")
    assert not found.running
    found.stop()  # this test goes on


def test_a_finished_training_is_not_resumed_and_a_damaged_record_is_no_training(trainer):
    training = trainer.start(ASKED, [IMAGE], "me")
    training.process.wait(60)
    with pytest.raises(ValueError, match="has done all its steps"):
        trainer.resume(training)
    (training.folder / PROCESS).write_text('{"owner": 1')
    assert Trainer(trainer.root, "base", 64, trainer.script).of("me") == []


def test_a_failure_shows_what_the_script_said(trainer):
    training = trainer.start(dataclasses.replace(ASKED, learning_rate=0.9), [IMAGE], "me")
    training.process.wait(60)
    assert training.failed
    assert "the loss of step 1 is nan" in training_status(training)
    assert len(training.log()) <= LOG_LINES
    assert training.adapters() == []


# ------------------------------------------------------------------------------------------------- the script


def test_the_script_takes_the_configuration(trainer, tmp_path):
    make_pipeline(tmp_path / "base")
    trainer.base = str(tmp_path / "base")
    training = trainer.start(dataclasses.replace(ASKED, method=Method.BLOCK), [IMAGE] * 2, "me")
    args = parse(["--config", str(training.folder / CONFIG)])
    assert (args.shortcut, args.validation_prompt, args.problems) == ("block", ["a cat", "a dog"], [])
    assert check(args).max_train_steps == 5


@pytest.mark.slow
def test_a_real_training_ends_in_an_adapter_that_fits(tmp_path):
    from app.compare import Comparer, load_pipeline

    make_pipeline(tmp_path / "base")
    trainer = Trainer(tmp_path / "trained", str(tmp_path / "base"), 64)
    training = trainer.start(dataclasses.replace(ASKED, max_train_steps=4, validation_prompt=("a cat",)), [IMAGE], "me")
    training.process.wait(300)
    assert not training.failed, "\n".join(training.log())
    run = read_run("real", training.folder)
    assert len(run.losses) == 4
    assert run.validation
    assert set(run.samples[4]) == {"0-0.png", "0-1.png"}
    assert run.prompts == ("a cat",)
    assert run.merge is not None
    assert run.merge.step == run.merged_at == 4
    card = Comparer(load_pipeline(tmp_path / "base")).shelf.card(training.adapters()[0])
    assert card.fits, card.mismatches
    assert (training.folder / CONFIG).is_file()


def test_a_pair_is_trained_on_equal_terms_and_both_are_offered(tmp_path):
    from app.compare import Comparer, load_pipeline

    make_pipeline(tmp_path / "base")
    trainer = Trainer(tmp_path / "trained", str(tmp_path / "base"), 64)
    asked = dataclasses.replace(ASKED, method=Method.PAIR, max_train_steps=3, validation_prompt=(), rank=2)
    training = trainer.start(asked, [IMAGE], "me")
    training.process.wait(300)
    assert not training.failed, "\n".join(training.log())
    assert (training.step(), training.total_steps) == (6, 6)
    assert [folder.name for folder in training.runs()] == ["lora", "reslora-block"]
    first, second = (read_run(folder.name, folder) for folder in training.runs())
    assert first.losses[0] == pytest.approx(second.losses[0]), "the same draws, and neither has learned yet"
    assert (first.method, second.method) == ("lora", "reslora block")
    shelf = Comparer(load_pipeline(tmp_path / "base")).shelf
    assert [shelf.card(file).fits for file in training.adapters()] == [True, True]
    assert "sks-cat-lora-then-reslora/lora and sks-cat-lora-then-reslora/reslora-block" in training_status(training)


def test_methods_of_the_family_reach_the_script_and_what_does_not_compose_is_said(tmp_path):
    asked = dataclasses.replace(ASKED, optimizer="rite", schedule="coto")
    assert request_problems(asked, 1, TrainLimits()) == []
    options = options_of(asked, "base", 64, tmp_path)
    assert (options["optimizer"], options["schedule"]) == ("rite", "coto")
    assert not {"optimizer", "schedule", "use_dora"} & options_of(ASKED, "base", 64, tmp_path).keys()
    bad = dataclasses.replace(ASKED, method=Method.INPUT, schedule="restart", optimizer="nope")
    problems = "\n".join(request_problems(bad, 1, TrainLimits()))
    assert "schedule restart: a finished link is frozen" in problems
    assert "there is no optimizer nope" in problems
    bad = dataclasses.replace(ASKED, method=Method.MIDDLE, optimizer="rite", use_dora=True)
    first, second = (problem for problem in request_problems(bad, 1, TrainLimits()) if "optimizer rite" in problem)
    assert "with `middle` one lora_B" in first
    assert "DoRA's magnitude" in second
    pair = dataclasses.replace(ASKED, method=Method.PAIR, schedule="fold")
    assert any("no shortcut to fold" in problem for problem in request_problems(pair, 1, TrainLimits()))
