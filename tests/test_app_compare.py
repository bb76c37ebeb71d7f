"""compare(request): what each cell was generated with, and that nothing else was; requests that are refused."""

import dataclasses
import functools
import json
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.adapters import AdapterShelf
from app.bases import Bases
from app.compare import Comparer, load_pipeline
from app.request import (
    MOST_SAID,
    Adapter,
    Column,
    CompareRequest,
    Limits,
    Scheduler,
    checked,
    digests_in,
    filled,
    image_count,
    joined,
    problems,
)
from app_fixtures import make_lora_file, make_pipeline
from original_layout import write_single_file
from reslora_diffusion.diffusion.train.race import app_settings
from tiny import tiny_pipeline_flux
from tiny_families import tiny_flux_2_klein, tiny_qwen_image, tiny_z_image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def files(folder) -> dict[str, Path]:
    parts = {"one": ("unet", "text_encoder"), "two": ("unet",)}
    return {
        name: make_lora_file(folder / name, folder / "base", seed, parts=parts[name]) for seed, name in enumerate(parts)
    }


@pytest.fixture
def comparer(folder) -> Comparer:
    return Comparer(make_pipeline(folder / "pipe"))


@pytest.fixture
def adapters(comparer, files) -> tuple[Adapter, ...]:
    return tuple(comparer.shelf.card(path).adapter for path in files.values())


def request(**changes) -> CompareRequest:
    return dataclasses.replace(CompareRequest(prompts=("a panda",), seeds=(3,), num_inference_steps=3), **changes)


def test_cells_come_row_by_row_and_say_what_generated_them(comparer, adapters):
    asked = request(adapters=adapters, strengths=(0.5, 1.0), seeds=(3, 4))
    cells = list(comparer.compare(asked))
    assert [(c.row, c.column) for c in cells] == [(r, c) for r in asked.rows for c in asked.columns]
    assert len(cells) == image_count(asked) == 10
    assert cells[0].generated_with == "no adapter"
    assert cells[1].generated_with == "one × 0.5"
    distinct = {c.image.tobytes() for c in cells}
    assert len(distinct) == len(cells)


def test_the_base_column_is_the_untouched_pipeline_bit_for_bit(comparer, adapters, folder):
    before = [c.image.tobytes() for c in Comparer(make_pipeline(folder / "pipe")).compare(request())]
    cells = list(comparer.compare(request(adapters=adapters, seeds=(3, 3))))
    bases = [c.image.tobytes() for c in cells if c.column.adapter is None]
    assert bases == before * 2


def test_strength_zero_is_the_base_and_full_strength_is_diffusers_own(comparer, adapters, files, folder):
    base, none, full = comparer.compare(request(adapters=adapters[:1], strengths=(0.0, 1.0)))
    assert np.abs(pixels(base.image) - pixels(none.image)).max() <= 1
    plain = make_pipeline(folder / "pipe")
    plain.load_lora_weights(files["one"].parent)
    expected = next(Comparer(plain).compare(request(include_base=False, adapters=adapters[:1])))
    assert np.abs(pixels(full.image) - pixels(expected.image)).max() <= 1
    assert np.abs(pixels(full.image) - pixels(base.image)).max() > 8


def test_an_adapter_leaves_nothing_behind_for_the_next(comparer, adapters, folder):
    """The first has a text-encoder part that the second lacks: the leftover diffusers users report most."""
    alone = next(Comparer(make_pipeline(folder / "pipe")).compare(request(include_base=False, adapters=adapters[1:])))
    after = list(comparer.compare(request(include_base=False, adapters=adapters)))[1]
    assert after.image.tobytes() == alone.image.tobytes()


def test_a_switch_that_did_not_take_is_an_error(comparer, adapters, monkeypatch):
    comparer.shelf.switch(Column(adapters[0], 1.0))
    monkeypatch.setattr(comparer.pipe, "set_adapters", lambda *_: None)
    with pytest.raises(RuntimeError, match="was to hold"):
        comparer.shelf.switch(Column(adapters[1], 1.0))


def test_read_back_notices_uneven_layers(comparer, adapters):
    comparer.shelf.switch(Column(adapters[0], 1.0))
    next(layer for layer in comparer.shelf.layers()).scale_layer(0.5)
    with pytest.raises(RuntimeError, match="disagree"):
        comparer.shelf.read_back()


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_every_scheduler_generates_the_same_image_twice(comparer, scheduler):
    twice = [next(comparer.compare(request(scheduler=scheduler, num_inference_steps=4))) for _ in range(2)]
    assert twice[0].image.tobytes() == twice[1].image.tobytes()


def test_cancel_ends_within_one_step_and_keeps_what_is_there(comparer):
    cancel, steps = threading.Event(), []

    def on_step(cell: int, step: int) -> None:
        steps.append((cell, step))
        if (cell, step) == (1, 2):
            cancel.set()

    cells = list(comparer.compare(request(seeds=(1, 2, 3), num_inference_steps=6), cancel, on_step))
    assert len(cells) == 1
    assert steps[-1] == (1, 2)
    assert len(list(comparer.compare(request()))) == 1, "the pipeline generates on after a cancelled comparison"


def test_one_file_is_loaded_once_and_the_oldest_goes_first(comparer, adapters, monkeypatch):
    shelf = comparer.shelf
    renamed = dataclasses.replace(adapters[0], label="another label")
    assert shelf.load(adapters[0]) == shelf.load(renamed)
    monkeypatch.setattr("app.adapters.MAX_LOADED", 1)
    name = shelf.load(adapters[1])
    assert list(shelf.loaded) == [name]
    assert comparer.pipe.get_list_adapters() == {"unet": [name]}


def test_an_adapter_that_arrives_in_part_is_refused(comparer, adapters, monkeypatch):
    """Loaders skip keys that they do not know, and say so in a log at most."""
    load = comparer.pipe.load_lora_weights

    def load_half(*args, adapter_name: str, **options) -> None:
        load(*args, adapter_name=adapter_name, **options)
        for layer in (m for m in comparer.pipe.text_encoder.modules() if adapter_name in getattr(m, "lora_B", {})):
            torch.nn.init.zeros_(layer.lora_B[adapter_name].weight)

    monkeypatch.setattr(comparer.pipe, "load_lora_weights", load_half)
    with pytest.raises(ValueError, match=r"(?s)did not arrive.*text_encoder.*differs by 100"):
        next(comparer.compare(request(adapters=adapters[:1])))
    assert comparer.shelf.loaded == {}
    assert comparer.pipe.get_list_adapters() == {}


def test_an_adapter_whose_loading_fails_leaves_nothing_behind(comparer, adapters, monkeypatch):
    load = comparer.pipe.load_lora_weights

    def load_and_fail(*args, **options) -> None:
        load(*args, **options)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(comparer.pipe, "load_lora_weights", load_and_fail)
        with pytest.raises(MemoryError):
            comparer.shelf.load(adapters[0])
    assert comparer.pipe.get_list_adapters() == {}
    assert comparer.shelf.load(adapters[0])


def test_a_file_that_changed_is_not_generated_under_its_old_name(comparer, adapters):
    stale = dataclasses.replace(adapters[0], sha256="0" * 64)
    with pytest.raises(ValueError, match="has changed"):
        next(comparer.compare(request(adapters=(stale,))))


def test_a_foreign_file_says_what_it_is_for(comparer, folder):
    path = make_lora_file(folder / "wide", folder / "wide_pipe", 0, wide=True)
    card = comparer.shelf.card(path)
    assert not card.fits
    assert "other shapes" in " ".join(card.mismatches)
    with pytest.raises(ValueError, match="does not fit the loaded base"):
        next(comparer.compare(request(adapters=(card.adapter,))))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not a safetensors file"), (b"PK\x03\x04rest of a pickle", "pickle"), (b"\xff" * 64, "header is cut off")],
)
def test_broken_files_are_refused(folder, content, message):
    path = folder / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        AdapterShelf(make_pipeline(folder / "pipe")).card(path)


ENDLESS = "(([a-z_0-9.]+)+)+!"


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_no_expression_of_a_header_is_run_to_its_end(comparer, folder, files, field):
    """PEFT runs those that diffusers finds in the header, and Python's engine holds every thread meanwhile."""
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"], "peft_type": "LORA"}
    settings[field] = {ENDLESS: 2} if field.endswith("_pattern") else ENDLESS
    header = {f"unet.{name}": value for name, value in settings.items()}
    path = folder / f"endless-{field}.safetensors"
    save_file(load_file(files["two"]), path, {"lora_adapter_metadata": json.dumps(header)})
    began = time.process_time()
    try:
        card = comparer.shelf.card(path)
        comparer.shelf.load(card.adapter)
    except ValueError as problem:
        assert field in str(problem)  # noqa: PT017 (either of the two is right)
    assert time.process_time() - began < 5  # of the processor, whoever else is at it


def test_estimate_counts_and_scales_with_steps(comparer):
    count, seconds = comparer.estimate(request(seeds=tuple(range(10))))
    assert count == 10
    assert seconds == pytest.approx(10 * 3 * comparer.seconds_per_step)


def test_prompts_beyond_the_text_encoder_are_told(comparer):
    assert comparer.prompt_warnings(request()) == []
    padded = comparer.pipe.tokenizer("word", padding="max_length", truncation=True).input_ids  # in another thread
    assert "the text encoder reads 32" in comparer.prompt_warnings(request(prompts=("word " * 20,)))[0]
    own = comparer.pipe.tokenizer.backend_tokenizer
    assert (own.truncation["max_length"], own.padding["length"]) == (len(padded), len(padded))


# ------------------------------------------------------------------------------------------------- requests


def test_the_matrix_fills_every_combination_once():
    words = {"subject": ("panda", "cactus"), "colour": ("red", "blue")}
    assert filled("{subject} on {colour}, {subject}", words)[1] == "panda on blue, panda"
    asked = request(prompts=("a {subject}", "a panda"), placeholders=words, seeds=(1, 2))
    assert [row.label for row in asked.rows] == [
        f"a {subject} · seed {seed}" for subject in ("panda", "cactus") for seed in (1, 2)
    ]


def test_prompts_that_come_twice_are_generated_and_counted_once():
    asked = request(prompts=("a cat", "a {x}", "a cat"), placeholders={"x": ("cat", "dog")}, seeds=(1, 2))
    assert [row.prompt for row in asked.rows] == ["a cat"] * 2 + ["a dog"] * 2
    assert image_count(asked) == len(asked.rows) * len(asked.columns) == 4


def test_long_pastes_are_answered_at_once_and_duplicates_counted_once():
    lines = ["a cat"] * 3000
    assert image_count(CompareRequest(prompts=tuple(lines), seeds=(0, 1))) == 2
    lines = [f"a cat {number // 2}" for number in range(3000)]
    assert image_count(CompareRequest(prompts=tuple(lines), seeds=(0,))) == 1500
    found = problems(CompareRequest(prompts=("a {x}",) * 3000, seeds=(0,)), Limits())
    message = joined("Nothing was generated", found)
    assert message.count("\n") == MOST_SAID + 1
    assert message.endswith("2,980 more of the kind")


def test_braces_of_values_are_text_and_two_are_a_brace():
    assert filled("{a} {{x}} {b}", {"a": ("{b}",), "b": ("c",)}) == ["{b} {x} c"]
    for prompt in ("{x!r}", "{x:>9}", "{x.y}"):
        with pytest.raises(ValueError, match="a word between braces"):
            checked(request(prompts=(prompt,), placeholders={"x": ("a",)}), Limits())


@pytest.mark.parametrize(
    "changes",
    [{"seeds": (10**400,)}, {"strengths": (10**400,), "adapters": (Adapter("a", "p", "s"),)},
     {"guidance_scale": 10**400}, {"num_inference_steps": 10**400}, {"prompts": ("\ud800",)},
     {"negative_prompt": "\udc00"}, {"adapters": (Adapter("\ud800", "p", "s"),)}],
)  # fmt: skip
def test_numbers_and_words_that_nothing_can_hold_are_refused_in_words(changes):
    with pytest.raises(ValueError, match="Nothing was generated") as caught:
        checked(request(**changes), Limits())
    assert len(str(caught.value)) < 300


def test_everything_wrong_with_a_request_is_reported_at_once():
    bad = request(
        prompts=("x" * 601, "a {subject}", "{", "{0}"),
        seeds=(-1,),
        strengths=(2.0,),
        adapters=(Adapter("a", "p", "s"), Adapter("a", "q", "t")),
        num_inference_steps=0,
        guidance_scale=99.0,
    )
    with pytest.raises(ValueError, match="Nothing was generated") as caught:
        checked(bad, Limits())
    for words in ("601 characters", "nothing fills {subject}", "braces", "seeds are", "strengths", "one label", "steps",
                  "guidance", "a word between braces"):  # fmt: skip
        assert words in str(caught.value)


def test_ten_thousand_images_are_refused_without_being_listed():
    digits = tuple("0123456789")
    asked = request(prompts=("{a}{b}{c}{d}{e}{f}",), placeholders=dict.fromkeys("abcdef", digits))
    with pytest.raises(ValueError, match="1,000,000 images; at most 200"):
        checked(asked, Limits())


@pytest.mark.parametrize(
    "changes",
    [{"prompts": ()}, {"seeds": ()}, {"include_base": False}, {"adapters": (Adapter("", "p", "s"),)},
     {"placeholders": {"a": ()}}, {"guidance_scale": float("nan")}],
)  # fmt: skip
def test_empty_requests_are_refused(changes):
    with pytest.raises(ValueError, match="Nothing was generated"):
        checked(request(**changes), Limits())


def test_settings_survive_json():
    asked = request(
        adapters=(Adapter("a", "/here/p", "s"),),
        placeholders={"x": ("1", "2")},
        scheduler=Scheduler.EULER,
        strengths=(0.5,),
    )
    text = json.dumps(asked.to_dict())
    assert CompareRequest.from_dict(json.loads(text), {"s": "/here/p"}) == asked
    assert "/here" not in text
    with pytest.raises(ValueError, match="Add these adapter files first.*\n.*p$"):
        CompareRequest.from_dict(json.loads(text), {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 3}, "this app reads 1 to 2"),
        ({"colour": 1}, "colour is not known"),
        ({"seeds": "3"}, "whole numbers"),
        ({"seeds": [True]}, "whole numbers"),
        ({"adapters": [{"label": "a"}]}, "label, file, sha256"),
        ({"scheduler": "nope"}, "one of as saved"),
        ({"num_inference_steps": 2.5}, "a whole number"),
        ({"strengths": [10**400]}, "a list of numbers"),
        ({"guidance_scale": float("nan")}, "a number"),
    ],
)
def test_foreign_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        CompareRequest.from_dict(request().to_dict() | change, {})
    with pytest.raises(ValueError, match="no object"):
        CompareRequest.from_dict([], {})


def test_the_trainers_races_open_as_settings(files, adapters):
    """`--compare` ends in a comparison.json, whose adapters are found by their content."""
    asked = Namespace(
        validation_prompt=["a cat", "a dog"],
        num_validation_images=2,
        num_inference_steps=9,
        validation_guidance_scale=3.0,
    )
    data = app_settings({name: path.parent for name, path in files.items()}, asked)
    assert digests_in(data) == {adapter.sha256 for adapter in adapters}
    opened = CompareRequest.from_dict(json.loads(json.dumps(data)), {a.sha256: a.path for a in adapters})
    assert opened.adapters == tuple(adapters)
    assert (opened.prompts, opened.seeds, opened.num_inference_steps) == (("a cat", "a dog"), (0, 1), 9)
    assert checked(opened, Limits()) is opened


@pytest.mark.parametrize("data", [None, [], {"adapters": 1}, {"adapters": [1, {"sha256": 2}]}])
def test_settings_without_adapters_ask_for_none(data):
    assert digests_in(data) == set()


def test_a_base_in_one_file_generates_what_its_folder_does(tmp_path):
    pipeline = make_pipeline(tmp_path / "bases" / "folder")
    file = write_single_file(pipeline, tmp_path / "bases" / "model.safetensors")
    loaded = load_pipeline(file, config=str(tmp_path / "bases" / "folder"))
    images = [next(Comparer(pipe).compare(request())).image for pipe in (pipeline, loaded)]
    assert images[0].tobytes() == images[1].tobytes()
    lora = make_lora_file(tmp_path / "bases" / "lora", tmp_path / "bases" / "folder", 0)
    assert lora.is_file()
    bases = Bases("first", tmp_path, Comparer(loaded), [tmp_path / "bases"])
    assert list(bases.choices()) == ["first", "folder", "model.safetensors"], "a LoRA is no base"


def test_the_size_of_images_of_flux_is_known(tmp_path):
    """Its transformer names no size, its pipeline does: `app.serve` asks before the first visitor comes."""
    assert Comparer(tiny_pipeline_flux(tmp_path)).resolution == 128 * 8


@pytest.mark.parametrize("build", [tiny_z_image, tiny_flux_2_klein, tiny_qwen_image])
def test_families_with_arguments_of_their_own_are_compared(tmp_path, build, monkeypatch):
    """Qwen-Image is guided by another argument, FLUX.2 takes no negative prompt, Z-Image names no size."""
    comparer = Comparer(build(tmp_path))
    assert comparer.resolution == 128 * 8
    call, given = type(comparer.pipe).__call__, {}

    @functools.wraps(call)
    def small(pipe, **values):
        given.update(values)
        return call(pipe, **values, height=64, width=64)

    monkeypatch.setattr(type(comparer.pipe), "__call__", small)
    (cell,) = comparer.compare(request(num_inference_steps=2, guidance_scale=2.5))
    assert cell.image.size == (64, 64)
    assert given["true_cfg_scale" if build is tiny_qwen_image else "guidance_scale"] == 2.5
    assert ("negative_prompt" in given) == (build is not tiny_flux_2_klein)
    if build is tiny_flux_2_klein:
        with pytest.raises(ValueError, match="Flux2KleinPipeline takes no negative prompt"):
            next(comparer.compare(request(negative_prompt="blurry")))
