"""Model families: the conditions that training gives a UNet are those that the family's own pipeline gives it."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from dreambooth import PROMPT, train
from reslora_diffusion.diffusion.families import FAMILIES, Texts
from reslora_diffusion.diffusion.randomness import Stream, generator
from tiny import saved, tiny_pipeline, tiny_pipeline_xl

BUILDERS = {"StableDiffusionPipeline": tiny_pipeline, "StableDiffusionXLPipeline": tiny_pipeline_xl}
PROMPTS = ["a sticker of an octopus", "a photo of a dog on a blue background"]


@pytest.fixture(params=BUILDERS)
def family_and_pipeline(request):
    pipeline = DiffusionPipeline.from_pretrained(saved(BUILDERS[request.param]))
    pipeline.set_progress_bar_config(disable=True)
    return FAMILIES[request.param], pipeline


def encode(family, pipeline, prompts) -> Texts:
    with torch.no_grad():
        return family.encode(
            family.text_encoders_of(pipeline), family.tokenize(family.tokenizers_of(pipeline), prompts, None)
        )


def test_texts_are_encoded_as_the_pipeline_does_it(family_and_pipeline):
    family, pipeline = family_and_pipeline
    ours = encode(family, pipeline, PROMPTS)
    with torch.no_grad():
        theirs = pipeline.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(ours.hidden, theirs[0])
    if ours.pooled is not None:
        torch.testing.assert_close(ours.pooled, theirs[2])


def test_painting_from_texts_is_painting_from_prompts(family_and_pipeline):
    family, pipeline = family_and_pipeline
    texts, negative = encode(family, pipeline, PROMPTS[:1]), encode(family, pipeline, [""])
    common = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64, "output_type": "np"}
    ours = pipeline(
        **family.painting(pipeline, texts, negative), generator=torch.Generator().manual_seed(0), **common
    ).images
    theirs = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **common).images
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_unet_is_told_what_the_pipeline_tells_it(family_and_pipeline, monkeypatch):
    family, pipeline = family_and_pipeline
    told = {}
    forward = pipeline.unet.forward

    def spy(sample, timestep, encoder_hidden_states, added_cond_kwargs=None, **kwargs):
        told.update(encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs)
        return forward(sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(pipeline.unet, "forward", spy)
    pipeline(PROMPTS[0], num_inference_steps=1, guidance_scale=0.0, height=64, width=64)
    texts = encode(family, pipeline, PROMPTS[:1])
    ours = family.condition(texts, torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]))
    torch.testing.assert_close(ours["encoder_hidden_states"], told["encoder_hidden_states"])
    for name, value in ours.get("added_cond_kwargs", {}).items():
        torch.testing.assert_close(value, told["added_cond_kwargs"][name])


@pytest.mark.parametrize("shortcut", ["block", "middle"])
def test_stable_diffusion_xl_is_trained_by_the_same_script(tmp_path, shortcut):
    folder = train(
        tmp_path / "run",
        pretrained_model_name_or_path=saved(tiny_pipeline_xl),
        shortcut=shortcut,
        train_text_encoder=True,
        validation_prompt=[PROMPT],
        num_validation_images=1,
        validation_steps=3,
        learning_rate=0.02,
    )
    keys = load_file(folder / "pytorch_lora_weights.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"unet", "text_encoder", "text_encoder_2"}
    pipe = DiffusionPipeline.from_pretrained(saved(tiny_pipeline_xl))
    pipe.set_progress_bar_config(disable=True)

    def paint() -> np.ndarray:
        settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 64, "width": 64}
        image = pipe(PROMPT, generator=generator(0, Stream.VALIDATION, 0), **settings).images[0]
        return np.asarray(image).astype(int)

    base = paint()
    pipe.load_lora_weights(folder)
    exported = paint()
    shown = [np.asarray(Image.open(folder / "samples" / f"step-{step:06d}" / "0-0.png")).astype(int) for step in (0, 3)]
    np.testing.assert_array_equal(base, shown[0])
    assert np.abs(exported - base).max() > 10
    assert np.abs(exported - shown[1]).max() <= 4


def test_stable_diffusion_xl_with_frozen_text_encoders(tmp_path):
    folder = train(tmp_path / "run", pretrained_model_name_or_path=saved(tiny_pipeline_xl), random_flip=True)
    keys = load_file(folder / "pytorch_lora_weights.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"unet"}
