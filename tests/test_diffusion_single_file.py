"""Bases as people have them: one .safetensors file under the original names, and what is none."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from app.compare import load_pipeline
from dreambooth import arguments, train
from original_layout import write_single_file
from original_transformers import FLUX_2, QWEN_IMAGE, SD_3, Z_IMAGE, write_transformer
from reslora_diffusion.diffusion.options.base_checks import take_single_file
from reslora_diffusion.diffusion.options.checks import quick_check
from reslora_diffusion.export.fusing import fuse
from reslora_diffusion.export.single_file import load_single_file, read_single_file
from reslora_diffusion.export.verify import verify_lora
from reslora_diffusion.utils.problems import BadInput
from tiny import saved, tiny_pipeline, tiny_pipeline_3, tiny_pipeline_xl
from tiny_families import tiny_flux_2, tiny_flux_2_klein, tiny_qwen_image, tiny_z_image


def without_weights(folder, target):
    """The configurations and tokenizers of a pipeline alone."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def tiny_xl(folder):
    """SDXL whose two text encoders differ in width, by which a file's are told apart."""
    pipeline = tiny_pipeline_xl(folder)
    config = pipeline.text_encoder_2.config.to_dict() | {"hidden_size": 48, "num_attention_heads": 4}
    torch.manual_seed(1)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
    unet = type(pipeline.unet).from_config(dict(pipeline.unet.config) | {"cross_attention_dim": 80}).eval()
    parts = pipeline.components | {"text_encoder_2": second, "unet": unet}
    own = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    own.save_pretrained(folder)
    return own


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_xl])
def test_a_single_file_is_the_pipeline_that_it_was_made_of(tmp_path, build):
    pipeline = build(tmp_path / "folder")
    path = write_single_file(pipeline, tmp_path / "model.safetensors")
    found = read_single_file(path)
    assert found.pipeline_class == type(pipeline).__name__
    loaded = load_single_file(found, str(without_weights(tmp_path / "folder", tmp_path / "config")), torch.float32)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if build is tiny_xl else [])):
        wanted, got = (getattr(p, part).state_dict() for p in (pipeline, loaded))
        assert wanted.keys() == got.keys(), part
        assert all(torch.equal(wanted[name], got[name]) for name in wanted), part


def test_a_run_on_a_single_file_is_the_run_on_its_folder(tmp_path):
    folder = saved(tiny_pipeline)
    path = write_single_file(tiny_pipeline(tmp_path / "again"), tmp_path / "model.safetensors")
    config = without_weights(folder, tmp_path / "config")
    one = train(tmp_path / "one", pretrained_model_name_or_path=path, base_config=config, train_text_encoder=True)
    other = train(tmp_path / "other", train_text_encoder=True)
    exported = [load_file(run / "pytorch_lora_weights.safetensors") for run in (one, other)]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_v_prediction_of_sdxl_is_told_from_the_files_keys(tmp_path):
    """NoobAI and other SDXL models have the configuration of SDXL, and two empty tensors that say what they predict."""
    pipeline = tiny_xl(tmp_path / "folder")
    config = without_weights(tmp_path / "folder", tmp_path / "config")
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    noob = write_single_file(pipeline, tmp_path / "noob.safetensors", **marks)
    plain = write_single_file(pipeline, tmp_path / "plain.safetensors")
    said = {}
    for path in (noob, plain):
        options = arguments(tmp_path / "out", pretrained_model_name_or_path=path, base_config=config)
        quick_check(options)
        said[path.stem] = (options.prediction_type, bool(options.rescale_betas_zero_snr))
    assert said == {"noob": ("v_prediction", True), "plain": ("epsilon", False)}
    folder = train(tmp_path / "run", pretrained_model_name_or_path=noob, base_config=config)
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    assert verify_lora(folder, str(noob), str(config)).passed
    fuse(folder, str(noob), tmp_path / "fused", base_config=str(config))
    schedules = [json.loads((tmp_path / "fused" / "scheduler" / "scheduler_config.json").read_text())]
    schedules.append(load_pipeline(noob, config=str(config)).scheduler.config)  # as the page loads it
    wanted = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert all({name: schedule[name] for name in wanted} == wanted for schedule in schedules)


def tensors(*names, shape=(4, 4)):
    return {name: torch.zeros(shape) for name in names}


UNET = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tensors("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "is a LoRA"),
        (tensors("encoder.down.0.block.0.conv1.weight", "quant_conv.weight"), "is an autoencoder"),
        (tensors("text_model.encoder.layers.0.mlp.fc1.weight"), "is a text encoder"),
        (tensors("model.diffusion_model.nerf_image_embedder.embedder.0.bias"), "is a Chroma Radiance model"),
        (tensors("blocks.0.cross_attn.q_linear.weight"), "is a SANA or PixArt model, which is read from a folder"),
        (tensors("control_model.time_embed.0.weight", UNET), "is a ControlNet"),
        (tensors("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"), "is a Contr"),
        (tensors("controlnet_blocks.0.weight", "transformer_blocks.0.attn.add_q_proj.weight"), "is a ControlNet"),
        (tensors("down_blocks.0.resnets.0.conv1.weight"), "is a UNet in diffusers' layout"),
        (tensors(UNET, "cond_stage_model.transformer.x", shape=(4, 9, 3, 3)), "is a model for inpainting"),
        (tensors(UNET, "conditioner.embedders.0.model.x"), "is the refiner of SDXL"),
        (tensors(UNET), "holds a UNet without text encoders"),
        (
            tensors(UNET, "cond_stage_model.x", "model.diffusion_model.scaled_fp8"),
            "is quantised with scales of its own",
        ),
        (tensors("model.diffusion_model.out.0.bias", "input_blocks.0.0.weight"), "holds a UNet without text encoders"),
        (tensors("emb_params"), "is an embedding of a token (textual inversion)"),
        (tensors("<cat-toy>"), "is an embedding of a token (textual inversion)"),
        (tensors("clip_l", "clip_g"), "is an embedding of a token (textual inversion)"),
        ({}, "holds no tensors"),
        (tensors("something.else"), "is of no family that is known here (it holds something.else)"),
    ],
)
def test_what_is_no_base_is_named_in_one_message_before_weights_are_read(tmp_path, content, said):
    path = tmp_path / "model.safetensors"
    save_file(content, path)
    with pytest.raises(BadInput) as error:
        quick_check(arguments(tmp_path / "out", pretrained_model_name_or_path=path))
    (problem,) = error.value.problems
    assert problem.startswith(f"--pretrained_model_name_or_path: {path} {said}")
    with pytest.raises(BadInput) as error:  # and nothing is said of an option that is right
        quick_check(arguments(tmp_path / "out", pretrained_model_name_or_path=path, base_config=saved(tiny_pipeline)))
    assert error.value.problems == [problem]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("joint_blocks.0.context_block.adaLN_modulation.1.bias", "joint_blocks.37.x"), "StableDiffusion3Pipeline"),
        (
            ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight", "guidance_in.in_layer.bias"),
            "FluxPipeline",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_transformers_are_told_by_their_names(tmp_path, names, wanted, prefix):
    """SD3 and FLUX.1: what they are is told from a header; released files have not been loaded here."""
    path = tmp_path / "model.safetensors"
    save_file(tensors(*(prefix + name for name in names)), path)
    found = read_single_file(path)
    assert (found.pipeline_class, found.whole) == (wanted, False)
    assert found.config.endswith(("FLUX.1-dev", "3.5-large"))


ALONE = {
    tiny_pipeline_3: SD_3,
    tiny_flux_2: FLUX_2,
    tiny_flux_2_klein: FLUX_2,
    tiny_qwen_image: QWEN_IMAGE,
    tiny_z_image: Z_IMAGE,
}


@pytest.mark.parametrize("build", ALONE)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformers_file_is_the_transformer_that_it_was_made_of(tmp_path, build, prefix):
    """Its numbers are not those of the folder that its configuration and all else come from."""
    folder = saved(build)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter)
    path = write_transformer(pipeline.transformer, ALONE[build], tmp_path / "model.safetensors", prefix)
    found = read_single_file(path)
    assert (found.pipeline_class, found.whole) == (type(pipeline).__name__, False)
    loaded = load_single_file(found, str(folder), torch.float32)
    own, got = pipeline.transformer.state_dict(), loaded.transformer.state_dict()
    assert own.keys() == got.keys()
    assert all(torch.equal(own[name], got[name]) for name in own)


def test_a_lora_is_trained_on_a_transformers_file_verified_and_merged(tmp_path):
    folder = saved(tiny_z_image)
    transformer = DiffusionPipeline.from_pretrained(folder).transformer
    path = write_transformer(transformer, Z_IMAGE, tmp_path / "model.safetensors", "model.diffusion_model.")
    options = {"max_sequence_length": 40}
    one = train(tmp_path / "one", pretrained_model_name_or_path=path, base_config=folder, **options)
    other = train(tmp_path / "other", pretrained_model_name_or_path=folder, **options)
    exported = [load_file(run / "pytorch_lora_weights.safetensors") for run in (one, other)]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    assert verify_lora(one, str(path), str(folder)).passed
    fuse(one, str(path), tmp_path / "fused", base_config=str(folder))
    fuse(other, str(folder), tmp_path / "again")
    first, second = (DiffusionPipeline.from_pretrained(tmp_path / name).transformer for name in ("fused", "again"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_a_files_metadata_says_that_it_predicts_is_believed(tmp_path):
    """The configuration of Stable Diffusion 2.1 is that of its v-prediction; the base model predicts noise."""
    found = {}
    for said in ("v", "epsilon", None):
        path = tmp_path / f"{said}.safetensors"
        metadata = {"modelspec.prediction_type": said} if said else None
        save_file(tensors(UNET, "cond_stage_model.model.x", shape=(4, 4, 3, 3)), path, metadata=metadata)
        found[said] = read_single_file(path).prediction_type
    assert found == {"v": "v_prediction", "epsilon": "epsilon", None: None}


@pytest.mark.parametrize("given", [{}, {"prediction_type": "epsilon"}])
def test_a_file_that_leaves_its_prediction_open_is_said_to(tmp_path, given):
    save_file(tensors(UNET, "cond_stage_model.model.x", shape=(4, 4, 3, 3)), tmp_path / "base.safetensors")
    options = arguments(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "base.safetensors", **given)
    take_single_file(options, {})
    assert [note for note in options.notes if "does not say what it predicts" in note] == [
        "base.safetensors does not say what it predicts: it is taken for what stabilityai/stable-diffusion-2-1 "
        "predicts. Of Stable Diffusion 2.x the models for 768 px predict v, the base models for 512 px noise: "
        "--prediction_type v_prediction or epsilon decides"
    ] * (not given)


def test_a_pickle_and_another_familys_configuration_are_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match="model.gguf is a GGUF file, whose weights are packed for inference; wanted"):
        quick_check(arguments(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "model.gguf"))
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(
        BadInput, match=r"model.ckpt is a pickle, .*save_pretrained\(FOLDER\) makes .*; wanted one named"
    ):
        quick_check(arguments(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "model.ckpt"))
    path = write_single_file(tiny_pipeline(tmp_path / "folder"), tmp_path / "model.safetensors")
    xl = saved(tiny_pipeline_xl)
    with pytest.raises(BadInput, match="is a StableDiffusionXLPipeline, .* a StableDiffusionPipeline"):
        quick_check(arguments(tmp_path / "out", pretrained_model_name_or_path=path, base_config=xl))


def test_weights_that_a_file_lacks_are_named_and_an_autoencoder_is_taken_from_its_configuration(tmp_path):
    folder = saved(tiny_pipeline)
    path = write_single_file(DiffusionPipeline.from_pretrained(folder), tmp_path / "whole.safetensors")
    whole = load_file(path)

    def without(part: str, name: str):
        save_file({key: value for key, value in whole.items() if part not in key}, tmp_path / name)
        return load_single_file(read_single_file(tmp_path / name), str(folder), torch.float32, safety_checker=None)

    pipeline = without("first_stage_model.", "no_vae.safetensors")
    wanted = DiffusionPipeline.from_pretrained(folder).vae.state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in pipeline.vae.state_dict().items())
    with pytest.raises(ValueError, match=r"it lacks 16 weights that the model of .* has: text_encoder\..*layers\.1\."):
        without("text_model.encoder.layers.1.", "no_layer.safetensors")
    with pytest.raises(ValueError, match="it lacks weights that the model of"):
        without("output_blocks.3.", "no_block.safetensors")


def test_a_lora_is_verified_against_a_single_file_and_merged_into_it(tmp_path):
    """The fused model is that of the folder, to the bit; v-prediction of the file is in its scheduler."""
    folder = saved(tiny_pipeline)
    run = train(tmp_path / "run")
    path = write_single_file(tiny_pipeline(tmp_path / "again"), tmp_path / "model.safetensors")
    config = str(without_weights(folder, tmp_path / "config"))
    assert verify_lora(run, str(path), config).passed
    report = fuse(run, str(path), tmp_path / "new" / "fused", base_config=config)
    other = fuse(run, str(folder), tmp_path / "other")
    assert (report.base, report.modules) == (str(path), other.modules)
    for part in ("unet", "text_encoder", "vae"):
        (one,), (two,) = (list((f / part).glob("*.safetensors")) for f in (report.path, tmp_path / "other"))
        first, second = load_file(one), load_file(two)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part
    assert not list(tmp_path.glob(".base-*"))
    with pytest.raises(ValueError, match="is a LoRA"):
        fuse(run, str(run / "pytorch_lora_weights.safetensors"), tmp_path / "third")
