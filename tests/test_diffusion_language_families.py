"""Families whose only text encoder is never trained: encoding, loss, training and export as in their own pipelines."""

import copy
import inspect
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from dreambooth import PROMPT, train
from lora_factors import random_factors
from reslora_diffusion import ResLoraConfig, attach, explain
from reslora_diffusion.diffusion.data.examples import prepare_texts
from reslora_diffusion.diffusion.data.sampling import Batch, together
from reslora_diffusion.diffusion.models.attn_processor import set_attn_processors
from reslora_diffusion.diffusion.models.families import FAMILIES, Texts
from reslora_diffusion.diffusion.models.memory import save_memory
from reslora_diffusion.diffusion.objective.loss import Denoiser, Objective
from reslora_diffusion.diffusion.objective.randomness import Stream, generator
from reslora_diffusion.diffusion.options import DreamBoothOptions
from reslora_diffusion.export import export_lora, fuse, inspect_lora, verify_lora
from reslora_diffusion.export.geometry import BaseKind, family_of_widths
from reslora_diffusion.utils.problems import BadInput
from tiny import saved, tiny_pipeline_flux
from tiny_families import (
    tiny_aura_flow,
    tiny_chroma,
    tiny_flux_2,
    tiny_flux_2_klein,
    tiny_lumina_2,
    tiny_qwen_image,
    tiny_sana,
    tiny_z_image,
)

BUILDERS = (
    *(tiny_qwen_image, tiny_z_image, tiny_flux_2_klein, tiny_flux_2),
    *(tiny_sana, tiny_lumina_2, tiny_chroma, tiny_aura_flow),
)
LENGTH = 40
OPTIONS = DreamBoothOptions(max_sequence_length=LENGTH, training_guidance_scale=2.0)
GUIDANCE = 2.0  # as an input, of FLUX.2-dev
PROMPTS = ["an octopus", "a photo of a dog on a blue background"]


def load(build) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(saved(build))
    pipeline.set_progress_bar_config(disable=True)
    if build is tiny_chroma:  # whose pipeline of diffusers adds its mask to the attention instead of masking
        prepare = pipeline._prepare_attention_mask
        pipeline._prepare_attention_mask = lambda **given: prepare(**given).bool()
    return pipeline


@pytest.fixture(params=BUILDERS)
def family_and_pipeline(request):
    pipeline = load(request.param)
    return FAMILIES[type(pipeline).__name__], pipeline


def encoded_by_pipeline(pipeline, prompts) -> tuple:
    known = inspect.signature(pipeline.encode_prompt).parameters
    more = {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in known else {}
    if "complex_human_instruction" in known:
        called = inspect.signature(pipeline.__call__).parameters
        more["complex_human_instruction"] = called["complex_human_instruction"].default
    with torch.no_grad():
        return pipeline.encode_prompt(list(prompts), device="cpu", max_sequence_length=LENGTH, **more)


def rows(encoded: tuple) -> list[torch.Tensor]:
    """What a pipeline's `encode_prompt` gives each prompt, without padding."""
    states, mask = encoded[0], encoded[2 if len(encoded) > 4 else 1]  # Chroma's places stand between
    if isinstance(states, list) or not isinstance(mask, torch.Tensor) or mask.shape != states.shape[:2]:
        return list(states)
    return [row[own.bool()] for row, own in zip(states, mask, strict=True)]


def arguments_of_pipeline(pipeline, family) -> dict:
    return {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", **family.guided_by(4.0, 1)}


def test_texts_are_encoded_as_the_pipeline_does_it(family_and_pipeline):
    """Also the longer prompt, which is cut, and the shorter one beside it, which the pipeline pads."""
    family, pipeline = family_and_pipeline
    ours = family.encode((), family.read(pipeline, PROMPTS, OPTIONS))
    texts = prepare_texts(pipeline, family, PROMPTS, OPTIONS)
    for place, (prompt, theirs) in enumerate(zip(PROMPTS, rows(encoded_by_pipeline(pipeline, PROMPTS)), strict=True)):
        own = slice(None) if ours.mask is None else ours.mask[place]
        torch.testing.assert_close(ours.hidden[place][own], theirs)
        torch.testing.assert_close(texts[prompt].hidden, theirs)
        assert texts[prompt].mask is None


def test_images_from_encoded_texts_are_those_from_prompts(family_and_pipeline):
    family, pipeline = family_and_pipeline
    texts, negative = (family.encode((), family.read(pipeline, [p], OPTIONS, [not p])) for p in (PROMPTS[0], ""))
    given = arguments_of_pipeline(pipeline, family)
    theirs = pipeline(
        prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), max_sequence_length=LENGTH, **given
    ).images
    given.pop("negative_prompt", None)
    ours = pipeline(
        **family.pipeline_inputs(pipeline, texts, negative), generator=torch.Generator().manual_seed(0), **given
    ).images
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def padded(states) -> tuple[torch.Tensor, torch.Tensor]:
    """States of prompts as one tensor, and which of it are theirs."""
    own = [torch.ones(len(part), dtype=torch.long) for part in states]
    return pad_sequence(states, batch_first=True), pad_sequence(own, batch_first=True)


def between(start, end, times) -> torch.Tensor:
    """(1 - sigma) start + sigma end, at the noise levels of times [B]."""
    sigma = (times / 1000)[:, None, None, None]
    return (1 - sigma) * start + sigma * end


def script_qwen_image(pipeline, latents, noise, times, states):
    """The prediction of train_dreambooth_lora_qwen_image.py; latents of a frame [B, C, 1, h, w]."""
    noisy = between(latents, noise, times)
    _, channels, height, width = noisy.shape
    tokens = pipeline._pack_latents(noisy, len(noisy), channels, height, width)
    hidden, mask = padded(states)
    prediction = pipeline.transformer(
        hidden_states=tokens,
        encoder_hidden_states=hidden,
        encoder_hidden_states_mask=mask,
        timestep=times / 1000,
        img_shapes=[(1, height // 2, width // 2)] * len(noisy),
        return_dict=False,
    )[0]
    return pipeline._unpack_latents(prediction, height * 8, width * 8, 8)[:, :, 0]


def script_z_image(pipeline, latents, noise, times, states):
    """The prediction of train_dreambooth_lora_z_image.py."""
    noisy = between(latents, noise, times).unsqueeze(2)
    found = pipeline.transformer(list(noisy.unbind(0)), (1000 - times) / 1000, states, return_dict=False)[0]
    return -torch.stack(found).squeeze(2)


def script_flux_2(pipeline, latents, noise, times, states):
    """The prediction of train_dreambooth_lora_flux2.py and of klein's; latents are patches that are normalised."""
    noisy = between(latents, noise, times)
    places, hidden = pipeline._prepare_latent_ids(noisy), torch.stack(states)
    guided = pipeline.transformer.config.guidance_embeds
    prediction = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy),
        timestep=times / 1000,
        guidance=torch.full([1], GUIDANCE).expand(len(noisy)) if guided else None,
        encoder_hidden_states=hidden,
        txt_ids=pipeline._prepare_text_ids(hidden),
        img_ids=places,
        return_dict=False,
    )[0]
    if guided:
        return pipeline._unpack_latents_with_ids(prediction, places)
    return pipeline._unpack_latents_with_ids(prediction, places, *noisy.shape[2:])


def script_sana(pipeline, latents, noise, times, states):
    """The prediction of train_dreambooth_lora_sana.py."""
    hidden, mask = padded(states)
    return pipeline.transformer(
        hidden_states=between(latents, noise, times),
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=times,
        return_dict=False,
    )[0]


def script_lumina_2(pipeline, latents, noise, times, states):
    """The prediction of train_dreambooth_lora_lumina2.py, whose sigma is the share of the data, with the other sign."""
    hidden, mask = padded(states)
    return -pipeline.transformer(
        hidden_states=between(noise, latents, times),
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=times / 1000,
        return_dict=False,
    )[0]


def script_chroma(pipeline, latents, noise, times, states):
    """The prediction of ChromaPipeline, for prompts that are padded to one length."""
    noisy = between(latents, noise, times)
    _, channels, height, width = noisy.shape
    tokens = pipeline._pack_latents(noisy, len(noisy), channels, height, width)
    hidden, mask = padded(states)
    whole = dict(batch_size=len(noisy), sequence_length=tokens.shape[1], dtype=noisy.dtype, attention_mask=mask)
    prediction = pipeline.transformer(
        hidden_states=tokens,
        encoder_hidden_states=hidden,
        timestep=times / 1000,
        txt_ids=torch.zeros(hidden.shape[1], 3),
        img_ids=pipeline._prepare_latent_image_ids(len(noisy), height // 2, width // 2, "cpu", noisy.dtype),
        attention_mask=pipeline._prepare_attention_mask(**whole),
        return_dict=False,
    )[0]
    return pipeline._unpack_latents(prediction, height * 8, width * 8, 8)


def script_aura_flow(pipeline, latents, noise, times, states):
    """The prediction of AuraFlowPipeline."""
    noisy = between(latents, noise, times)
    hidden = torch.stack(states)
    return pipeline.transformer(noisy, encoder_hidden_states=hidden, timestep=times / 1000, return_dict=False)[0]


SCRIPTS = {
    "AuraFlowPipeline": script_aura_flow,
    "ChromaPipeline": script_chroma,
    "SanaPipeline": script_sana,
    "Lumina2Pipeline": script_lumina_2,
    "QwenImagePipeline": script_qwen_image,
    "ZImagePipeline": script_z_image,
    "Flux2KleinPipeline": script_flux_2,
    "Flux2Pipeline": script_flux_2,
}


def normalised(pipeline, pixels, noise) -> torch.Tensor:
    """Latents of pixels as the scripts have them, and as the pipelines undo it."""
    config = pipeline.vae.config
    if type(pipeline).__name__ == "SanaPipeline":
        return pipeline.vae.encode(pixels).latent * config.scaling_factor
    if type(pipeline).__name__ in ("Lumina2Pipeline", "ChromaPipeline", "AuraFlowPipeline"):
        found = pipeline.vae.encode(pixels).latent_dist
        return (found.mean + found.std * noise - (config.shift_factor or 0.0)) * config.scaling_factor
    if "Flux2" in type(pipeline).__name__:
        bn, patches = pipeline.vae.bn, pipeline._patchify_latents(pipeline.vae.encode(pixels).latent_dist.mode())
        deviation = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
        return (patches - bn.running_mean.view(1, -1, 1, 1)) / deviation
    if type(pipeline).__name__ == "QwenImagePipeline":
        found = pipeline.vae.encode(pixels[:, :, None]).latent_dist
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (found.mean[:, :, 0] + found.std[:, :, 0] * noise - mean) * (1 / std)
    return (pipeline.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor


def test_latents_are_those_of_the_script(family_and_pipeline):
    family, pipeline = family_and_pipeline
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, logvar = family.moments(pipeline.vae, pixels)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        factor, shift = family.normalisation(pipeline.vae)
        ours = factor * (mean + torch.exp(0.5 * logvar) * noise - shift)
        torch.testing.assert_close(ours, normalised(pipeline, pixels, noise))
    assert ours.shape[1] == family.latent_channels(pipeline.transformer.config)
    assert 64 // ours.shape[-1] == family.vae_scale_factor(pipeline.vae.config)


def test_the_loss_is_that_of_the_script(family_and_pipeline):
    """In float64, for prompts of different lengths in one batch."""
    family, pipeline = family_and_pipeline
    pipeline.transformer.double()
    process = family.process(pipeline, OPTIONS)
    timesteps = torch.tensor([100, 700])
    draws = torch.Generator().manual_seed(0)
    channels = family.latent_channels(pipeline.transformer.config)
    latents, noise = torch.randn(2, 2, channels, 8, 12, generator=draws, dtype=torch.float64)
    texts = prepare_texts(pipeline, family, PROMPTS, OPTIONS)
    batch = Batch(
        latents, noise, timesteps, together([*texts.values()]), torch.tensor([0, 1]), torch.ones(2), torch.zeros(2, 6)
    )
    guidance = family.training_guidance(pipeline.transformer.config, OPTIONS)
    denoiser = Denoiser(family, pipeline.transformer, (), process, torch.float64, Objective(), guidance)
    with torch.no_grad():
        losses = denoiser.losses(batch)
        times = pipeline.scheduler.timesteps[timesteps].double()
        states = [states.double() for states in rows(encoded_by_pipeline(pipeline, PROMPTS))]
        prediction = SCRIPTS[type(pipeline).__name__](pipeline, latents, noise, times, states)
    wanted = (prediction - (noise - latents)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(losses[0], losses[1])
    assert torch.equal(process.weights(timesteps), torch.ones(2))


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "logit_normal"])
def test_weights_of_noise_levels_are_those_of_the_script(family_and_pipeline, scheme):
    """`compute_loss_weighting_for_sd3` of the level in the schedule, which is the share of the data for Lumina 2."""
    family, pipeline = family_and_pipeline
    process = family.process(pipeline, OPTIONS.changed(weighting_scheme=scheme))
    timesteps = torch.arange(1000)
    levels = pipeline.scheduler.timesteps.double() / 1000
    found = process.weights(timesteps)
    wanted = {"sigma_sqrt": levels**-2, "cosmap": 2 / (math.pi * (1 - 2 * levels + 2 * levels**2))}
    torch.testing.assert_close(found.double(), wanted.get(scheme, torch.ones_like(levels)), rtol=1e-4, atol=0)


def test_flux_shift_goes_by_the_number_of_tokens(family_and_pipeline):
    """The middle of the levels for images of 1024 pixels, beside the number of tokens that their pipelines make."""
    family, pipeline = family_and_pipeline
    process, source = family.process(pipeline, OPTIONS.changed(timestep_sampling="flux_shift")), torch.Generator()
    side = 1024 // family.vae_scale_factor(pipeline.vae.config)
    tokens = side**2 if pipeline.transformer.config.get("patch_size") == 1 and not family.is_packed else side**2 // 4
    source.manual_seed(0)
    levels = process.sigma(torch.tensor([process.draw(source, (4, side, side)) for _ in range(2000)]))
    shift = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    assert levels.median().item() == pytest.approx(shift / (1 + shift), abs=0.03)


@pytest.mark.parametrize(
    ("build", "shortcut"), [(build, shortcut) for build in BUILDERS for shortcut in ("block", "input")]
)
def test_a_plain_pipeline_that_loads_the_file_generates_the_images_of_validation(tmp_path, build, shortcut):
    pipe = load(build)
    family = FAMILIES[type(pipe).__name__]
    folder = train(
        tmp_path / "run",
        pretrained_model_name_or_path=saved(build),
        shortcut=shortcut,
        with_prior_preservation=shortcut == "block",
        class_data_dir=tmp_path / "classes" if shortcut == "block" else None,
        class_prompt="a sticker" if shortcut == "block" else None,
        num_class_images=2,
        gradient_checkpointing=True,
        validation_prompt=[PROMPT, "a dog"],
        num_validation_images=1,
        validation_steps=3,
        learning_rate=0.2,
        max_sequence_length=LENGTH,
    )
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    assert {key.split(".")[0] for key in tensors} == {"transformer"}
    assert all(tensors[key].any() for key in tensors)
    assert not (folder / "kohya").exists()
    assert (inspect_lora(folder).metadata.get("modelspec.architecture") == "chroma/lora") == (build is tiny_chroma)

    def generate() -> np.ndarray:
        settings = {"num_inference_steps": 2, "height": 64, "width": 64, **family.guided_by(family.guidance_scale, 1)}
        source = generator(0, Stream.VALIDATION, 0)
        image = pipe(prompt=PROMPT, generator=source, max_sequence_length=LENGTH, **settings).images[0]
        return np.asarray(image).astype(int)

    base = generate()
    samples = folder / "samples"
    untrained, trained = (
        np.asarray(Image.open(samples / step / "0-0.png")).astype(int) for step in ("step-000000", "step-000003")
    )
    assert np.abs(base - untrained).max() <= 1  # the pipelines of Gemma also sum over padding that is masked
    pipe.load_lora_weights(folder)
    layers = [m for m in pipe.transformer.modules() if "default_0" in getattr(m, "lora_A", {})]
    assert 2 * len(layers) == len(tensors)
    exported = generate()
    assert np.abs(exported - base).max() > 10
    assert np.abs(exported - trained).max() <= 4
    assert verify_lora(folder, str(saved(build))).passed


def test_what_is_switched_on_on_a_gpu_gives_the_same_numbers(family_and_pipeline):
    """`--fused_attention` and `--low_memory_layers`; every A and B, none of them zero, has a gradient."""
    family, pipeline = family_and_pipeline
    base = pipeline.transformer.double().requires_grad_(False)
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(2, family.latent_channels(base.config), 8, 8, dtype=torch.float64, generator=draws)
    texts = Texts(torch.randn(2, 12, family.text_width(base.config), dtype=torch.float64, generator=draws))

    def run(model: torch.nn.Module) -> torch.Tensor:
        times = torch.tensor([100.0, 700.0], dtype=torch.float64)
        return family.denoise(model, latents, times, family.condition(texts, torch.zeros(2, 6)))

    untouched = run(base)
    model = copy.deepcopy(base)
    attach(model, ResLoraConfig(r=2, shortcut="input", target_modules=[*family.default_targets(model.config)]))
    model.double()
    factors = [factor for factor in model.parameters() if factor.requires_grad]
    for factor in factors:
        torch.nn.init.normal_(factor, std=0.4, generator=draws)
    found = []
    for switch_on in (lambda model: None, save_memory, set_attn_processors):
        switch_on(model)
        output = run(model)
        found.append((output.detach(), *torch.autograd.grad(output.square().mean(), factors)))
    plain, *others = found
    assert (plain[0] - untouched).abs().max() > 0.1
    assert all(gradient.any() for gradient in plain[1:])
    for other in others:
        torch.testing.assert_close(other, plain)


@pytest.mark.parametrize("shortcut", ["block", "input", "middle"])
def test_the_chains_of_chroma_are_those_of_flux_1(shortcut):
    """`block` links join double- and single-stream blocks, which differ in their numbers of tokens."""
    found = []
    for build in (tiny_chroma, tiny_pipeline_flux):
        model = load(build).transformer
        attach(model, ResLoraConfig(r=2, shortcut=shortcut, target_modules=[*FAMILIES["FluxPipeline"].target_modules]))
        found.append([[(site.name, site.tokens) for site in chain.sites] for chain in explain(model).chains])
    assert found[0] == found[1]
    joined = [chain for chain in found[0] if len({name.partition(".")[0] for name, _ in chain}) == 2]
    assert bool(joined) == (shortcut == "block")


def test_the_chains_of_aura_flow_go_through_both_kinds_of_blocks():
    model = load(tiny_aura_flow).transformer
    attach(model, ResLoraConfig(r=2, shortcut="block", target_modules=["to_q"]))
    (chain,) = explain(model).chains
    assert [site.name.partition(".attn")[0] for site in chain.sites] == [
        *("joint_transformer_blocks.0", "joint_transformer_blocks.1"),
        *("single_transformer_blocks.0", "single_transformer_blocks.1"),
    ]


@pytest.mark.parametrize("shortcut", ["block", "input"])
def test_chroma_masks_padding_when_blocks_are_computed_again(shortcut):
    """Prompts of different lengths in one batch, with and without gradient checkpointing, and what padding holds."""
    pipeline = load(tiny_chroma)
    family, model = FAMILIES["ChromaPipeline"], pipeline.transformer.double().requires_grad_(False)
    attach(model, ResLoraConfig(r=2, shortcut=shortcut, target_modules=[*family.target_modules]))
    model.double()
    draws = torch.Generator().manual_seed(0)
    factors = [factor for factor in model.parameters() if factor.requires_grad]
    for factor in factors:
        torch.nn.init.normal_(factor, std=0.4, generator=draws)
    latents = torch.randn(3, 16, 8, 8, dtype=torch.float64, generator=draws)
    hidden = torch.randn(3, 12, 40, dtype=torch.float64, generator=draws)
    mask = torch.arange(12) < torch.tensor([5, 12, 5])[:, None]

    def run(hidden: torch.Tensor) -> list[torch.Tensor]:
        condition = family.condition(Texts(hidden, mask=mask), torch.zeros(3, 6))
        output = family.denoise(model, latents, torch.tensor([100.0, 400.0, 700.0]).double(), condition)
        return [output.detach(), *torch.autograd.grad(output.square().mean(), factors)]

    plain = run(hidden)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(run(hidden), plain)
    torch.testing.assert_close(run(hidden.masked_fill(~mask[:, :, None], 7.0)), plain)
    model.disable_gradient_checkpointing()
    torch.testing.assert_close(run(hidden.masked_fill(~mask[:, :, None], 7.0)), plain)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_dry_run_knows_the_family_and_what_it_lacks(tmp_path, build, capsys):
    """What it foresees that a step keeps is near to what a run measures, of a prompt that is as long as can be."""
    options = {"pretrained_model_name_or_path": saved(build), "max_sequence_length": LENGTH}
    run = options | {"shortcut": "block", "max_train_steps": 1, "instance_prompt": 3 * f"{PROMPT}, "}
    train(tmp_path / "run", **run, dry_run=True)
    said = capsys.readouterr().out
    foreseen = float(re.search(r"activations about ([\d.]+) MB", said)[1])
    train(tmp_path / "run", **run)
    measured = float(re.search(r"activations ([\d.]+) MB", capsys.readouterr().out)[1])
    assert foreseen == pytest.approx(measured, rel=0.3)
    assert f"{FAMILIES[type(load(build)).__name__].title}; options that are not given" in said
    with pytest.raises(BadInput) as refusal:
        train(tmp_path / "run", **options, train_text_encoder=True, snr_gamma=5.0, resolution=72, skip_t5=True)
    for option in ("--train_text_encoder", "--snr_gamma", "--skip_t5"):
        assert option in str(refusal.value)
    fits = build is tiny_sana  # whose latents here are of 8 pixels, and are not packed
    assert ("--resolution: got 72" in str(refusal.value)) is not fits


def test_a_family_that_is_not_trained_is_refused_with_those_that_diffusers_has(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "CogView4Pipeline"}))
    with pytest.raises(BadInput) as refusal:
        train(tmp_path / "run", pretrained_model_name_or_path=tmp_path)
    said = str(refusal.value)
    assert "is a CogView4Pipeline; wanted Stable Diffusion 1.x or 2.x (StableDiffusionPipeline), " in said
    trained, missing = said.split("these are not trained here: ")
    assert "Qwen-Image (QwenImagePipeline)" in trained
    assert {"CogView4Pipeline", "Kandinsky3Pipeline"} <= set(missing.split(", "))
    assert not FAMILIES.keys() & set(missing.split(", "))


def test_a_lora_of_flux_2_is_not_taken_for_one_of_flux_1_of_equal_width():
    double = {f"transformer_blocks.0.attn.to_{part}": 3072 for part in "qkv"}
    single = "single_transformer_blocks.0.attn"
    assert family_of_widths({"transformer": double | {f"{single}.to_q": 3072}}) is BaseKind.FLUX
    for leaf, width in {"to_qkv_mlp_proj": 3072, "to_out": 12288}.items():
        assert family_of_widths({"transformer": double | {f"{single}.{leaf}": width}}) is BaseKind.TRANSFORMER


@pytest.mark.parametrize("build", [tiny_z_image, tiny_sana, tiny_chroma])
def test_encodings_are_cached_and_a_run_is_resumed_bit_for_bit(tmp_path, build):
    """Prompts of different lengths in one batch, and the empty one."""
    options = {
        "pretrained_model_name_or_path": saved(build),
        "max_sequence_length": LENGTH,
        "caption_dropout_rate": 0.5,
        "encoding_cache_dir": tmp_path / "cache",
        "max_train_steps": 4,
        "aspect_ratio_buckets": "64,64;48,80",
    }
    whole, parts = train(tmp_path / "whole", checkpointing_steps=2, **options), tmp_path / "parts"
    stored = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    train(parts, resume_from_checkpoint="latest", **options)
    assert stored
    assert stored == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    first, second = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(first[name].any() for name in first if ".lora_B." in name)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_file_is_inspected_merged_into_its_base_and_refused_for_another(tmp_path, build):
    pipe = load(build)
    wanted = FAMILIES[type(pipe).__name__].default_targets(pipe.transformer.config)
    components = {"transformer": random_factors(pipe.transformer, wanted, seed=0)}
    export_lora(tmp_path / "lora", components, dtype=torch.float32, name="x")
    assert inspect_lora(tmp_path / "lora").family is BaseKind.TRANSFORMER
    fuse(tmp_path / "lora", str(saved(build)), tmp_path / "fused")
    before = pipe.transformer.state_dict()
    after = DiffusionPipeline.from_pretrained(tmp_path / "fused").transformer.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{path}.weight" for path in components["transformer"]}
    for path, factors in components["transformer"].items():
        delta = factors.scaling * factors.lora_B @ factors.lora_A
        torch.testing.assert_close(after[f"{path}.weight"] - before[f"{path}.weight"], delta, rtol=1e-4, atol=1e-5)
    if build in (tiny_qwen_image, tiny_z_image, tiny_flux_2_klein):  # as ai-toolkit names them
        tensors = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
        renamed = {key.replace("transformer.", "diffusion_model.", 1): value for key, value in tensors.items()}
        save_file(renamed, tmp_path / "toolkit.safetensors")
        assert verify_lora(tmp_path / "toolkit.safetensors", str(saved(build))).passed
        assert verify_lora(tmp_path / "toolkit.safetensors").passed
        fuse(tmp_path / "toolkit.safetensors", str(saved(build)), tmp_path / "again")
        again = DiffusionPipeline.from_pretrained(tmp_path / "again").transformer.state_dict()
        assert all(torch.equal(again[name], after[name]) for name in after)
    other = tiny_sana if build is not tiny_sana else tiny_z_image
    with pytest.raises(ValueError, match="the base lacks|other shapes"):
        fuse(tmp_path / "lora", str(saved(other)), tmp_path / "other")
    with pytest.raises(ValueError, match="a kohya file is for a unet or FLUX.1's blocks"):
        export_lora(tmp_path / "kohya", components, name="x", formats=("kohya",))
