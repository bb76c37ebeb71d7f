"""The recipe of the embedded pipeline: its optimizer, its loop, its autoencoder's parts, its captions and its judge."""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn
from transformers import CLIPTokenizer

from benchmarks import dreambooth

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "train_scripts"))

import pretrain_sticker_pipeline as recipe  # noqa: E402
import sticker_autoencoder  # noqa: E402
import sticker_data  # noqa: E402
import sticker_judge  # noqa: E402
import sticker_models  # noqa: E402
import sticker_muon  # noqa: E402
import sticker_training  # noqa: E402

needs_font = pytest.mark.skipif(
    not any(Path(path).is_file() for path in sticker_data.FONT_PATHS), reason="Noto Color Emoji is not installed"
)


# ------------------------------------------------------------------------------------------------ optimizer and loop


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12)])
def test_the_orthogonal_step_has_the_singular_vectors_of_the_gradient(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    u, values, v = torch.linalg.svd(sticker_muon.orthogonal(gradient).double(), full_matrices=False)
    assert 0.3 < values.min()
    assert values.max() < 1.3
    exact_u, _, exact_v = torch.linalg.svd(gradient.double(), full_matrices=False)
    alike = torch.nn.functional.cosine_similarity((u @ v).flatten(), (exact_u @ exact_v).flatten(), dim=0)
    assert alike > 0.97


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3))


def test_kernels_between_the_first_and_the_last_are_muons_and_the_rest_adamws() -> None:
    net, plain = small_net(), small_net()
    optimizer = sticker_muon.make_muon(net, 1e-2, first_and_last=("0", "4"))
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    before = net[2].weight.detach().clone()
    for model, each in ((net, optimizer), (plain, adamw)):
        torch.manual_seed(1)
        model(torch.randn(2, 3, 9, 9)).square().mean().backward()
        gradient = model[2].weight.grad.flatten(1)
        each.step()
    for name, value in plain.named_parameters():
        if name != "2.weight":
            torch.testing.assert_close(net.get_parameter(name), value)
    wanted = 1e-2 * 0.2 * 72**0.5 * sticker_muon.orthogonal(1.95 * gradient).view_as(before)
    torch.testing.assert_close(before - net[2].weight, wanted)
    assert len(optimizer.param_groups) == 2


def test_a_resumed_training_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    def run(folder: str, stop_at: int | None) -> nn.Module:
        net = small_net()
        args = argparse.Namespace(work_dir=tmp_path / folder, seed=0, device="cpu", checkpointing_minutes=0)

        def step(index: int, generator: torch.Generator) -> torch.Tensor:
            if index == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(2, 3, 9, 9, generator=generator)
            return (net(x) - x[:, :, 3:-3, 3:-3]).square().mean()

        optimizer = sticker_muon.make_muon(net, 1e-2, first_and_last=("0", "4"))
        sticker_training.train(args, "net", net, step, steps=6, optimizer=optimizer)
        return net

    unbroken = run("unbroken", None)
    with pytest.raises(KeyboardInterrupt):
        run("broken", 4)
    resumed = run("broken", None)
    assert not torch.equal(unbroken[2].weight, small_net()[2].weight)
    for name, value in unbroken.named_parameters():
        assert torch.equal(resumed.get_parameter(name), value), name


# ------------------------------------------------------------------------------------------------ autoencoder


def test_centred_latents_have_mean_zero_and_decode_to_the_same() -> None:
    torch.manual_seed(0)
    vae = sticker_models.make_vae().eval()
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        nn.init.normal_(vae.quant_conv.bias)
        latents = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(latents).sample
        assert latents.mean(dim=(0, 2, 3)).abs().max() > 0.1
        sticker_autoencoder.centre(vae, latents)
        centred = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(centred.mean(dim=(0, 2, 3)), torch.zeros(centred.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(vae.decode(centred).sample, decoded, atol=1e-5, rtol=1e-4)
    assert abs(vae.config.scaling_factor * centred.std().item() - 1) < 1e-3


def test_psnr_is_that_of_a_known_error() -> None:
    image = np.full((3, 4, 4), 100, dtype=np.uint8)
    assert sticker_autoencoder.psnr(image, image + 10) == pytest.approx(20 * np.log10(25.5))


def test_new_latents_start_only_the_layers_anew_that_read_and_write_them() -> None:
    pipeline = ROOT / "assets" / "sticker-sd"
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    model = sticker_models.StickerModel(tokenizer, latent_channels=7)
    assert model.load_weights(pipeline) == ["unet.conv_in.weight", "unet.conv_out.weight", "unet.conv_out.bias"]


@needs_font
def test_scenes_are_a_function_of_the_seed_and_hold_no_held_out_subject() -> None:
    from sticker_scenes import draw_scenes

    emoji = sticker_data.all_emoji()
    assert not {held_out for held_out, _ in sticker_data.HELD_OUT.values()} & set(emoji)
    first, again, other = (draw_scenes(emoji[:40], 12, random.Random(seed)) for seed in (1, 1, 2))
    assert first.shape == (12, 3, 64, 64)
    assert first.min() >= -1
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------------------------------ captions and judge


@pytest.mark.parametrize(
    ("layout", "other", "wanted"),
    [
        ("plain", "", "a sticker of an owl on a blue background"),
        ("small", "", "a sticker of a small owl on a blue background"),
        ("left", "", "a sticker of an owl on the left on a blue background"),
        ("pair", "fox face", "a sticker of an owl and a fox face on a blue background"),
    ],
)
def test_a_caption_says_the_layout(layout: str, other: str, wanted: str) -> None:
    assert sticker_data.caption(sticker_data.phrase(layout, "owl", other), "blue") == wanted


def test_a_caption_of_a_training_row_names_what_is_drawn() -> None:
    layouts, names = list(sticker_data.LAYOUTS), [s.name for s in sticker_data.subjects()]
    texts = {recipe.make_caption(random.Random(seed), 3, 4, layouts.index("pair"), 7) for seed in range(40)}
    assert "" in texts
    assert all(names[7] in text and "blue" in text for text in texts if text)
    assert any(names[3] in text for text in texts)


def square(left: float, size: float) -> Image.Image:
    """A white square on blue, in shares of the image."""
    image = Image.new("RGB", (64, 64), sticker_data.BACKGROUNDS["blue"])
    box = [64 * left, 64 * (0.5 - size / 2), 64 * (left + size) - 1, 64 * (0.5 + size / 2) - 1]
    ImageDraw.Draw(image).rectangle(box, fill="white")
    return image


def test_the_judge_tells_sizes_and_places_apart() -> None:
    images = {
        "plain": square(0.15, 0.7),
        "small": square(0.3, 0.4),
        "large": square(0.05, 0.9),
        "left": square(0.02, 0.5),
        "right": square(0.48, 0.5),
    }
    for layout, image in images.items():
        assert sticker_judge.judge_layout(image, layout, ["owl", ""]), layout
    assert not sticker_judge.judge_layout(images["large"], "small", ["owl", ""])
    assert not sticker_judge.judge_layout(images["left"], "right", ["owl", ""])
    assert not sticker_judge.judge_layout(Image.new("RGB", (64, 64), "blue"), "plain", ["owl", ""])


@needs_font
def test_the_judge_is_right_about_drawings_of_every_layout() -> None:
    rng, right, total = random.Random(0), 0, 0
    for layout in sticker_data.LAYOUTS:
        for subject in sticker_data.subjects()[::6]:
            other = rng.choice(sticker_data.subjects()) if layout == "pair" else None
            names = [subject.name, other.name if other else ""]
            colour = sticker_data.BACKGROUNDS["blue"]
            image = sticker_data.draw_at_random(subject.emoji, colour, rng, layout, other.emoji if other else "")
            right += sticker_judge.judge_layout(image, layout, names)
            total += 1
    assert right / total > 0.9


def test_sharpness_is_the_mean_gradient() -> None:
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).convert("RGB")
    assert sticker_judge.sharpness([ramp]) == pytest.approx(1 / 255, rel=1e-5)


# ------------------------------------------------------------------------------------------------ benchmarks.dreambooth


def test_new_backgrounds_are_those_without_a_training_image() -> None:
    assert len(dreambooth.new_backgrounds("panda")) == 3
    seen = {sticker_judge.judge_background(Image.open(f)) for f in (ROOT / "assets/subjects/panda").glob("*.png")}
    assert not seen & set(dreambooth.new_backgrounds("panda"))


def test_wilsons_interval_is_the_known_one() -> None:
    assert dreambooth.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert dreambooth.wilson(10, 10)[1] == 1


def test_trainings_of_other_settings_do_not_count() -> None:
    base = {"weights": "abc", "steps": 300, "rank": 4, "seeds": [0]}
    assert dreambooth.name_of(base | {"seeds": [1, 2]}) == dreambooth.name_of(base)  # of the images
    assert len({dreambooth.name_of(base | other) for other in ({}, {"rank": 8}, {"steps": 9}, {"weights": "d"})}) == 4


@needs_font
def test_drawings_are_judged_as_what_they_are(tmp_path: Path) -> None:
    colours, rng = ["red", "blue"], random.Random(0)
    owl = next(s.emoji for s in sticker_data.subjects() if s.name == "owl")
    for n, emoji in enumerate([sticker_data.HELD_OUT["panda"][0]] * 2 + [owl, sticker_data.HELD_OUT["panda"][0]]):
        colour = sticker_data.BACKGROUNDS[colours[n % 2]]
        sticker_data.draw_at_random(emoji, colour, rng).save(tmp_path / f"{n}-5.png")
    right = dreambooth.judge_images(tmp_path, "panda", colours, [5])
    assert right == {"subject": [2, 2], "background": [2, 2], "class": [1, 2]}
