"""Measures on images whose answers are known."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from app import measure_views
from app.compare import Cell
from app.intervals import figure, proportion, t_quantile
from app.learned import at_hand, learned_measures, load
from app.likeness import cut_out, likeness
from app.measures import Measure, asked_background, background, diversities, measure
from app.request import Adapter, Column, CompareRequest
from app.sessions import Sessions
from tiny import tiny_tokenizer

ADAPTER = Adapter("one", "p", "a")
CLIP_I, CLIP_T, DINO = 0.994643, [-0.263522, 0.047060], 0.968466  # see `models`


def sticker(colour: str, shape: str, place: int = 8, size: int = 32, ink: str = "black") -> Image.Image:
    image = Image.new("RGB", (64, 64), colour)
    box = (place, place, place + size, place + size)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=ink)
    if shape == "face":
        draw.ellipse((place + size // 4, place + size // 4, place + size // 2, place + size // 2), fill="white")
    return image


def test_likeness_is_blind_to_place_size_and_background_but_not_to_the_figure():
    reference = [cut_out(sticker("blue", "face", 8, 32))]
    same = likeness(cut_out(sticker("yellow", "face", 20, 40)), reference)
    other = likeness(cut_out(sticker("blue", "circle", 8, 32, "red")), reference)
    assert likeness(cut_out(sticker("blue", "face", 8, 32)), reference) == pytest.approx(1, abs=1e-5)
    assert same > 0.9 > other + 0.2
    assert likeness(cut_out(Image.new("RGB", (64, 64), "blue")), reference) == 0


@pytest.mark.parametrize(
    ("prompt", "colour"),
    [("a sticker of a cat on a blue background", "blue"), ("a red cat", None), ("a cat on yellow", "yellow"),
     ("", None), ("a pink cat, green background", "green"), ("a cat on a grey background", "gray"),
     ("a cat on a red sofa", None), ("a cat on orange, smiling", "orange"), ("a red and white background", None)],
)  # fmt: skip
def test_the_background_a_prompt_asks_for(prompt, colour):
    assert asked_background(prompt) == colour


@pytest.mark.parametrize("colour", ["red", "yellow", "green", "blue", "white", "black", "pink"])
def test_the_background_of_a_image(colour):
    assert background(sticker(colour, "circle", ink="gray")) == colour


@pytest.mark.parametrize(
    ("colour", "rgb"),
    [("red", (214, 64, 60)), ("orange", (240, 148, 60)), ("yellow", (246, 220, 96)), ("green", (92, 176, 100)),
     ("blue", (72, 124, 214)), ("purple", (142, 92, 190)), ("pink", (240, 164, 192)), ("gray", (150, 154, 160)),
     ("blue", (33, 125, 200)), ("yellow", (255, 203, 60)), ("brown", (120, 72, 30))],
)  # fmt: skip
def test_the_background_of_a_generated_sticker(colour, rgb):
    """The embedded pipeline's own grounds are no pure colours, nor are those that adapters make of them."""
    assert background(Image.new("RGB", (8, 8), rgb)) == colour


def test_figure_is_a_mean_inside_its_interval_which_shrinks_with_n():
    few, many = figure([0, 1] * 5), figure([0, 1] * 500)
    assert (few.mean, many.mean, few.n) == (0.5, 0.5, 10)
    assert few.low < 0.5 < few.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=0.01)
    assert figure([]) is None
    assert str(figure([0.5])) == "0.500, n = 1"
    assert (figure([0.1, 0.9], 0, 1).low, figure([0.1, 0.9], 0, 1).high) == (0, 1)


def test_quantiles_of_student_are_the_tables():
    """The quantiles are those of 0.975, as printed in every table."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262, 15: 2.131, 30: 2.042, 120: 1.980}
    assert {n: t_quantile(n) for n in table} == pytest.approx(table, rel=3e-3)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_intervals_of_few_values_hold_the_mean_as_often_as_they_say(n):
    """The percentile bootstrap that stood here before holds it in 50 % of samples of two, and in 80 % of four."""
    samples = np.random.default_rng(n).normal(0.4, 0.1, (4000, n))
    held = [found.low <= 0.4 <= found.high for found in map(figure, samples)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_a_share_of_all_or_none_still_has_an_interval():
    every = proportion([True] * 4)
    assert (every.mean, every.high, every.n) == (1, 1, 4)
    assert 0.3 < every.low < 0.6
    assert proportion([]) is None


def cells_of(request: CompareRequest, shift: int) -> list[Cell]:
    return [
        Cell(row, column, sticker("blue", "face", 8 + row.seed + shift * j), "", 0.1)
        for row in request.rows
        for j, column in enumerate(request.columns)
    ]


def figures(request: CompareRequest, shift: int, references: list[Image.Image]) -> dict:
    found = measure(request, cells_of(request, shift), references, "sks")
    return {m.name: {column: m.figure(column) for column in request.columns} for m in found}


def test_measures_of_a_comparison():
    prompts = ("a sks cat on a blue background", "a dog on a red background")
    request = CompareRequest(prompts=prompts, seeds=(0, 1), adapters=(ADAPTER,))
    base, adapted = request.columns
    values = figures(request, 6, [sticker("red", "face")])
    assert values["subject likeness"][base].n == 2, "only prompts with the subject's word"
    assert values["background obeyed"][adapted].mean == 0.5
    assert values["drift from the base"][base] is None
    assert values["drift from the base"][adapted].mean > 0.05
    assert figures(request, 0, [])["drift from the base"][adapted].mean == 0
    assert figures(request, 0, [])["subject likeness"][adapted] is None


def test_measures_are_shown_relative_to_the_base_and_sort_the_images(tmp_path):
    request = CompareRequest(prompts=("a sks cat on a blue background",), seeds=(0, 1, 2), adapters=(ADAPTER,))
    session = Sessions(tmp_path).of("a")
    session.show(request, cells_of(request, 6))
    session.measured = measure(request, session.cells, [sticker("red", "face")], "sks")
    base, adapted = request.columns
    subject = session.measured[0]
    html = measure_views.measures(request, session.measured)
    assert f"{subject.paired(adapted, base).mean:+.3f}" in html.partition("Relative to the base")[2]
    ramp = Measure("ramp")
    for number, cell in enumerate(session.cells):
        ramp.values[cell.column][cell.row] = (number * 5 % 7) / 7
    for least_first in (False, True):
        sheet = measure_views.contact_sheet(session, ramp, least_first)
        said = [float(text) for text in re.findall(r"<b>([0-9.]+)</b>", sheet)]
        assert said == sorted(said, reverse=not least_first)
        places = [sheet.index(session.addresses[id(cell)]) for cell in session.cells]
        values = [ramp.values[cell.column][cell.row] for cell in session.cells]
        assert np.argsort(places).tolist() == sorted(range(6), key=lambda i: values[i], reverse=not least_first)
    assert not next(m for m in session.measured if m.name == "diversity").is_of_images


def test_measures_come_back_with_the_images_that_they_are_of():
    request = CompareRequest(prompts=("a sks cat", "a dog"), seeds=(0, 1), adapters=(ADAPTER,))
    for one in measure(request, cells_of(request, 6), [sticker("red", "face")], "sks"):
        again = Measure.from_dict(json.loads(json.dumps(one.to_dict(request))), request)
        assert again.is_of_images == one.is_of_images
        for column in request.columns:
            assert again.figure(column) == one.figure(column)
            assert not one.is_of_images or again.values[column] == one.values[column]


def test_diversity_is_between_seeds_of_one_prompt():
    request = CompareRequest(prompts=("a", "b"), seeds=(0, 9))
    cells = cells_of(request, 0)
    expected = np.abs(np.asarray(cells[0].image, float) - np.asarray(cells[1].image, float)).mean() / 255
    assert diversities(cells) == pytest.approx({("a", None): expected, ("b", None): expected}, rel=1e-4)
    assert diversities(cells[:1]) == {}


def test_models_that_are_not_here_are_named_together():
    with pytest.raises(ValueError, match=r"Clip 'no/clip'.*\n.*Dino 'no/dino'"):
        load("no/clip", "no/dino")
    assert load("", " ") == (None, None)


class Flat:
    """An encoder of an image's mean colour and of a text's first letters: known cosines, no weights."""

    def images(self, images):
        x = torch.tensor(np.stack([np.asarray(i, float).mean((0, 1)) for i in images]))
        return x / x.norm(dim=-1, keepdim=True)

    def texts(self, texts):
        return torch.tensor([[float(t.startswith(c)) for c in "rgb"] for t in texts], dtype=torch.float64)


def test_dreambooths_measures_are_mean_cosines():
    request = CompareRequest(prompts=("red", "green"), seeds=(0,))
    cells = [Cell(row, Column(), Image.new("RGB", (8, 8), "red"), "", 0.1) for row in request.rows]
    references = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    found = learned_measures(cells, references, "", Flat(), Flat())
    assert {m.name: m.figure(Column()).mean for m in found} == pytest.approx(
        {"CLIP-I": 0.5, "DINO": 0.5, "CLIP-T": 0.5}
    )
    assert learned_measures(cells, [], "", None, Flat()) == []


def test_a_subject_in_images_of_other_things_is_no_gain():
    """CLIP-I and DINO are of the prompts with the subject's word alone."""
    request = CompareRequest(prompts=("a sks cat", "a dog"), seeds=(0,))
    cells = [Cell(row, Column(), Image.new("RGB", (8, 8), "red"), "", 0.1) for row in request.rows]
    clip_i, dino, clip_t = learned_measures(cells, [Image.new("RGB", (8, 8), "red")], "sks", Flat(), Flat())
    assert list(clip_i.values[Column()]) == list(dino.values[Column()]) == request.rows[:1]
    assert list(clip_t.values[Column()]) == request.rows


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Weights by a formula, so that they are the same in every version of torch."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            x = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 12.9898 + number) * 43758.5453
            parameter.copy_((x % 1 - 0.5).reshape(parameter.shape))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny CLIP and a tiny DINO, of the kinds that the measures are of."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    end = tokenizer.eos_token_id
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": end, "pad_token_id": end}
    image, size = {"image_size": 16, "patch_size": 8}, {"height": 16, "width": 16}
    config = CLIPConfig(text_config=small | text, vision_config=small | image, projection_dim=8)
    fill(CLIPModel(config)).save_pretrained(folder / "clip")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    fill(ViTModel(ViTConfig(**small, **image))).save_pretrained(folder / "dino")
    ViTImageProcessorPil(size=size).save_pretrained(folder / "dino")
    return folder


def test_embeddings_are_those_that_were_saved(models):
    """Cosines of transformers' models in float64 with these weights, computed without this project's code."""
    clip, dino = load(str(models / "clip"), str(models / "dino"))
    half, whole = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "green")
    half.paste("blue", (0, 0, 8, 16))
    images, texts = clip.images([half, whole]), clip.texts(["a cat", "a dog"])
    assert float(images[0] @ images[1]) == pytest.approx(CLIP_I, abs=1e-4)
    assert (images * texts).sum(1).tolist() == pytest.approx(CLIP_T, abs=1e-4)
    tokens = dino.images([half, whole])
    assert float(tokens[0] @ tokens[1]) == pytest.approx(DINO, abs=1e-4)


def test_clip_and_dino_are_opened_from_folders(models):
    clip, dino = load(str(models / "clip"), str(models / "dino"))
    images = [sticker("red", "face"), sticker("blue", "circle")]
    pixels = clip.processor(images=images, return_tensors="pt").pixel_values
    tokens = clip.processor(text=["a cat", "a dog"], return_tensors="pt", padding=True)
    with torch.no_grad():
        whole = clip.model(pixel_values=pixels, **tokens)
    torch.testing.assert_close(clip.images(images), whole.image_embeds)
    torch.testing.assert_close(clip.texts(["a cat", "a dog"]), whole.text_embeds)
    for vectors in (clip.images(images), dino.images(images), clip.texts(["a cat", "a dog"])):
        assert vectors.shape[0] == 2
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(2), atol=1e-5)
        assert not torch.allclose(vectors[0], vectors[1])


def cached(cache: Path, name: str, model: Path, without: str = "") -> None:
    """Lay a model out as the hub's local cache does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns(without))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_models_in_the_cache_are_chosen_on_the_page(models, tmp_path, monkeypatch):
    gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")
    from app.tabs.measures import measures_tab

    for module in ("constants", "utils._cache_manager"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "some/clip", models / "clip")
    cached(tmp_path, "some/dino", models / "dino")
    cached(tmp_path, "another/vit", models / "dino")
    cached(tmp_path, "a/clip-without-weights", models / "clip", "*.safetensors")
    (tmp_path / "models--a--nothing").mkdir()
    assert at_hand() == (["some/clip"], ["some/dino"])
    assert all(load("some/clip", "some/dino"))
    with gr.Blocks() as demo, gr.Tab("Measures") as tab:
        measures_tab(SimpleNamespace(subjects={}, first_subject=None), tab, SimpleNamespace(news=[], verdict=gr.HTML()))
    props = {block.label: block for block in demo.blocks.values() if getattr(block, "label", None)}
    assert (props["CLIP"].value, props["DINO"].value) == ("some/clip", "some/dino")
    assert props["CLIP and DINO"].open
