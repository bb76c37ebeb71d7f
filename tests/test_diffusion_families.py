"""Model families: the conditions that training gives a UNet are those that the family's own pipeline gives it."""

import inspect
import json
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from dreambooth import PROMPT, SUBJECTS, arguments, script, train, train_without_export
from reslora_diffusion.diffusion.models.families import FAMILIES, Texts
from reslora_diffusion.diffusion.models.families.not_here import OF_FLOWS
from reslora_diffusion.diffusion.objective.randomness import Stream, generator
from reslora_diffusion.diffusion.options import DreamBoothOptions
from reslora_diffusion.diffusion.train.optimizers import make_optimizer
from reslora_diffusion.export import verify_lora
from reslora_diffusion.utils.problems import BadInput
from tiny import (
    saved,
    tiny_pipeline,
    tiny_pipeline_3,
    tiny_pipeline_3_without_t5,
    tiny_pipeline_flux,
    tiny_pipeline_schnell,
    tiny_pipeline_xl,
)

BUILDERS = (tiny_pipeline, tiny_pipeline_xl, tiny_pipeline_3, tiny_pipeline_3_without_t5, tiny_pipeline_flux)
LENGTHS = DreamBoothOptions(max_sequence_length=24)
PROMPTS = ["a sticker of an octopus", "a photo of a dog on a blue background"]


def load(build) -> DiffusionPipeline:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if build is tiny_pipeline_3_without_t5 else {}
    pipeline = DiffusionPipeline.from_pretrained(saved(build), **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=BUILDERS)
def family_and_pipeline(request):
    pipeline = load(request.param)
    return FAMILIES[type(pipeline).__name__], pipeline


def of_t5(family) -> dict:
    return {"max_sequence_length": LENGTHS.max_sequence_length} if family.fixed_encoder else {}


def encode(family, pipeline, prompts) -> Texts:
    with torch.no_grad():
        return family.encode(family.text_encoders_of(pipeline), family.read(pipeline, prompts, LENGTHS))


def test_texts_are_encoded_as_the_pipeline_does_it(family_and_pipeline):
    family, pipeline = family_and_pipeline
    ours = encode(family, pipeline, PROMPTS)
    with torch.no_grad():
        known = inspect.signature(pipeline.encode_prompt).parameters
        more = {"prompt_2": PROMPTS, "prompt_3": PROMPTS, "do_classifier_free_guidance": False}
        more = {name: value for name, value in more.items() if name in known}
        theirs = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, **more, **of_t5(family))
    torch.testing.assert_close(ours.hidden, theirs[0])
    if ours.pooled is not None:  # between the two is the negative prompt, where there is one
        torch.testing.assert_close(ours.pooled, theirs[2 if "do_classifier_free_guidance" in known else 1])


def test_images_from_encoded_texts_are_those_from_prompts(family_and_pipeline):
    family, pipeline = family_and_pipeline
    texts, negative = encode(family, pipeline, PROMPTS[:1]), encode(family, pipeline, [""])
    common = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64, "output_type": "np"}
    theirs_too = common | of_t5(family)
    ours = pipeline(
        **family.pipeline_inputs(pipeline, texts, negative), generator=torch.Generator().manual_seed(0), **common
    ).images
    theirs = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **theirs_too).images
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_model_is_told_what_the_pipeline_tells_it(family_and_pipeline, monkeypatch):
    family, pipeline = family_and_pipeline
    model, told = family.denoiser_of(pipeline), {}
    forward = model.forward

    def spy(*args, **kwargs):
        told.update(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 64, "width": 64}
    pipeline(PROMPTS[0], **settings, **of_t5(family))
    ours = family.condition(encode(family, pipeline, PROMPTS[:1]), torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]))
    for name, value in (ours | ours.pop("added_cond_kwargs", {})).items():
        torch.testing.assert_close(value, (told | (told.get("added_cond_kwargs") or {}))[name])


@pytest.mark.parametrize("build", [tiny_pipeline_flux, tiny_pipeline_schnell])
def test_flux_is_given_tokens_places_times_and_guidance_as_its_pipeline_gives_them(build, monkeypatch):
    pipeline = load(build)
    family, model, told = FAMILIES["FluxPipeline"], pipeline.transformer, []
    forward = model.forward

    def spy(*args, **kwargs):
        told.append((kwargs, forward(*args, **kwargs)))
        return told[-1][1]

    monkeypatch.setattr(model, "forward", spy)
    settings = {"num_inference_steps": 1, "guidance_scale": 2.0, "height": 64, "width": 96, **of_t5(family)}
    pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **settings)
    (theirs, packed), latents = told.pop(), torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    args = Namespace(training_guidance_scale=2.0)
    times = theirs["timestep"] * 1000
    with torch.no_grad():
        conditions = family.condition(encode(family, pipeline, PROMPTS[:1]), torch.zeros(1, 6))
        guidance = family.guidance_input(family.training_guidance(model.config, args), times)
        got = family.denoise(model, latents, times, conditions | guidance)
    ours, _ = told.pop()
    if build is tiny_pipeline_schnell:
        assert theirs.pop("guidance") is None
    assert ours.keys() == theirs.keys() - {"joint_attention_kwargs"}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])
    torch.testing.assert_close(got, pipeline._unpack_latents(packed[0], 64, 96, 8))


def test_flux_is_trained_on_the_noise_levels_of_its_own_script():
    """train_dreambooth_lora_flux.py draws them uniformly and unweighted, not shifted by the size of the image."""
    pipeline, levels = load(tiny_pipeline_flux), torch.arange(1000)
    args = Namespace(**dict.fromkeys((*OF_FLOWS, "min_timestep", "max_timestep")))
    process = FAMILIES["FluxPipeline"].process(pipeline, args)
    torch.testing.assert_close(process.sigma(levels), 1 - levels / 1000)
    assert torch.equal(process.weights(levels), torch.ones(1000))
    source = torch.Generator().manual_seed(0)
    drawn = torch.tensor([process.draw(source) for _ in range(4000)]).float() / 1000
    assert drawn.quantile(torch.tensor([0.25, 0.5, 0.75])).sub(torch.tensor([0.25, 0.5, 0.75])).abs().max() < 0.04
    prediction, latents, noise = torch.randn(3, 2, 16, 8, 8)
    error = process.error(prediction, latents, noise, torch.tensor([100, 900]))
    torch.testing.assert_close(error, prediction - (noise - latents))


@pytest.mark.parametrize(
    ("build", "shortcut"),
    [
        (tiny_pipeline_xl, "block"),
        pytest.param(tiny_pipeline_xl, "middle", marks=pytest.mark.slow),  # "block" has XL, schnell has "middle"
        (tiny_pipeline_3, "block"),
        (tiny_pipeline_3, "input"),
        (tiny_pipeline_flux, "block"),
        (tiny_pipeline_flux, "input"),
        (tiny_pipeline_schnell, "middle"),
    ],
)
def test_every_family_is_trained_by_the_same_script(tmp_path, build, shortcut):
    """A plain pipeline that loads the exported file generates the images of validation."""
    pipe = load(build)
    family = FAMILIES[type(pipe).__name__]
    folder = train(
        tmp_path / "run",
        pretrained_model_name_or_path=saved(build),
        shortcut=shortcut,
        train_text_encoder=True,
        with_prior_preservation=True,
        class_data_dir=tmp_path / "classes",
        class_prompt="a sticker",
        num_class_images=2,
        gradient_checkpointing=True,
        validation_prompt=[PROMPT, *PROMPTS, ""],
        num_validation_images=1,
        validation_steps=3,
        learning_rate=0.02,
        **of_t5(family),
    )
    keys = load_file(folder / "pytorch_lora_weights.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {family.denoiser, *family.text_encoders}
    assert (folder / "kohya").exists() == (family.denoiser == "unet")
    card = (folder / "README.md").read_text()
    assert f", {family.tag}, reslora]" in card
    assert ("max_sequence_length=24)" in card) == bool(family.fixed_encoder)

    def generate(prompt: str = PROMPT) -> np.ndarray:
        settings = {"num_inference_steps": 2, "guidance_scale": family.guidance_scale, "height": 64, "width": 64}
        image = pipe(prompt, generator=generator(0, Stream.VALIDATION, 0), **settings, **of_t5(family)).images[0]
        return np.asarray(image).astype(int)

    base = generate()
    for place, prompt in enumerate((PROMPT, *PROMPTS, "")):
        untrained = np.asarray(Image.open(folder / "samples" / "step-000000" / f"{place}-0.png")).astype(int)
        np.testing.assert_array_equal(generate(prompt), untrained)
    pipe.load_lora_weights(folder)
    exported = generate()
    trained = np.asarray(Image.open(folder / "samples" / "step-000003" / "0-0.png")).astype(int)
    assert np.abs(exported - base).max() > 10
    assert np.abs(exported - trained).max() <= 4
    assert verify_lora(folder, str(saved(build))).passed


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_pipeline_xl, tiny_pipeline_3_without_t5, tiny_pipeline_flux])
def test_a_dry_run_foresees_what_a_step_keeps(tmp_path, build, capsys):
    """On paper, without weights, near to what a run measures; weights and memory formats are not known on paper."""
    options = {
        "pretrained_model_name_or_path": saved(build),
        "train_text_encoder": True,
        "max_train_steps": 1,
        "shortcut": "block",
        **of_t5(FAMILIES[type(load(build)).__name__]),
    }
    train(tmp_path / "run", **options, dry_run=True)
    said = capsys.readouterr().out
    told = "trained at guidance 3.5 (--training_guidance_scale, diffusers' --guidance_scale), images at 3.5"
    assert (told in said) == (build is tiny_pipeline_flux)
    foreseen = float(re.search(r"activations about ([\d.]+) MB", said)[1])
    train(tmp_path / "run", **options)
    measured = float(re.search(r"activations ([\d.]+) MB", capsys.readouterr().out)[1])
    assert foreseen == pytest.approx(measured, rel=0.3)


def test_a_dry_run_says_with_what_a_family_is_trained(tmp_path, capsys, monkeypatch):
    """The defaults of diffusers' script for the family, at the command line and from a file."""
    words = ["--pretrained_model_name_or_path", str(saved(tiny_pipeline_flux)), "--instance_data_dir"]
    words += [
        str(SUBJECTS / "octopus"),
        "--instance_prompt",
        PROMPT,
        "--resolution",
        "64",
        "--max_sequence_length",
        "24",
    ]
    words += ["--train_text_encoder", "--rank", "16", "--dry_run", "--output_dir", str(tmp_path / "out")]
    (tmp_path / "flux.yaml").write_text("guidance_scale: 1\n")
    for given in (["--guidance_scale=1"], ["--config", str(tmp_path / "flux.yaml")]):
        script.main(script.parse_args([*words, *given]))
        said = capsys.readouterr().out
        for line in (
            "FLUX.1; options that are not given have the defaults of diffusers' script for it",
            "500 steps are chosen, as --max_train_steps is not given: 100 for each image, at least 500",
            "on cpu: the frozen base in float32, adapters in float32",
            "rank 16, lora_alpha 4, scale 0.25; on the denoiser and text encoders",
            "optimizer adamw: learning rate 0.0001, of the text encoders 5e-06, weight decay 0.0001, of the text "
            "encoders 0.001; schedule constant",
            "trained at guidance 1 (--training_guidance_scale, diffusers' --guidance_scale), images at 3.5",
        ):
            assert line in said, said
    script.main(script.parse_args([*words, "--max_train_steps=2", "--method=lora", "--mixed_precision=bf16"]))
    said = capsys.readouterr().out
    assert "are chosen" not in said
    assert "on cpu: the frozen base in bfloat16, adapters in float32\nLoRA: rank 16" in said
    with pytest.raises(BadInput, match="--guidance_scale and --training_guidance_scale are the same for FLUX.1"):
        script.main(script.parse_args([*words, "--guidance_scale=1", "--training_guidance_scale=2"]))


def test_groups_of_parameters_have_the_rates_of_the_family(tmp_path):
    """5e-6 for the text encoders of SDXL, where 5e-4 was taken before; --scale_lr leaves it alone, as in diffusers."""
    options = arguments(tmp_path, pretrained_model_name_or_path=saved(tiny_pipeline_xl), train_text_encoder=True)
    options.given -= {"learning_rate", "resolution"}
    options.scale_lr = True
    options.take_defaults(FAMILIES["StableDiffusionXLPipeline"])
    parts = ("unet", "text_encoder")
    weights = {part: {"a.lora_A.weight": torch.nn.Parameter(torch.zeros(2, 2))} for part in parts}
    unet, text = make_optimizer(weights, options).param_groups
    assert (unet["lr"], unet["weight_decay"]) == (1e-4 * options.train_batch_size, 1e-4)
    assert (text["lr"], text["weight_decay"]) == (5e-6, 1e-3)
    assert options.resolution == 1024


@pytest.mark.parametrize("build", [tiny_pipeline_xl, tiny_pipeline_3_without_t5, tiny_pipeline_flux])
def test_frozen_text_encoders(tmp_path, build):
    folder = train(tmp_path / "run", pretrained_model_name_or_path=saved(build), random_flip=True)
    keys = load_file(folder / "pytorch_lora_weights.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {FAMILIES[type(load(build)).__name__].denoiser}


@pytest.mark.parametrize("build", [tiny_pipeline_3, tiny_pipeline_flux])
def test_flows_resume_bit_for_bit_over_a_handover_and_race(tmp_path, build):
    options = {
        "pretrained_model_name_or_path": saved(build),
        "skip_t5": build is tiny_pipeline_3,
        "shortcut": "middle",
        "handover": 0.75,
        "max_train_steps": 4,
        "aspect_ratio_buckets": "64,64;48,80",
        "validation_prompt": [PROMPT],
        "num_validation_images": 1,
    }
    whole, parts = tmp_path / "race" / "reslora", tmp_path / "parts"
    train(tmp_path / "race", compare=["lora", "reslora"], checkpointing_steps=2, **options)
    assert json.loads((tmp_path / "race" / "race.json").read_text())["contenders"].keys() == {"lora", "reslora"}
    guidance = FAMILIES[type(load(build)).__name__].guidance_scale
    assert json.loads((tmp_path / "race" / "comparison.json").read_text())["guidance_scale"] == guidance
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    train(parts, resume_from_checkpoint="latest", **options)
    first, second = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_xl_resumes_bit_for_bit_though_the_last_layer_of_clip_has_no_gradient(tmp_path):
    options = {
        "pretrained_model_name_or_path": saved(tiny_pipeline_xl),
        "train_text_encoder": True,
        "shortcut": "block",
        "handover": 0.75,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
    }
    whole, parts = train_without_export(tmp_path / "whole", **options), tmp_path / "parts"
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    train_without_export(parts, resume_from_checkpoint="latest", **options)
    first, second = (load_file(folder / "checkpoint-4" / "state" / "state.safetensors") for folder in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "text_encoder.encoder.layers.1.self_attn.q_proj.lora_B.default.weight"
    assert name in first
    assert f"optimizer.state.{name}.exp_avg" not in first


def test_options_of_another_family_are_refused_in_one_message(tmp_path):
    with pytest.raises(BadInput) as refusal:
        train(
            tmp_path / "run",
            pretrained_model_name_or_path=saved(tiny_pipeline_3),
            resolution=136,
            snr_gamma=5.0,
            prediction_type="epsilon",
            skip_clip_layers=1,
            target_modules=["to_q", "proj_in"],
        )
    assert len(refusal.value.problems) == 5
    for words in (
        "--resolution: got 136, wanted a multiple of 8 that is at least 8 and at most 128 for this model",
        "--snr_gamma does not apply to Stable Diffusion 3: it belongs to diffusion",
        "--prediction_type does not apply",
        "--skip_clip_layers does not apply to Stable Diffusion 3: it leaves out layers of the one CLIP of",
        "target module 'proj_in' matches nothing in the transformer",
    ):
        assert words in str(refusal.value)
    with pytest.raises(BadInput) as refusal:
        train(
            tmp_path / "run",
            weighting_scheme="mode",
            logit_mean=0.0,
            precondition_outputs=0,
            max_sequence_length=99,
            training_guidance_scale=1,
        )
    assert [problem.split()[0].rstrip(":") for problem in refusal.value.problems] == [
        "--weighting_scheme",
        "--logit_mean",
        "--precondition_outputs",
        "--max_sequence_length",
        "--training_guidance_scale",
    ]
    with pytest.raises(BadInput) as refusal:
        train(
            tmp_path / "run",
            pretrained_model_name_or_path=saved(tiny_pipeline_schnell),
            resolution=72,
            snr_gamma=5.0,
            skip_t5=True,
            max_sequence_length=600,
            training_guidance_scale=1,
        )
    assert len(refusal.value.problems) == 5
    for words in (
        "--resolution: got 72, wanted a multiple of 16 that is at least 16 for this model",
        "--snr_gamma does not apply to FLUX.1",
        "--skip_t5 does not apply to FLUX.1: it cannot do without T5",
        "--max_sequence_length: got 600, wanted at most 512",
        "takes no guidance as an input; wanted a model such as FLUX.1-dev",
    ):
        assert words in str(refusal.value)


def test_a_flux_without_t5_is_refused_before_it_is_loaded(tmp_path):
    folder = shutil.copytree(saved(tiny_pipeline_flux), tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": [None, None]}))
    with pytest.raises(BadInput, match="cannot be loaded: lacks 'text_encoder_2'"):
        train(tmp_path / "run", pretrained_model_name_or_path=folder)
