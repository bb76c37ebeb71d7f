"""Each measure of the page puts images in an order that is known: real ones, half-learned ones, decoys, noise."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from app.compare import Cell
from app.likeness import among_themselves, cut_out, likeness, references_problem
from app.measures import background, is_noise, measure
from app.output import difference
from app.request import Adapter, Column, CompareRequest

SUBJECTS = Path(__file__).parent.parent / "assets" / "subjects"
NAMES = sorted(path.name for path in SUBJECTS.iterdir())
GROUNDS = ((72, 124, 214), (246, 220, 96), (240, 164, 192))
# Rows of 9 images by the embedded pipeline (three prompts, three seeds, guidance 4): after 0, 150 and 450 steps of a
# LoRA of the panda, and after 0 and 600 of one of the teapot (rank 16, learning rate 1e-3, with the text encoder).
GENERATED = Image.open(Path(__file__).parent / "data" / "half_learned.png").convert("RGB")
PANDA_0, PANDA_150, PANDA_450, TEAPOT_0, TEAPOT_600 = (
    [GENERATED.crop((64 * i, 64 * row, 64 * i + 64, 64 * row + 64)) for i in range(9)] for row in range(5)
)


def real(name: str) -> list[Image.Image]:
    return [Image.open(SUBJECTS / name / f"{i}.png").convert("RGB") for i in range(5)]


def blob(colour: tuple[int, int, int], ground: tuple[int, int, int], shape: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), ground)
    getattr(ImageDraw.Draw(image), shape)((10, 12, 54, 52), fill=colour)
    return image


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def noisy_figure(seed: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), GROUNDS[seed])
    image.paste(noise(seed).crop((0, 0, 40, 40)), (12, 12))
    return image


def decoys(name: str) -> list[Image.Image]:
    """Blobs of plain colours and of the subject's own, on every ground; noise; nothing."""
    x = np.asarray(real(name)[4], dtype=int)
    own = x[np.abs(x - x[0, 0]).sum(-1) > 60].mean(0)
    colours = [(60, 160, 60), (250, 250, 250), (150, 154, 160), (20, 20, 20), tuple(map(int, own))]
    found = [blob(colour, g, shape) for colour in colours for g in GROUNDS for shape in ("ellipse", "rectangle")]
    found += [Image.new("RGB", (64, 64), g) for g in GROUNDS]
    return [*found, *map(noise, range(3)), *map(noisy_figure, range(3))]


@pytest.mark.parametrize("name", NAMES)
def test_the_subject_stands_above_its_blurred_copies_and_all_else_far_below(name):
    references = [cut_out(image) for image in real(name)[:4]]
    assert references_problem(references) is None

    def value(image: Image.Image) -> float:
        return likeness(cut_out(image), references)

    held_out = real(name)[4]
    sharp, blurred = value(held_out), value(held_out.filter(ImageFilter.GaussianBlur(2.5)))
    others = max(value(image) for other in NAMES if other != name for image in real(other))
    assert sharp > 0.85
    assert sharp > blurred > 0.5
    assert others < 0.2
    assert max(map(value, decoys(name))) < 0.2
    assert max(map(value, PANDA_0)) < 0.2, "the class, as the base knows it"


def test_what_training_has_half_learned_stands_between_the_class_and_the_subject():
    def mean(images: list[Image.Image], name: str) -> float:
        references = [cut_out(image) for image in real(name)]
        return float(np.mean([likeness(cut_out(image), references) for image in images]))

    assert mean(PANDA_0, "panda") < 0.02 < mean(PANDA_150, "panda") < mean(PANDA_450, "panda") < 0.6
    assert mean(TEAPOT_0, "teapot") < 0.02 < 0.3 < mean(TEAPOT_600, "teapot") < 0.8
    assert mean(PANDA_450, "teapot") < 0.02
    assert mean(TEAPOT_600, "panda") < 0.02


def test_place_size_and_ground_do_not_count():
    references = [cut_out(image) for image in real("panda")[:1]]
    whole = real("panda")[1]
    small = Image.new("RGB", (64, 64), whole.getpixel((0, 0)))
    small.paste(whole.resize((40, 40), Image.Resampling.LANCZOS), (3, 20))
    assert likeness(cut_out(small), references) > 0.8
    assert likeness(cut_out(whole), [cut_out(whole)]) == 1


def test_where_the_measure_does_not_apply_it_says_so():
    photograph = noise(0).resize((9, 9)).resize((64, 64), Image.Resampling.BICUBIC)
    assert references_problem([]) == "needs reference images"
    assert "1 of 2 references have no figure" in references_problem([cut_out(photograph), cut_out(real("cake")[0])])
    unlike = [cut_out(real(name)[0]) for name in ("cake", "panda", "robot")]
    assert among_themselves(unlike) < 0.2
    assert "too unlike one another" in references_problem(unlike)
    assert references_problem(unlike[:1]) is None
    ball = [cut_out(blob((200, 30, 30), g, "ellipse")) for g in GROUNDS]
    assert "hardly more than a blob" in references_problem(ball)


def test_grounds_of_generated_and_real_images_are_named_and_noise_has_none():
    for images in (PANDA_150, PANDA_450, TEAPOT_600):
        assert [background(image) for image in images] == ["blue"] * 3 + ["yellow"] * 3 + ["pink"] * 3
    assert background(Image.new("RGB", (8, 8), (143, 148, 169))) == "gray", "as the pipeline makes gray"
    assert {background(noise(seed)) for seed in range(9)} == {None}, "its median is gray, its ground is not"


def test_noise_is_found_and_no_image_is_taken_for_it():
    assert all(map(is_noise, (noise(0), noise(1), noise(2).resize((32, 32)).convert("L"))))
    images = [
        *PANDA_0,
        *PANDA_450,
        *TEAPOT_600,
        *(image for name in NAMES for image in real(name)),
        *decoys("cake")[:33],
    ]
    assert not any(map(is_noise, images))


def test_drift_grows_from_the_same_image_to_noise():
    def mean(change) -> float:
        return float(np.mean([difference(change(image), image).mean() for image in PANDA_450]))

    steps = [
        lambda image: image,
        lambda image: image.filter(ImageFilter.GaussianBlur(1)),
        lambda image: ImageChops.offset(image, 3, 0),
        lambda image: Image.new("RGB", (64, 64), image.getpixel((0, 0))),
        lambda _: noise(0),
    ]
    values = [mean(step) for step in steps]
    assert values == sorted(values)
    assert values[0] == 0
    assert all(b > 1.5 * a for a, b in zip(values, values[1:], strict=False))


def test_measures_tell_a_trained_column_from_a_broken_one():
    """Columns: the base, half-learned pandas, noise, and pandas that all look the same."""
    names = ("learned", "noise", "same")
    adapters = tuple(Adapter(name, name, name) for name in names)
    prompts = tuple(f"a sticker of sks animal on a {colour} background" for colour in ("blue", "yellow", "pink"))
    request = CompareRequest(prompts=prompts, seeds=(0, 1, 2), adapters=adapters)
    columns = request.columns
    images = [PANDA_0, PANDA_450, list(map(noise, range(9))), [PANDA_450[3 * (i // 3)] for i in range(9)]]
    cells = [
        Cell(row, column, images[i], "", 0.1)
        for column, images in zip(columns, images, strict=True)
        for i, row in enumerate(request.rows)
    ]
    found = {m.name: [m.figure(column) for column in columns] for m in measure(request, cells, real("panda"), "sks")}
    base, learned, broken, same = (figure and figure.mean for figure in found["subject likeness"])
    assert base == broken == 0
    assert min(learned, same) > 0.2
    assert [f.mean for f in found["background obeyed"]] == [1, 1, 0, 1]
    assert [f and f.n for f in found["diversity"]] == [3, 3, None, 3]
    assert found["diversity"][3].mean == 0 < found["diversity"][1].mean
    assert [f.mean for f in found["images of noise"]] == [0, 0, 1, 0]
    assert found["drift from the base"] == [None] * 4, "every prompt is of the subject"
    learned_column, base_column = Column(adapters[0], 1.0), Column()
    subject = measure(request, cells, real("panda"), "sks")[0]
    assert subject.paired(learned_column, base_column).low > 0
