"""Objective and data as kohya's scripts have them: noise, noise levels, buckets, prompts, numbered files."""

import json
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from scipy import stats

from dreambooth import SUBJECTS, train
from reslora_diffusion.diffusion.data.buckets import Buckets, Grid, limited_buckets, make_buckets
from reslora_diffusion.diffusion.data.concepts import concepts_of
from reslora_diffusion.diffusion.data.prompts import ValidationPrompt, read_prompts
from reslora_diffusion.diffusion.models.families import FAMILIES, Tokens
from reslora_diffusion.diffusion.models.families.long_prompts import in_pieces, joined
from reslora_diffusion.diffusion.objective.drawn_noise import NoiseRecipe, multires_noise
from reslora_diffusion.diffusion.objective.noise import Diffusion, FlowMatching, flux_shift, shifted
from reslora_diffusion.diffusion.options import parse
from reslora_diffusion.utils.problems import BadInput
from test_diffusion_sampling import make_sampler
from tiny import MAX_TOKENS, tiny_pipeline_xl, tiny_text_encoder, tiny_tokenizer

GRID = Grid(8, 64)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------ noise


def test_multires_noise_has_unit_variance_and_more_of_its_low_frequencies():
    plain = torch.randn(4, 64, 64, generator=source())
    noise = multires_noise(plain, 6, 0.5, source(1))
    assert noise.std().item() == pytest.approx(1)
    power = [torch.fft.rfft2(n)[:, :3, :3].abs().square().mean() / n.square().mean() for n in (plain, noise)]
    assert power[1] > 5 * power[0]
    assert torch.equal(noise, multires_noise(plain, 6, 0.5, source(1)))


def test_input_perturbation_changes_the_input_and_not_the_target():
    plain, perturbed = (make_sampler(recipe=NoiseRecipe(ip_noise_gamma=gamma)) for gamma in (None, 0.1))
    (without,), (batch,) = plain.batches(0, 64), perturbed.batches(0, 64)
    assert without.input_noise is None
    assert torch.equal(batch.noise, without.noise)
    assert torch.equal(batch.latents, without.latents)
    assert (batch.input_noise - batch.noise).std().item() == pytest.approx(0.1, rel=0.05)
    assert perturbed.spread(0, 4, 4)[0].input_noise is None  # what is measured is not perturbed
    (random,) = make_sampler(recipe=NoiseRecipe(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)).batches(0, 64)
    assert 0 < (random.input_noise - random.noise).flatten(1).std(1).min() < 0.02


def test_a_random_strength_scales_the_offset():
    recipe = NoiseRecipe(noise_offset=0.5, noise_offset_random_strength=True)
    numbers = source()
    moved = [recipe.shaped(torch.zeros(1, 2, 2), torch.zeros(1), numbers).unique().item() for _ in range(3000)]
    # (U z): variance E[U^2] = 1/3 of the whole offset's
    assert np.var(moved) == pytest.approx(0.25 / 3, rel=0.1)


@pytest.mark.parametrize("scale", [0.4, -0.4])
def test_an_adaptive_offset_follows_the_latents_as_in_kohyas_scripts(scale):
    """`apply_noise_offset`: max(0, offset + scale |mean of a channel|), written again in float64."""
    plain = make_sampler(recipe=NoiseRecipe(noise_offset=0.05))
    sampler = make_sampler(recipe=NoiseRecipe(noise_offset=0.05, adaptive_noise_scale=scale))
    (without,), (batch,) = plain.batches(0, 16), sampler.batches(0, 16)
    assert torch.equal(batch.latents, without.latents)
    (bare,) = make_sampler().batches(0, 16)
    means = batch.latents.double().mean((2, 3)).abs()
    assert means.min() < 0.05 / 0.4 < means.max(), "an offset below 0 is among them"
    drawn = (without.noise - bare.noise).double().mean((2, 3)) / 0.05
    expected = (0.05 + scale * means).clamp(min=0) * drawn
    torch.testing.assert_close((batch.noise - bare.noise).double().mean((2, 3)), expected, atol=1e-6, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- noise levels


def test_timesteps_stay_in_the_span():
    process = Diffusion(DDPMScheduler(), min_timestep=200, max_timestep=700)
    numbers = source()
    drawn = [process.draw(numbers) for _ in range(2000)]
    assert 200 <= min(drawn) < 215
    assert 685 < max(drawn) < 700
    batches = make_sampler(process=process).spread(0, 4, 4)
    assert batches[0].timesteps.tolist() == [262, 387, 512, 637]
    assert list(Diffusion(DDPMScheduler()).span) == list(range(1000))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_span_is_of_what_the_model_is_told(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = FlowMatching(scheduler, weighting_scheme="none", min_timestep=300, max_timestep=800)
    numbers = source()
    times = process.times(torch.tensor([process.draw(numbers) for _ in range(2000)]))
    assert 300 <= times.min() < 310
    assert 790 < times.max() < 800


def levels(sampling: str, shape=(16, 64, 64), **options) -> np.ndarray:
    process = FlowMatching(FlowMatchEulerDiscreteScheduler(shift=3.0), timestep_sampling=sampling, **options)
    numbers = source()
    return process.sigma(torch.tensor([process.draw(numbers, shape) for _ in range(4000)])).numpy()


@pytest.mark.parametrize(
    ("sampling", "options", "quantile"),
    [
        ("uniform", {}, lambda q: q),
        ("sigmoid", {"sigmoid_scale": 2.0}, lambda q: 1 / (1 + np.exp(-2 * stats.norm.ppf(q)))),
        (
            "shift",
            {"discrete_flow_shift": 3.1582},
            lambda q: 3.1582 * (s := 1 / (1 + np.exp(-stats.norm.ppf(q)))) / (1 + 2.1582 * s),
        ),
        (
            "flux_shift",
            {},
            lambda q: (
                (e := math.exp(1.15 - 0.65 * (4096 - 1024) / 3840))
                / (e + 1 / (1 / (1 + np.exp(-stats.norm.ppf(q)))) - 1)
            ),
        ),
    ],
)
def test_noise_levels_are_distributed_as_kohyas_samplers_have_them(sampling, options, quantile):
    drawn = levels(sampling, **options)
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert np.quantile(drawn, q) == pytest.approx(quantile(q), abs=0.03), q


def test_the_shift_of_a_flow_in_training_replaces_the_bases():
    args = parse(["--discrete_flow_shift", "1.0", "--resolution", "64"])
    args.take_defaults(FAMILIES["FluxPipeline"])
    for dynamic in (False, True):
        pipeline = Namespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic))
        process = FAMILIES["FluxPipeline"].process(pipeline, args)
        assert process.sigma(torch.tensor([500])).item() == pytest.approx(0.5, abs=2e-3)
    args.discrete_flow_shift = 3.0
    pipeline = Namespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True))
    process = FAMILIES["FluxPipeline"].process(pipeline, args)
    assert process.sigma(torch.tensor([500])).item() == pytest.approx(shifted(0.5, 3.0), abs=2e-3)
    assert flux_shift((16, 128, 128)) == pytest.approx(math.exp(1.15))


# ---------------------------------------------------------------------------------------------------- buckets


def test_limited_buckets_are_kohyas():
    """Sides between the two limits, on the step, as many pixels as fit: written out for 512 x 512, 256 to 768, 128."""
    wanted = {(512, 512), (256, 768), (768, 256), (384, 640), (640, 384), (512, 512)}
    assert set(limited_buckets(512 * 512, 256, 768, 128)) == wanted
    made = make_buckets("auto", 512, GRID, min_bucket_reso=256, max_bucket_reso=768, bucket_reso_steps=128)
    assert set(made.sizes) == wanted
    assert made.of((3000, 1000)) == (768, 256)


def test_no_upscale_trains_small_images_at_their_own_size():
    made = make_buckets("auto", 512, GRID, bucket_reso_steps=64, bucket_no_upscale=True)
    assert made.of((200, 300)) == (192, 256)
    assert made.of((512, 512)) == (512, 512)
    width, height = made.of((4000, 2000))
    assert (width % 64, height % 64) == (0, 0)
    assert width * height <= 512**2
    assert width / height == pytest.approx(2, abs=0.4)
    assert made.all([(200, 300), (200, 300), (512, 512)]) == [(192, 256), (512, 512)]


def test_limits_that_fit_no_model_are_named_together():
    with pytest.raises(BadInput) as error:
        make_buckets("auto", 512, GRID, min_bucket_reso=100, max_bucket_reso=84, bucket_reso_steps=60)
    assert len(error.value.problems) == 4


# ---------------------------------------------------------------------------------------------------- prompts


def test_a_file_of_prompts_has_settings_for_each(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a remark\na dog, --n blurry, ugly --w 768 --h 512 --d 42 --s 20 --l 6.5\n\na cat --ss euler_a\n")
    found = read_prompts(path)
    dog, cat = found.prompts
    wanted = ValidationPrompt("a dog,", "blurry, ugly", width=768, height=512, seed=42, sample_steps=20, scale=6.5)
    assert (dog, cat) == (wanted, ValidationPrompt("a cat"))
    assert found.not_used == [f"--sample_prompts {path}, line 4: sample_sampler is not used"]
    (tmp_path / "p.json").write_text(json.dumps(["a dog --w 64", {"prompt": "a cat", "seed": 3}]))
    assert read_prompts(tmp_path / "p.json").prompts == [
        ValidationPrompt("a dog", width=64),
        ValidationPrompt("a cat", seed=3),
    ]
    (tmp_path / "p.toml").write_text(
        '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a dog"\n[[prompt.subset]]\nprompt = "a cat"\nwidth = 32\n'
    )
    assert [p.width for p in read_prompts(tmp_path / "p.toml").prompts] == [64, 32]


def test_bad_lines_of_a_file_of_prompts_are_named_with_the_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a dog --w many\na cat --q 3 --h 0\n--w 64\n")
    with pytest.raises(BadInput) as error:
        read_prompts(path)
    first, second, third, fourth = error.value.problems
    assert "line 1: --w 'many', wanted a whole number in 'a dog --w many'" in first
    assert "line 2: unknown switch --q (wanted --w, --h, --d" in second
    assert "a cat --q 3 --h 0" in third
    assert "--h '0', wanted 1 or more" in third
    assert "line 3: no prompt" in fourth


# ----------------------------------------------------------------------------------------------- long prompts


def test_a_long_prompt_is_read_in_pieces_each_with_a_start_and_an_end(tmp_path):
    """Each piece is encoded as a prompt of its own words; the first start and the last end are kept."""
    tokenizer = tiny_tokenizer(tmp_path)
    torch.manual_seed(0)
    encoder = tiny_text_encoder(tokenizer)
    words = ["dog", "octopus", "sticker", "blue", "photo"] * 12  # one token each: more than a piece of 30
    prompt = " ".join(words)
    tokens = tokenizer(prompt).input_ids[1:-1]
    assert MAX_TOKENS - 2 < len(tokens) < 3 * (MAX_TOKENS - 2)
    family = FAMILIES["StableDiffusionPipeline"]
    ids = family.tokenize([tokenizer], [prompt], None, pieces=3)
    assert ids.shape == (1, 1, 3 * MAX_TOKENS)
    with torch.no_grad():
        (hidden,) = family.encode([encoder], Tokens(ids)).hidden
        start, end, size = tokenizer.bos_token_id, tokenizer.eos_token_id, MAX_TOKENS - 2
        alone = []
        for n in range(3):
            piece = tokens[n * size : (n + 1) * size]
            whole = [start, *piece, *[end] * (size - len(piece)), end]
            alone.append(encoder(torch.tensor([whole]))[0][0])
    inner = torch.cat([part[1:-1] for part in alone])
    torch.testing.assert_close(hidden, torch.cat([alone[0][:1], inner, alone[-1][-1:]]))
    assert torch.equal(family.tokenize([tokenizer], ["a dog"], None), family.tokenize([tokenizer], ["a dog"], None, 1))


def test_pieces_of_a_tokenizer_whose_padding_is_no_end_have_an_end():
    tokenizer = Namespace(eos_token_id=9, pad_token_id=0)
    whole = torch.tensor([[1, 5, 6, 7, 8, 9, 0, 0, 0, 0]])  # start, 4 tokens, end, padding: pieces of 4
    assert in_pieces(whole, 2, tokenizer).tolist() == [[1, 5, 6, 7, 8, 9, 1, 9, 0, 0, 0, 0]]
    states = torch.arange(12.0).reshape(2, 6, 1)
    assert joined(states, 2).flatten().tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]


# ------------------------------------------------------------------------------------------------- whole runs


def test_a_concept_may_have_options_of_its_own(tmp_path):
    entries = [
        {
            "instance_data_dir": str(SUBJECTS / "octopus"),
            "instance_prompt": "sks",
            "resolution": 32,
            "random_flip": True,
        },
        {"instance_data_dir": str(SUBJECTS / "cake"), "instance_prompt": "cake, red", "caption_prefix": "ohwx"},
    ]
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(entries))
    args = parse(["--concepts", str(path), "--resolution", "64"])
    first, second = concepts_of(args)
    assert first.own == {"resolution": 32, "random_flip": True}
    assert second.instance_prompt == "ohwx cake, red"
    path.write_text(json.dumps([entries[0] | {"random_flip": 1}]))
    with pytest.raises(BadInput, match="random_flip is 1, wanted bool"):
        concepts_of(args)


def test_a_run_with_everything_of_kohyas_objective(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a sticker --w 48 --h 32 --d 5 --s 1\na photo --n a sticker --l 2\n")
    tall = tmp_path / "data"
    tall.mkdir()
    for number, size in enumerate([(40, 64), (64, 64), (200, 100)]):
        Image.open(SUBJECTS / "octopus" / f"{number}.png").resize(size).save(tall / f"{number}.png")
    options = {
        "instance_data_dir": tall,
        "pretrained_model_name_or_path": tiny_pipeline_xl(tmp_path / "model") and tmp_path / "model",
        "aspect_ratio_buckets": "auto",
        "bucket_no_upscale": True,
        "bucket_reso_steps": 16,
        "multires_noise_iterations": 4,
        "ip_noise_gamma": 0.1,
        "noise_offset": 0.1,
        "noise_offset_random_strength": True,
        "min_timestep": 100,
        "max_timestep": 900,
        "max_token_length": 150,
        "sample_prompts": prompts,
        "validation_prompt": ["an octopus"],
        "num_validation_images": 1,
        "train_batch_size": 1,
        "num_train_epochs": 2,
        "max_train_steps": None,
        "checkpointing_epochs": 1,
        "export_name": "sks",
    }
    train(tmp_path / "out", **options)
    sizes = {p.name: Image.open(p).size for p in (tmp_path / "out" / "samples" / "step-000006").iterdir()}
    assert sizes == {"0-0.png": (64, 64), "1-0.png": (48, 32), "2-0.png": (64, 64)}
    names = sorted(p.name for p in (tmp_path / "out").glob("**/kohya/*.safetensors"))
    assert names == ["sks-000001.safetensors", "sks-000002.safetensors", "sks.safetensors"]


def test_views_of_one_image_at_two_resolutions_are_two_sizes():
    assert Buckets(((64, 64),)).of((10, 20)) == (64, 64)
    assert replace(Buckets(()), no_upscale=8, area=1024, smallest=16).of((10, 20)) == (16, 16)


def test_only_a_line_feed_ends_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red\u2028panda --w 64\na blue\u0085panda\n", encoding="utf-8")
    assert len(read_prompts(path).prompts) == 2
