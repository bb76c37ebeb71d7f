"""Batches as a function of (seed, step): the same for every method, every split over processes, and after a resume."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from dreambooth import SUBJECTS
from reslora_diffusion.diffusion.data.buckets import Buckets
from reslora_diffusion.diffusion.data.crops import Views
from reslora_diffusion.diffusion.data.encode import Example, encode_images
from reslora_diffusion.diffusion.data.sampling import Batch, Sampler, chunks
from reslora_diffusion.diffusion.data.scan import read_image_file, scan
from reslora_diffusion.diffusion.data.wordings import tag_orders, wordings
from reslora_diffusion.diffusion.models.families import FAMILIES, Texts
from reslora_diffusion.diffusion.objective.drawn_noise import NoiseRecipe
from reslora_diffusion.diffusion.objective.noise import Diffusion
from reslora_diffusion.diffusion.options import DreamBoothOptions
from tiny import tiny_vae

PROCESS = Diffusion(DDPMScheduler(num_train_timesteps=10))
MOMENTS = FAMILIES["StableDiffusionPipeline"].moments
KEEPING_ONE = DreamBoothOptions(keep_tokens=1)


def make_example(number: int, shape=(4, 8, 8), views=2, **options) -> Example:
    source = torch.Generator().manual_seed(number)
    return Example(
        name=f"{number}",
        mean=torch.randn(views, *shape, generator=source),
        logvar=torch.randn(views, *shape, generator=source) - 2,
        texts=[(f"prompt {number % 3}", Texts(torch.full((5, 6), float(number % 3))))],
        loss_weight=1.0,
        time_ids=torch.full((views, 6), float(number)),
        **options,
    )


def make_sampler(count=5, classes=0, **options) -> Sampler:
    return Sampler(
        [make_example(n) for n in range(count)],
        {0: [replace(make_example(100 + n), loss_weight=0.5) for n in range(classes)]} if classes else {},
        **{"seed": 7, "scaling_factor": 0.5, "process": Diffusion(DDPMScheduler())} | options,
    )


def assert_equal(first: Batch, second: Batch) -> None:
    for name in ("latents", "noise", "timesteps", "weights", "time_ids"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.equal(first.texts.hidden[first.prompt_index], second.texts.hidden[second.prompt_index])


def test_batches_are_a_function_of_seed_and_number():
    (first,), (again,), (other,) = (make_sampler(seed=seed).batches(8, 4) for seed in (7, 7, 8))
    assert_equal(first, again)
    assert not torch.equal(first.noise, other.noise)
    (next_one,) = make_sampler().batches(12, 4)
    assert not torch.equal(first.timesteps, next_one.timesteps)


def test_a_batch_is_what_two_halves_are_together():
    sampler = make_sampler(classes=3)
    (whole,) = sampler.batches(8, 4)
    (one,), (two,) = sampler.batches(8, 2), sampler.batches(10, 2)
    order = [0, 1, 4, 5]  # instances first, then as many class images
    for name in ("latents", "noise", "timesteps", "weights"):
        value = getattr(whole, name)
        assert torch.equal(value[order], getattr(one, name)), name
        assert torch.equal(value[[2, 3, 6, 7]], getattr(two, name)), name


def test_every_pass_shows_every_image_once():
    sampler = make_sampler(count=6)
    shown = [example.name for turn in range(6) for example in sampler.order(turn * 2, 2)]
    assert sorted(shown[:6]) == sorted(shown[6:]) == [str(n) for n in range(6)]


def test_latents_are_drawn_anew_from_the_posterior():
    example = make_example(0, views=1)
    sampler = Sampler([example], {}, seed=0, scaling_factor=0.5, process=PROCESS)
    drawn = torch.cat([sampler.batches(n * 64, 64)[0].latents for n in range(32)]) / 0.5
    torch.testing.assert_close(drawn.mean(0), example.mean[0], atol=0.15, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.exp(example.logvar[0] / 2), atol=0.1, rtol=0.1)


def test_class_images_join_with_their_weight_and_of_their_concept():
    examples = [make_example(0, concept=0), make_example(1, concept=1)]
    classes = {1: [replace(make_example(50), loss_weight=0.25, texts=[("class", Texts(torch.zeros(5, 6)))])]}
    sampler = Sampler(examples, classes, seed=0, scaling_factor=1.0, process=PROCESS)
    (batch,) = sampler.batches(0, 2)
    assert batch.weights.tolist() == [1.0, 1.0, 0.25]


def test_noise_offset_moves_whole_channels():
    plain, moved = (
        make_sampler(recipe=NoiseRecipe(noise_offset=offset)).batches(0, 4)[0].noise for offset in (0.0, 0.3)
    )
    difference = moved - plain
    assert difference.flatten(2).std(2).max() < 1e-6
    assert difference.abs().max() > 0.05


def test_caption_dropout_replaces_the_share_of_prompts_and_nothing_else():
    plain = make_sampler()
    dropping = make_sampler(caption_dropout=0.25, empty=Texts(torch.full((5, 6), -1.0)))
    (first,), (second,) = plain.batches(0, 400), dropping.batches(0, 400)
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(first.latents, second.latents)
    dropped = (second.texts.hidden[second.prompt_index] == -1).flatten(1).all(1)
    assert 0.15 < dropped.float().mean() < 0.35
    kept = ~dropped
    texts = [batch.texts.hidden[batch.prompt_index][kept] for batch in (first, second)]
    assert torch.equal(*texts)


def test_masks_follow_the_view_and_are_whole_where_there_is_none():
    masked = make_example(0, mask=torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.5)]))
    sampler = Sampler([masked, make_example(1)], {}, seed=0, scaling_factor=1.0, process=PROCESS)
    (batch,) = sampler.batches(0, 64)
    for draw, mask in zip(batch.latents, batch.masks, strict=True):
        value = mask.unique().item()
        distance = [(draw - mean).abs().mean() for mean in (*masked.mean, *sampler.instances[1].mean)]
        assert value == [0.0, 0.5, 1.0, 1.0][int(torch.stack(distance).argmin())]
    assert make_sampler().batches(0, 4)[0].masks is None


# ------------------------------------------------------------------------------------------------ several sizes


def test_examples_of_several_sizes_come_in_batches_of_one_size():
    examples = [make_example(n, shape=(4, 8, 8) if n % 3 else (4, 6, 10)) for n in range(9)]
    sampler = Sampler(examples, {}, seed=0, scaling_factor=1.0, process=PROCESS)
    seen = []
    for turn in range(5):  # one pass: 6 of one size and 3 of the other, in twos
        (batch,) = sampler.batches(turn * 2, 2)
        assert len(batch.latents) == 2
        seen += [example.name for example in sampler.order(turn * 2, 2)]
    assert set(seen) == {str(n) for n in range(9)}
    assert len(seen) == 10


def test_class_images_of_another_size_are_a_batch_of_their_own():
    classes = {0: [make_example(50, shape=(4, 6, 10))]}
    sampler = replace(make_sampler(), classes=classes)
    instance, of_class = sampler.batches(0, 4)
    assert instance.latents.shape == (4, 4, 8, 8)
    assert of_class.latents.shape == (4, 4, 6, 10)


def test_every_wording_of_a_caption_is_drawn_with_its_own_text():
    texts = [(f"wording {n}", Texts(torch.full((5, 6), float(n)))) for n in range(3)]
    sampler = make_sampler(count=1)
    worded = replace(sampler, instances=[replace(sampler.instances[0], texts=texts)])
    (one,), (several,) = (which.batches(0, 16) for which in (sampler, worded))
    assert torch.equal(one.noise, several.noise)  # nothing else is drawn differently
    assert torch.equal(one.timesteps, several.timesteps)
    drawn = several.texts.hidden[several.prompt_index][:, 0, 0]
    assert set(drawn.tolist()) == {0.0, 1.0, 2.0}


def test_tags_are_put_in_other_orders_behind_those_that_are_kept():
    caption = "sks,  cat, sitting, outdoors, sun"
    orders = tag_orders(caption, KEEPING_ONE)
    assert orders == tag_orders(caption, KEEPING_ONE)
    assert orders[0] == caption
    assert len(set(orders)) == len(orders) == 8
    for order in orders:
        first, *rest = [tag.strip() for tag in order.split(",")]
        assert (first, sorted(rest)) == ("sks", ["cat", "outdoors", "sitting", "sun"])
    assert len(tag_orders("sks, cat, sitting", KEEPING_ONE)) == 2
    assert tag_orders("sks, cat", KEEPING_ONE) == ["sks, cat"]


def read_as(caption: str, **options) -> list[str]:
    return wordings(caption, DreamBoothOptions(**options))


def test_tags_between_separators_alone_are_moved():
    orders = read_as("sks ||| cat, sitting, sun ||| sticker, best", shuffle_caption=True, keep_tokens_separator="|||")
    assert len(orders) == len(set(orders)) == 6
    for order in orders:
        first, *moved, sticker, best = order.split(", ")
        assert (first, sorted(moved), sticker, best) == ("sks", ["cat", "sitting", "sun"], "sticker", "best")
    without = read_as("sks, cat, sun", shuffle_caption=True, keep_tokens=2, keep_tokens_separator="|||")
    assert without == ["sks, cat, sun"]  # a caption without the separator has its first tags kept


def test_a_share_of_the_tags_is_left_out_and_the_rest_keeps_its_order():
    tags = [f"tag {n}" for n in range(200)]
    drawn = read_as(", ".join(["sks", *tags]), caption_tag_dropout_rate=0.25, keep_tokens=1)
    assert len(drawn) == 16
    left = []
    for wording in drawn:
        first, *others = wording.split(", ")
        assert first == "sks"
        assert others == [tag for tag in tags if tag in set(others)]
        left.append(len(others) / len(tags))
    assert 0.72 < sum(left) / len(left) < 0.78
    assert len(set(drawn)) == 16
    shuffled_too = read_as("sks, a, b, c, d", caption_tag_dropout_rate=0.25, keep_tokens=1, shuffle_caption=True)
    assert any(wording.split(", ")[1:] != sorted(wording.split(", ")[1:]) for wording in shuffled_too)


def test_wordings_are_drawn_with_the_weights_of_single_draws():
    drawn = read_as("sks, cat", caption_tag_dropout_rate=0.1, keep_tokens=1)
    assert set(drawn) == {"sks, cat", "sks"}
    assert drawn.count("sks, cat") > 10  # and not half of all, which each of two different wordings would be


def test_one_word_of_each_brace_and_one_line_are_chosen():
    drawn = read_as("a {red|blue} hat\n{{sks}} in {snow|rain|sun}", enable_wildcard=True)
    assert len(drawn) == 16
    every = {f"a {colour} hat" for colour in ("red", "blue")} | {f"{{sks}} in {w}" for w in ("snow", "rain", "sun")}
    assert set(drawn) == every
    assert read_as("a {red|blue} hat") == ["a {red|blue} hat"]
    assert read_as("a red hat", enable_wildcard=True) == ["a red hat"]


def test_tags_that_belong_together_are_moved_together():
    orders = read_as("sks, cat;;;black cat, sun, sea", shuffle_caption=True, secondary_separator=";;;")
    assert len(orders) == 8
    assert all("cat, black cat" in order for order in orders)
    assert not any(";" in order for order in orders)


def test_chunks_differ_from_pass_to_pass_and_are_of_one_size():
    sizes = (0, 0, 1, 0, 1, 2, 0)
    passes = [chunks(3, epoch, sizes, 2) for epoch in range(4)]
    assert len({str(one) for one in passes}) > 1
    for one in passes:
        assert all(len({sizes[place] for place in chunk}) == 1 for chunk in one)
        assert {place for chunk in one for place in chunk} == set(range(7))


# ------------------------------------------------------------------------------------------------ the cache


def test_the_cache_holds_the_posterior_and_pairs_each_image_with_its_own_prompt(tmp_path):
    torch.manual_seed(0)
    vae = tiny_vae()
    images = [replace(image, caption=f"number {n}") for n, image in enumerate(scan(SUBJECTS / "octopus").images)]
    images[2] = replace(images[2], caption=None)
    numbers = {f"number {n}": n for n in range(5)} | {"fallback": 9}
    texts = {prompt: [(prompt, Texts(torch.tensor([n])))] for prompt, n in numbers.items()}
    views = Views(Buckets(((64, 64),)), Image.Resampling.LANCZOS, center_crop=True, crops=1, flip=True)
    examples = encode_images(vae, images, views, prompt="fallback", texts=texts, moments=MOMENTS, threads=3)
    assert [example.name for example in examples] == [f"{n}.png" for n in range(5)]
    assert [text.hidden.item() for example in examples for _, text in example.texts] == [0, 1, 9, 3, 4]
    for number, example in enumerate(examples):
        pixels = torch.from_numpy(views.of(read_image_file(SUBJECTS / "octopus" / f"{number}.png")).pixels)
        with torch.no_grad():
            expected = vae.encode(pixels).latent_dist
        torch.testing.assert_close(example.mean, expected.mean)
        torch.testing.assert_close(example.logvar, expected.logvar)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_cache_does_not_depend_on_how_many_are_encoded_at_once(batch_size):
    torch.manual_seed(0)
    vae, images = tiny_vae(), scan(SUBJECTS / "cake").images
    views = Views(Buckets(((64, 64),)), Image.Resampling.LANCZOS, center_crop=True, crops=1, flip=True)
    texts = {"p": [("p", Texts(torch.zeros(1)))]}
    one = encode_images(vae, images, views, prompt="p", texts=texts, moments=MOMENTS, batch_size=batch_size)
    two = encode_images(vae, images, views, prompt="p", texts=texts, moments=MOMENTS, batch_size=2)
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first.mean, second.mean)
