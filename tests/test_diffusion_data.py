"""Folders, captions, masks, shapes and concepts: what is found, and what pixels become of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth import SUBJECTS, arguments
from reslora_diffusion.diffusion.data.buckets import Buckets, Grid, auto_buckets, nearest, parse_buckets
from reslora_diffusion.diffusion.data.concepts import Concept, chosen, concepts_of, read_concepts
from reslora_diffusion.diffusion.data.crops import Views, covering, crop_corners
from reslora_diffusion.diffusion.data.scan import open_mask, open_upright, read_image_file, scan


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "subject"
    shutil.copytree(SUBJECTS / "octopus", folder)
    return folder


def views(**options) -> Views:
    common = {
        "buckets": Buckets(((64, 64),)),
        "interpolation": Image.Resampling.LANCZOS,
        "center_crop": True,
        "crops": 1,
    }
    return Views(**common | {"flip": False} | options)


def test_stray_files_are_skipped_and_named(folder):
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "Thumbs.db").write_bytes(b"\0")
    (folder / "README.txt").write_text("how these were made")
    (folder / "nested").mkdir()
    found = scan(folder)
    assert found.problems == []
    assert [image.path.name for image in found.images] == [f"{n}.png" for n in range(5)]
    assert found.skipped == {
        ".DS_Store": "hidden",
        "Thumbs.db": "not an image",
        "nested": "a folder",
        "README.txt": "not an image, and no image has this name",
    }


def test_captions_come_from_metadata_then_text_files_then_the_prompt(folder):
    (folder / "0.txt").write_text("  from a file\n")
    (folder / "1.txt").write_text("loses")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "from metadata"}) + "\n\n")
    found = scan(folder)
    assert [image.caption for image in found.images] == ["from a file", "from metadata", None, None, None]
    assert found.uncaptioned == ["2.png", "3.png", "4.png"]


def test_only_a_line_feed_ends_a_row_of_the_metadata(folder):
    captions = ["a\u2028b", "c\x85d"]
    rows = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(captions)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    found = scan(folder)
    assert found.problems == []
    assert [image.caption for image in found.images[:2]] == captions


def test_equal_images_are_found(folder):
    shutil.copy(folder / "0.png", folder / "again.png")
    assert scan(folder).duplicates == [["0.png", "again.png"]]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_are_turned_as_exif_says(tmp_path, orientation):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20] = 255  # upper left quarter
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    turned = np.asarray(open_upright(tmp_path / "a.png"))
    expected = np.rot90(pixels, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    assert read_image_file(tmp_path / "a.png").size == expected.shape[1::-1]
    np.testing.assert_array_equal(turned, expected)


def test_what_is_transparent_becomes_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(tmp_path / "a.png")
    found = open_upright(tmp_path / "a.png")
    assert found.getpixel((0, 0)) == (255, 0, 0)
    assert found.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "CMYK", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new(mode, (8, 8)).save(tmp_path / f"a.{suffix}")
    assert open_upright(read_image_file(tmp_path / f"a.{suffix}").path).mode == "RGB"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_keeps_its_shades(tmp_path, suffix):
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
    expected = np.floor(deep / 257 + 0.5).astype(int)
    image = read_image_file(tmp_path / f"a.{suffix}")
    assert np.abs(np.asarray(open_upright(image.path))[..., 0] - expected).max() <= 1
    masked = open_mask(replace(image, mask=image.path), alpha=False)
    assert np.abs(np.asarray(masked) - expected).max() <= 1


def test_images_in_floating_point_are_refused_since_nobody_knows_what_is_white(folder):
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "deep.tif")
    (problem,) = scan(folder).problems
    assert "deep.tif (floating point (mode F)" in problem


def test_the_mark_that_windows_puts_in_front_of_text_is_no_part_of_it(folder, tmp_path):
    (folder / "0.txt").write_text("a caption", encoding="utf-8-sig")
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "another"}', encoding="utf-8-sig")
    found = scan(folder)
    assert found.problems == []
    assert [image.caption for image in found.images[:2]] == ["a caption", "another"]
    (tmp_path / "concepts.json").write_text('[{"instance_data_dir": "x"}]', encoding="utf-8-sig")
    assert read_concepts(tmp_path / "concepts.json") == [{"instance_data_dir": "x"}]


@pytest.mark.parametrize(
    ("size", "box"), [((100, 50), (64, 64)), ((50, 100), (64, 64)), ((640, 641), (80, 48)), ((3, 2), (8, 8))]
)
def test_an_image_covers_its_box_and_no_more_than_it_must(size, box):
    covered = covering(size, box)
    assert covered[0] >= box[0]
    assert covered[1] >= box[1]
    assert covered[0] == box[0] or covered[1] == box[1]
    assert covered[0] / covered[1] == pytest.approx(size[0] / size[1], rel=1 / min(box))


def test_crops_stay_inside_and_equal_ones_come_once():
    corners = crop_corners((100, 64), (64, 64), [(0, 0), (1, 1), (0.5, 0.2), (0.5, 0.9)])
    assert corners == [(0, 0), (36, 0), (18, 0)]


def test_views_crop_and_flip_as_numpy_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image_file(tmp_path / "a.png")
    seen = views(flip=True).of(image)
    middle = pixels[:, 16:80].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(seen.pixels, np.stack([middle, middle[..., ::-1]]), atol=1e-6)
    np.testing.assert_array_equal(seen.time_ids, [[64, 96, 0, 16, 64, 64]] * 2)
    assert seen.mask is None

    random = views(center_crop=False, crops=3)
    pixels[0, 0] += 1
    Image.fromarray(pixels).save(tmp_path / "b.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "renamed.png")
    first, again, other = (random.of(read_image_file(tmp_path / name)) for name in ("a.png", "renamed.png", "b.png"))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert len(first.pixels) == 3
    assert not np.array_equal(first.time_ids, other.time_ids)
    for crop, (_, _, _, x, _, _) in zip(first.pixels, first.time_ids, strict=True):
        x = int(x)
        np.testing.assert_allclose(crop[:, 1:], pixels[1:, x : x + 64].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_masks_are_of_the_same_crop_at_the_size_of_latents(tmp_path):
    alpha = np.zeros((64, 96), np.uint8)
    alpha[:, 48:] = 255
    Image.fromarray(np.dstack([np.zeros((64, 96, 3), np.uint8), alpha])).save(tmp_path / "a.png")
    image = read_image_file(tmp_path / "a.png")
    seen = views(alpha_mask=True, flip=True).of(image)
    expected = np.zeros((1, 8, 8))
    expected[:, :, 4:] = 1  # pixels 16 to 80 are seen, the upper half of which is from 48 on
    np.testing.assert_allclose(seen.mask, np.stack([expected, expected[..., ::-1]]))
    assert views().of(image).mask is None


def test_a_mask_folder_goes_before_opacity(tmp_path):
    (tmp_path / "subject").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "subject" / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "subject" / "b.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "masks" / "a.png")
    a, b = scan(tmp_path / "subject", masks=tmp_path / "masks").images
    assert open_mask(a, alpha=True).getextrema() == (255, 255)
    assert open_mask(b, alpha=True) is None


# ------------------------------------------------------------------------------------------------ shapes


def test_automatic_buckets_are_on_the_grid_and_no_larger_than_the_square():
    buckets = auto_buckets(512, 64)
    assert buckets[0] == (512, 512)
    assert (768, 320) in buckets
    assert (1024, 256) not in buckets  # wider than 5 : 2
    assert all(w % 64 == 0 and h % 64 == 0 and w * h <= 512**2 and 0.4 <= w / h <= 2.5 for w, h in buckets)
    assert {(h, w) for w, h in buckets} == set(buckets)
    assert len(set(buckets)) == len(buckets) > 5


def test_an_image_goes_to_the_bucket_of_its_shape():
    buckets = parse_buckets("512,512;448,576;576,448", 512, Grid(8, 64))
    assert nearest((1000, 1000), buckets) == (512, 512)
    assert nearest((4000, 3000), buckets) == (576, 448)  # written height,width
    assert nearest((300, 900), buckets) == (448, 576)


# ------------------------------------------------------------------------------------------------ concepts


def test_concepts_from_a_file(tmp_path):
    path = tmp_path / "concepts.toml"
    path.write_text(
        f'[[concepts]]\ninstance_data_dir = "{SUBJECTS / "octopus"}"\ninstance_prompt = "sks octopus"\nrepeats = 3\n'
        f'class_data_dir = "{tmp_path / "classes"}"\nclass_prompt = "an octopus"\nnum_class_images = 2\n'
        f'[[concepts]]\ninstance_data_dir = "{SUBJECTS / "cake"}"\n'
    )
    args = arguments(
        tmp_path, instance_data_dir=None, instance_prompt="fallback", concepts=path, with_prior_preservation=True
    )
    octopus, cake = concepts_of(args)
    assert (octopus.instance_prompt, octopus.repeats, octopus.num_class_images) == ("sks octopus", 3, 2)
    assert octopus.instances == 15
    assert (cake.instance_prompt, cake.repeats, cake.classes) == ("fallback", 1, None)
    assert octopus.problems + cake.problems == []


def test_folders_named_as_kohya_wants_are_concepts(tmp_path):
    shutil.copytree(SUBJECTS / "octopus", tmp_path / "img" / "10_sks octopus")
    shutil.copytree(SUBJECTS / "cake", tmp_path / "img" / "2_ohwx cake")
    (tmp_path / "img" / "notes").mkdir()
    shutil.copytree(SUBJECTS / "panda", tmp_path / "reg" / "1_animal")
    (tmp_path / "reg" / "1_animal" / "0.txt").write_text("a panda")
    args = arguments(
        tmp_path,
        instance_data_dir=tmp_path / "img",
        instance_prompt=None,
        with_prior_preservation=True,
        class_data_dir=tmp_path / "reg",
    )
    octopus, cake = concepts_of(args)
    assert [(c.instance_prompt, c.repeats, c.instances) for c in (octopus, cake)] == [
        ("sks octopus", 10, 50),
        ("ohwx cake", 2, 10),
    ]
    images = len(list((SUBJECTS / "panda").glob("*.png")))
    assert octopus.num_class_images == len(octopus.classes.images) == images
    assert [image.caption for image in octopus.classes.images[:2]] == ["a panda", "animal"]
    assert octopus.problems + cake.problems == []


def test_captions_have_the_extension_that_was_asked_for(folder):
    (folder / "0.caption").write_text("from kohya")
    found = scan(folder, ".caption")
    assert {p.path.name: p.caption for p in found.images}["0.png"] == "from kohya"
    assert "0.caption" in scan(folder).skipped


def test_a_share_of_the_images_is_held_out_by_their_bytes(folder, tmp_path):
    found = scan(folder)
    count = len({image.digest for image in found.images})
    assert chosen(found, 0.0) == frozenset()
    assert len(chosen(found, 0.01)) == 1
    assert len(chosen(found, 0.99)) == count
    concept = Concept(found, "x", repeats=3, held_out=chosen(found, 0.5))
    assert {p.digest for p in concept.trained}.isdisjoint(p.digest for p in concept.validated)
    assert len(concept.trained) + len(concept.validated) == len(found.images)
    assert concept.instances == 3 * len(concept.trained)
    shutil.copytree(folder, tmp_path / "renamed")
    for image in scan(tmp_path / "renamed").images:
        image.path.rename(image.path.with_stem(f"z{image.path.stem}"))
    assert chosen(scan(tmp_path / "renamed"), 0.5) == concept.held_out
    assert "leaves nothing to train on" in str(Concept(found, "x", held_out=chosen(found, 0.99)).problems)


def test_folders_beside_images_are_only_folders(folder, tmp_path):
    (folder / "10_sks octopus").mkdir()
    (concept,) = concepts_of(arguments(tmp_path, instance_data_dir=folder))
    assert concept.repeats == 1
    assert concept.instance.skipped == {"10_sks octopus": "a folder"}


def test_random_numbers_are_a_function_of_seed_stream_and_index():
    from reslora_diffusion.diffusion.objective.randomness import Stream, generator, shuffled

    def draw(*key):
        return torch.rand(3, generator=generator(*key)).tolist()

    assert draw(1, Stream.CROP, 5) == draw(1, Stream.CROP, 5)
    assert len({tuple(draw(*key)) for key in [(1, Stream.CROP, 5), (2, Stream.CROP, 5), (1, Stream.CROP, 6)]}) == 3
    assert draw(1, Stream.CROP, 5) != draw(1, Stream.DROPOUT, 5)
    epochs = [[shuffled(0, Stream.CLASS_ORDER, n, 7) for n in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
