"""Configurations of kohya's scripts and of kohya_ss, as they are: translated, said to be so, and trained."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open

from dreambooth import SUBJECTS, script
from reslora_diffusion.diffusion.data.concepts import concepts_of
from reslora_diffusion.diffusion.models.families import FAMILIES
from reslora_diffusion.diffusion.options import parse
from reslora_diffusion.diffusion.options.checks import quick_check
from reslora_diffusion.utils.problems import BadInput
from tiny import saved, tiny_pipeline, tiny_pipeline_3, tiny_pipeline_flux, tiny_pipeline_folder, tiny_pipeline_xl
from tiny_families import tiny_chroma, tiny_lumina_2

PRESETS = Path(__file__).parent / "presets"
# Each with the pipeline that it is for, and words of the command line that make it small.
SMALL = ["--resolution", "64", "--num_inference_steps", "2", "--calibration_batches", "1"]
BUCKETS = ["--min_bucket_reso", "32", "--max_bucket_reso", "96", "--bucket_reso_steps", "16"]
PUBLISHED = {
    "kohya_ss_sd15.json": (tiny_pipeline, ["--optimizer", "adamw", "--aspect_ratio_buckets", "72,64"]),
    "kohya_ss_sdxl.json": (tiny_pipeline_xl, [*BUCKETS, "--num_class_images", "2"]),
    "kohya_ss_flux.json": (tiny_pipeline_flux, BUCKETS),
    "kohya_sdxl.toml": (tiny_pipeline_xl, ["--num_class_images", "2"]),
    "kohya_sd3.toml": (tiny_pipeline_3, BUCKETS),
}


@pytest.fixture
def preset(tmp_path):
    """Write a preset for folders that are there; returns its path."""
    data, classes = tmp_path / "data", tmp_path / "reg"
    for name, subject in (("3_sks animal", "octopus"), ("1_red cake", "cake")):
        (data / name).mkdir(parents=True)
        for number in range(2):
            shutil.copy(SUBJECTS / subject / f"{number}.png", data / name)
    (classes / "1_thing").mkdir(parents=True)
    for number in range(2):
        shutil.copy(SUBJECTS / "teapot" / f"{number}.png", classes / "1_thing")

    def write(name: str, **changes: object) -> Path:
        for file in {name, "dataset.toml", "prompts.txt"}:
            text = (PRESETS / file).read_text().replace("@DATA@", str(data)).replace("@OUT@", str(tmp_path))
            text = text.replace("@REG@", str(classes / "1_thing" if file == "dataset.toml" else classes))
            if file == "dataset.toml":
                text = text.replace("1024", "64").replace("512", "32").replace("1536", "96")
            if file == name and changes:
                text = json.dumps(json.loads(text) | changes)
            (tmp_path / file).write_text(text)
        return tmp_path / name

    return write


# kohya_sdxl.toml trains Stable Diffusion XL as well, and kohya_ss_sd15.json is of the same program.
SLOW = {"kohya_ss_sdxl.json": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in PUBLISHED])
def test_a_published_preset_trains(preset, tmp_path, name, capsys):
    build, words = PUBLISHED[name]
    words = ["--config", str(preset(name)), "--pretrained_model_name_or_path", str(saved(build)), *SMALL, *words]
    folder = script.main(script.parse_args([*words, "--output_dir", str(tmp_path / "run"), "--report_to", "none"]))
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((folder / "export_report.json").read_text())
    printed = capsys.readouterr().out
    assert f"{name}, a " in printed
    assert "options translated" in printed
    if "sdxl.toml" in name:
        assert sorted(p.name for p in (folder / "samples" / "step-000000").iterdir()) == ["0-0.png", "1-0.png"]
        with safe_open(next(folder.glob("kohya/*.safetensors")), "pt") as file:
            frequency = json.loads(file.metadata()["ss_tag_frequency"])
        assert frequency == {
            "3_sks animal": {"sks animal": 2, "sticker": 2},
            "1_red cake": {"ohwx red cake": 2, "sticker": 2},
        }
        numbered = {p.name for p in folder.glob("checkpoint-*/kohya/*")}
        assert numbered == {"ohwx-000001.safetensors", "ohwx-000002.safetensors"}


def test_a_preset_of_kohya_ss_means_what_it_means_there(preset):
    options = parse(["--config", str(preset("kohya_ss_sd15.json"))])
    assert options.problems == []
    wanted = {
        "rank": 16,
        "lora_alpha": 32,
        "learning_rate": 1e-4,
        "text_encoder_lr": 5e-5,
        "train_text_encoder": True,
        "num_train_epochs": 2,
        "max_train_steps": None,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0.1,
        "skip_clip_layers": 1,
        "aspect_ratio_buckets": "656,512",
        "snr_gamma": 5,
        "noise_offset": 0.05,
        "multires_noise_iterations": None,  # "Original" is the offset alone
        "caption_dropout_rate": 0.05,
        "random_flip": True,
        "center_crop": True,
        "max_token_length": 225,
        "optimizer": "adamw8bit",
        "optimizer_args": {"weight_decay": "0.1", "betas": "0.9,0.99"},
        "checkpointing_epochs": 1,
        "seed": 1234,
        "train_batch_size": 3,
        "save_precision": "bf16",
        "export_name": "sks",
    }
    assert {name: getattr(options, name) for name in wanted} == wanted
    said = "\n".join(options.notes)
    assert "NOT USED" not in said
    assert "network_dim as --rank" in said
    assert "not needed here: " in said
    assert "xformers" in said


def test_what_a_family_does_not_have_is_not_used_where_another_program_wrote_it(preset):
    """kohya's scripts for FLUX.1 ignore min_snr_gamma, which their program writes for every model."""
    words = ["--config", str(preset("kohya_ss_flux.json")), "--pretrained_model_name_or_path"]
    options = parse([*words, str(saved(tiny_pipeline_flux)), *SMALL, *BUCKETS])
    quick_check(options)
    assert options.snr_gamma is None
    assert "NOT USED: --snr_gamma: it does not apply to FLUX.1: it belongs to diffusion" in "\n".join(options.notes)
    wanted = {"timestep_sampling": "shift", "discrete_flow_shift": 3.1582, "loraplus_lr_ratio": 4.0}
    wanted |= {"precondition_outputs": 0, "training_guidance_scale": 1.0, "max_sequence_length": 256}
    wanted |= {"train_text_encoder": False, "max_train_steps": 3}
    assert {name: getattr(options, name) for name in wanted} == wanted
    chroma = parse([*words, str(saved(tiny_chroma)), *SMALL, *BUCKETS])  # trained by the same script of kohya's
    quick_check(chroma)
    wanted |= {"training_guidance_scale": None, "validation_guidance_scale": None, "guidance_scale": None}
    assert {name: getattr(chroma, name) for name in wanted} == wanted
    assert "NOT USED: --guidance_scale: Chroma takes no guidance as an input" in "\n".join(chroma.notes)
    given = parse([*words, str(saved(tiny_pipeline_flux)), *SMALL, *BUCKETS, "--snr_gamma", "5"])
    with pytest.raises(BadInput, match="--snr_gamma does not apply to FLUX.1"):
        quick_check(given)


def test_a_configuration_of_kohyas_scripts_has_their_defaults(tmp_path):
    path = tmp_path / "k.toml"
    path.write_text(
        '[a]\nnetwork_module = "networks.lora"\n[b]\ntrain_data_dir = "img"\nunheard_of = 3\nlowram = true\n'
    )
    options = parse(["--config", str(path), "--rank", "32"])
    assert options.problems == []
    wanted = {"lora_alpha": 1, "learning_rate": 2e-6, "train_batch_size": 1, "max_train_steps": 1600, "rank": 32}
    wanted |= {"caption_extension": ".caption", "center_crop": True, "train_text_encoder": True, "report_to": "none"}
    wanted |= {"text_encoder_lr": 2e-6, "adam_weight_decay": 0.01, "adam_weight_decay_text_encoder": 0.01}
    assert {name: getattr(options, name) for name in wanted} == wanted
    said = "\n".join(options.notes)
    assert "NOT USED: unheard_of: no such option is known of kohya's scripts" in said
    assert "not needed here: network_module, lowram" in said
    assert "defaults of its program: " in said


def test_a_dataset_of_kohyas_is_concepts(preset, tmp_path):
    preset("kohya_sdxl.toml")
    options = parse(["--config", str(tmp_path / "kohya_sdxl.toml")])
    assert options.problems == []
    first, second = concepts_of(options)
    assert (first.repeats, first.instance_prompt, first.own["random_flip"]) == (3, "sks animal, sticker", True)
    assert (second.repeats, second.instance_prompt) == (1, "ohwx red cake, sticker")
    assert first.classes.folder == second.classes.folder == tmp_path / "reg" / "1_thing"
    assert first.own["aspect_ratio_buckets"] == "auto"
    assert (first.own["min_bucket_reso"], first.own["max_bucket_reso"]) == (32, 96)
    assert options.train_batch_size == 2  # that of the dataset
    alone = parse(["--concepts", str(tmp_path / "dataset.toml")])
    assert [concept.repeats for concept in concepts_of(alone)] == [3, 1]
    assert (alone.train_batch_size, alone.with_prior_preservation) == (2, True)
    assert parse(["--concepts", str(tmp_path / "dataset.toml"), "--train_batch_size", "5"]).train_batch_size == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"full_fp16": True, "mixed_precision": "bf16"},
            "full_fp16 wants mixed_precision fp16; got 'bf16'",
        ),
        (
            {"network_train_unet_only": True, "network_train_text_encoder_only": True},
            "leave nothing to train",
        ),
        ({"use_8bit_adam": True, "optimizer": "Lion"}, "use_8bit_adam and optimizer_type Lion are two optimizers"),
        ({"debiased_estimation_loss": True}, "min_snr_gamma and debiased_estimation_loss both weight the loss"),
        ({"max_resolution": "wide"}, "resolution: got 'wide', wanted a number of pixels, or two such as"),
        ({"LoRA_type": "LyCORIS/LoHa"}, "network_module: LyCORIS/LoHa is no LoRA"),
        ({"lr_scheduler": "sideways"}, "--lr_scheduler: got 'sideways', wanted linear"),
        ({"masked_loss": True}, "masked_loss: wanted conditioning_data_dir with masks, or alpha_mask"),
    ],
)
def test_a_preset_that_contradicts_itself_is_refused_in_one_message(preset, changes, said):
    path = preset("kohya_ss_sd15.json", **changes)
    options = parse(["--config", str(path)])
    with pytest.raises(BadInput, match="--pretrained_model_name_or_path is required") as error:
        quick_check(options)
    assert any(said in problem for problem in error.value.problems)
    assert any("options translated" in line for line in error.value.found)


@pytest.mark.parametrize(
    ("contradiction", "said"),
    [
        ({"min_snr_gamma": 5, "debiased_estimation_loss": True}, "min_snr_gamma and debiased_estimation_loss both"),
        ({"use_8bit_adam": True, "optimizer_type": "SGD"}, "use_8bit_adam and optimizer_type SGD are two optimizers"),
        ({"v_pred_like_loss": 0.1, "v_parameterization": True}, "v_pred_like_loss and v_parameterization contradict"),
        ({"scale_v_pred_loss_like_noise_pred": True}, "scale_v_pred_loss_like_noise_pred wants v_parameterization"),
    ],
)
def test_a_contradiction_is_said_once_by_the_names_of_the_file(tmp_path, contradiction, said):
    data, model = str(SUBJECTS / "octopus"), str(tiny_pipeline_folder())
    common = {"network_module": "networks.lora", "pretrained_model_name_or_path": model, "resolution": "64"}
    path = tmp_path / "k.json"
    path.write_text(json.dumps(common | {"train_data_dir": data} | contradiction))
    with pytest.raises(BadInput) as error:
        quick_check(parse(["--config", str(path), "--instance_prompt", "sks"]))
    (problem,) = error.value.problems
    assert said in problem


def test_a_dataset_that_cannot_be_read_names_each_subset(tmp_path):
    path = tmp_path / "d.toml"
    path.write_text('[[datasets]]\nresolution = "many"\n[[datasets.subsets]]\nimage_dir = "x"\n[[datasets]]\n')
    with pytest.raises(BadInput) as error:
        concepts_of(parse(["--concepts", str(path)]))
    assert ["dataset 1, resolution" in error.value.problems[0], "dataset 2: wanted" in error.value.problems[1]] == [
        True
    ] * 2


def test_our_own_files_stay_ours(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"rank": 8, "network_dim": 4}))
    options = parse(["--config", str(path)])
    assert options.rank == 8 or options.notes  # a name of kohya's makes it kohya's
    path.write_text(yaml.safe_dump({"rank": 8, "learning_rate": 1e-4}))
    assert (parse(["--config", str(path)]).notes, parse(["--config", str(path)]).rank) == ([], 8)


# ----------------------------------------------------------------------------------- one script for each family

NOISE = {"noise_offset": 0.05, "adaptive_noise_scale": 0.01, "ip_noise_gamma": 0.1, "min_timestep": 100}
FLOW = {"weighting_scheme": "cosmap", "discrete_flow_shift": 3.2, "sigmoid_scale": 2.0}
MEANS = {
    # kohya's defaults for SD3: uniform noise levels, no shift, 256 tokens of T5; its noise is plain
    "sd3": (
        tiny_pipeline_3,
        NOISE,
        {"weighting_scheme": "none", "discrete_flow_shift": 1.0, "max_sequence_length": 256, "noise_offset": 0.0}
        | {"adaptive_noise_scale": None, "ip_noise_gamma": None, "min_timestep": 100, "precondition_outputs": 1},
    ),
    "sd3, a mean": (
        tiny_pipeline_3,
        {"weighting_scheme": "logit_normal", "logit_mean": 0.3, "training_shift": 2.0, "discrete_flow_shift": 3.2},
        {"weighting_scheme": "logit_normal", "logit_mean": -0.3, "discrete_flow_shift": 2.0},
    ),
    "sd3, options of other scripts": (
        tiny_pipeline_3,
        FLOW | {"timestep_sampling": "sigmoid"},
        {"timestep_sampling": None, "sigmoid_scale": None, "weighting_scheme": "cosmap", "discrete_flow_shift": 1.0},
    ),
    # velocities are not weighted, whatever the scheme says; the levels are all trained
    "flux": (
        tiny_pipeline_flux,
        NOISE | FLOW | {"model_prediction_type": "raw", "timestep_sampling": "shift"},
        {"weighting_scheme": "none", "discrete_flow_shift": 3.2, "sigmoid_scale": 2.0, "precondition_outputs": 0}
        | {"noise_offset": 0.0, "ip_noise_gamma": 0.1, "min_timestep": None},
    ),
    "flux, defaults": (
        tiny_pipeline_flux,
        {},
        {"weighting_scheme": "none", "discrete_flow_shift": 3.0, "precondition_outputs": 0, "timestep_sampling": None},
    ),
    "flux, drawn by the size": (
        tiny_pipeline_flux,
        FLOW | {"timestep_sampling": "flux_shift", "weighting_scheme": "logit_normal"},
        {"weighting_scheme": "none", "discrete_flow_shift": None, "sigmoid_scale": 2.0},
    ),
    "sd": (tiny_pipeline, NOISE | FLOW, NOISE | {"weighting_scheme": None, "discrete_flow_shift": None}),
}


@pytest.mark.parametrize("case", MEANS)
def test_an_option_of_kohyas_means_what_the_script_of_the_family_makes_of_it(tmp_path, case):
    build, given, wanted = MEANS[case]
    path = tmp_path / "k.json"
    path.write_text(json.dumps({"network_module": "networks.lora", "network_dim": 4} | given))
    data = ["--instance_data_dir", str(SUBJECTS / "octopus"), "--instance_prompt", "sks", "--resolution", "64"]
    options = parse(["--config", str(path), "--pretrained_model_name_or_path", str(saved(build)), *data])
    quick_check(options)
    assert {name: getattr(options, name) for name in wanted} == wanted
    said = "\n".join(options.notes)
    assert ("DIFFERENT: model_prediction_type: got sigma_scaled" in said) == (case[:4] == "flux" and case != "flux")
    if case == "sd3":
        assert "NOT USED: --noise_offset: its program draws plain noise for this family" in said
        assert "in its program for Stable Diffusion 3: --weighting_scheme none, --discrete_flow_shift 1.0" in said


DATA = ["--instance_data_dir", str(SUBJECTS / "octopus"), "--instance_prompt", "sks", "--resolution", "64"]
LUMINA_2 = {
    "kohya, sigma": {"timestep_sampling": "sigma"},
    "kohya, sigma, a mean": {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_mean": 0.7},
    "kohya, sigma, a shift": {"timestep_sampling": "sigma", "weighting_scheme": "mode", "discrete_flow_shift": 3.0},
    "kohya, shift by default": {},
    "ai-toolkit, lumina2_shift": {"timestep_type": "lumina2_shift"},
}


@pytest.mark.parametrize("case", LUMINA_2)
def test_noise_levels_of_lumina_2_are_those_of_the_program(tmp_path, case):
    """Both programs have the share of the noise in their schedule, where diffusers' script has that of the data.
    Compared are quantiles of 4000 levels, drawn by `get_noisy_model_input_and_timesteps` written in numpy."""
    given, data = LUMINA_2[case], DATA
    content, shift = {"network_module": "networks.lora_lumina"} | given, given.get("discrete_flow_shift", 6.0)
    if case.startswith("ai"):
        datasets = [{"folder_path": str(SUBJECTS / "octopus"), "resolution": 64}]
        process = {"type": "sd_trainer", "datasets": datasets, "network": {"type": "lora", "linear": 4}}
        process |= {"train": given, "model": {"name_or_path": "x", "is_lumina2": True}}
        content, data = {"job": "extension", "config": {"name": "x", "process": [process]}}, DATA[2:]
    (tmp_path / "k.json").write_text(json.dumps(content))
    base = str(saved(tiny_lumina_2))
    options = parse(["--config", str(tmp_path / "k.json"), "--pretrained_model_name_or_path", base, *data])
    quick_check(options)
    assert not options.train_text_encoder
    assert ("DIFFERENT: system_prompt: prompts have none there" in "\n".join(options.notes)) == case.startswith("kohya")
    pipeline = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0))
    process, source = FAMILIES["Lumina2Pipeline"].process(pipeline, options), torch.Generator().manual_seed(0)
    levels = process.sigma(torch.tensor([process.draw(source, (16, 8, 8)) for _ in range(4000)])).numpy()
    draws = np.random.default_rng(0)
    u, z = draws.random(4000), draws.standard_normal(4000)
    if given.get("weighting_scheme") == "logit_normal":
        u = 1 / (1 + np.exp(-(z + 0.7)))
    elif given.get("weighting_scheme") == "mode":
        u = 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    v = 1 - u if given else 1 / (1 + np.exp(-z))  # a schedule runs from noise to data
    wanted = shift * v / (1 + (shift - 1) * v)
    places = [0.05, 0.25, 0.5, 0.75, 0.95]
    np.testing.assert_allclose(np.quantile(levels, places), np.quantile(wanted, places), atol=0.03)


def test_the_command_line_wins_over_what_a_script_makes_of_a_file(tmp_path):
    path = tmp_path / "k.json"
    path.write_text(json.dumps({"network_module": "networks.lora_sd3", "noise_offset": 0.05}))
    words = ["--config", str(path), "--pretrained_model_name_or_path", str(saved(tiny_pipeline_3)), "--noise_offset"]
    data = ["--instance_data_dir", str(SUBJECTS / "octopus"), "--instance_prompt", "sks", "--resolution", "64"]
    options = parse([*words, "0.1", *data, "--weighting_scheme", "mode"])
    quick_check(options)
    assert (options.noise_offset, options.weighting_scheme, options.discrete_flow_shift) == (0.1, "mode", 1.0)


# ------------------------------------------------------------------------------------------- other trainers


AI_TOOLKIT = """
job: extension
config:
  name: my_lora
  process:
    - type: sd_trainer
      training_folder: {out}
      trigger_word: sks animal
      network: {{type: lora, linear: 8, linear_alpha: 4}}
      save: {{dtype: float16, save_every: 250, max_step_saves_to_keep: 4}}
      datasets:
        - folder_path: "{data}"
          caption_ext: txt
          caption_dropout_rate: 0.05
          cache_latents_to_disk: true
          resolution: [32, 64]
      train:
        batch_size: 1
        steps: 2
        train_unet: true
        train_text_encoder: false
        optimizer: adamw
        lr: 1e-4
        ema_config: {{use_ema: true, ema_decay: 0.9}}
        dtype: bf16
        linear_timesteps: true
      model: {{name_or_path: "{model}", quantize: true}}
      sample:
        sample_every: 250
        width: 64
        height: 32
        prompts: ["[trigger] in the sea", "a dog"]
        neg: blurry
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 2
"""


def test_a_job_of_ai_toolkit_trains_at_each_of_its_resolutions(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(SUBJECTS / "octopus" / "0.png", data)
    (data / "0.txt").write_text("in the sea")
    path = tmp_path / "job.yaml"
    path.write_text(AI_TOOLKIT.format(data=data, out=tmp_path / "out", model=saved(tiny_pipeline)))
    options = script.parse_args(["--config", str(path), "--calibration_batches", "1"])
    assert options.problems == []
    wanted = {"rank": 8, "lora_alpha": 4, "max_train_steps": 2, "learning_rate": 1e-4, "mixed_precision": "bf16"}
    wanted |= {"use_ema": True, "ema_decay": 0.9, "save_precision": "fp16", "checkpoints_total_limit": 4}
    assert {name: getattr(options, name) for name in wanted} == wanted
    said = "\n".join(options.notes)
    assert "NOT USED: model, quantize: got True" in said
    assert "NOT USED: train, linear_timesteps" in said
    first, second = concepts_of(options)
    assert [concept.own["resolution"] for concept in (first, second)] == [32, 64]
    assert first.instance.images[0].caption == "sks animal in the sea"
    folder = script.main(options)
    assert folder == tmp_path / "out" / "my_lora"
    assert sorted(p.name for p in (folder / "samples" / "step-000002").iterdir()) == ["0-0.png", "1-0.png"]


def test_a_configuration_of_onetrainer_is_translated_with_its_concepts(tmp_path):
    concepts = tmp_path / "concepts.json"
    own = {"path": str(SUBJECTS / "octopus"), "balancing": 3.0}
    concepts.write_text(json.dumps([own, {"path": str(SUBJECTS / "cake"), "enabled": False}]))
    given = {
        "training_method": "LORA",
        "model_type": "STABLE_DIFFUSION_XL_10_BASE",
        "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0",
        "concept_file_name": str(concepts),
        "resolution": 1024,
        "aspect_ratio_bucketing": True,
        "optimizer": "ADAMW",
        "learning_rate": 3e-4,
        "learning_rate_scheduler": "CONSTANT",
        "learning_rate_warmup_steps": 200,
        "weight_decay": 0.01,
        "epochs": 100,
        "batch_size": 4,
        "ema": "OFF",
        "train_text_encoder": False,
        "offset_noise_weight": 0.05,
        "train_dtype": "FLOAT_16",
        "lora_rank": 16,
        "lora_alpha": 1.0,
        "masked_training": False,
        "save_after_unit": "NEVER",
        "circular_mask_generation": True,
    }
    path = tmp_path / "one.json"
    path.write_text(json.dumps(given))
    options = parse(["--config", str(path)])
    assert options.problems == []
    wanted = {"rank": 16, "lora_alpha": 1, "num_train_epochs": 100, "learning_rate": 3e-4, "noise_offset": 0.05}
    wanted |= {"adam_weight_decay": 0.01, "lr_scheduler": "constant_with_warmup", "mixed_precision": "fp16"}
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert "NOT USED: circular_mask_generation" in "\n".join(options.notes)
    (concept,) = concepts_of(options)
    assert concept.repeats == 3
    path.write_text(json.dumps(given | {"training_method": "FINE_TUNE", "model_type": "WUERSTCHEN_2"}))
    assert len(parse(["--config", str(path)]).problems) == 2


def test_how_concepts_of_onetrainer_read_captions(tmp_path):
    text = {"prompt_source": "sample", "enable_tag_shuffling": True, "keep_tags_count": 2, "tag_dropout_enable": True}
    dropped = text | {"tag_dropout_mode": "RANDOM", "tag_dropout_probability": 0.2}
    full = text | {"tag_dropout_mode": "FULL", "tag_dropout_probability": 0.2, "prompt_source": "concept"}
    flipped = {"enable_random_flip": True, "enable_random_hue": True}
    file = tmp_path / "concepts.json"
    file.write_text(json.dumps([{"path": "a", "text": dropped}, {"path": "b", "text": full, "image": flipped}]))
    options = onetrainer(tmp_path, concept_file_name=str(file))
    first, second = (dict(concept.own) for concept in concepts_of(options))
    assert first == {"shuffle_caption": True, "caption_tag_dropout_rate": 0.2, "keep_tokens": 2}
    assert second == {"shuffle_caption": True, "keep_tokens": 2, "random_flip": True}
    said = "\n".join(options.notes)
    for name in ("enable_random_hue: there is no", "tag_dropout_enable: there is no", "prompt_source: got concept"):
        assert f"NOT USED: concept, {name}" in said
    assert "enable_random_flip" not in said


def test_a_preset_of_onetrainer_has_the_defaults_that_it_leaves_out(tmp_path):
    """Its presets name what differs from its defaults: rank 16 and alpha 1, a sixteenth of the scale that is ours."""
    path = tmp_path / "one.json"
    sd15 = {
        "base_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "batch_size": 4,
        "learning_rate": 3e-4,
        "learning_rate_warmup_steps": 0,
        "model_type": "STABLE_DIFFUSION_15",
        "resolution": "512",
        "training_method": "LORA",
        "vae": {"weight_dtype": "FLOAT_32"},
        "unet": {"weight_dtype": "FLOAT_16", "learning_rate": 2e-4},
        "text_encoder": {"weight_dtype": "FLOAT_16"},
    }
    path.write_text(json.dumps(sd15))
    options = parse(["--config", str(path)])
    wanted = {"rank": 16, "lora_alpha": 1, "num_train_epochs": 100, "aspect_ratio_buckets": "auto"}
    wanted |= {"learning_rate": 2e-4, "train_text_encoder": True, "text_encoder_lr": 3e-4, "lr_warmup_steps": 0}
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert "NOT USED" not in "\n".join(options.notes)
    flux = sd15 | {
        "model_type": "FLUX_DEV_1",
        "transformer": {"train": True, "weight_dtype": "NFLOAT_4"},
        "text_encoder": {"train": False},
        "timestep_distribution": "LOGIT_NORMAL",
        "dynamic_timestep_shifting": True,
        "lora_decompose": True,
        "aspect_ratio_bucketing": False,
    }
    path.write_text(json.dumps(flux))
    options = parse(["--config", str(path)])
    wanted = {"rank": 16, "lora_alpha": 1, "learning_rate": 3e-4, "train_text_encoder": False, "use_dora": False}
    wanted |= {"timestep_sampling": "flux_shift", "training_guidance_scale": 1.0, "adam_weight_decay": 0.01}
    wanted |= {"precondition_outputs": 0}
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert options.aspect_ratio_buckets != "auto"
    said = "\n".join(options.notes)
    assert "NOT USED: lora_decompose: its DoRA has the lengths of columns" in said
    assert "NOT USED: transformer, weight_dtype: got NFLOAT_4" in said
    path.write_text(json.dumps(flux | {"peft_type": "LOHA"}))
    assert ["peft_type: got LOHA" in problem for problem in parse(["--config", str(path)]).problems] == [True]


@pytest.mark.parametrize(
    ("network", "model", "alpha"),
    [
        ({"linear": 32, "linear_alpha": 16}, {}, 16),
        ({"linear": 32, "alpha": 8}, {"is_xl": True}, 8),
        ({"rank": 32}, {"is_xl": True}, 1),
        ({"linear": 32, "linear_alpha": 16}, {"is_flux": True}, 32),
        ({"linear": 32}, {"arch": "flux"}, 32),
        ({"linear": 32, "linear_alpha": 16}, {"arch": "qwen_image"}, 32),
    ],
)
def test_alpha_of_ai_toolkit_is_what_it_computes_with(tmp_path, network, model, alpha):
    """It ignores alpha for transformers, whose scale is 1; elsewhere its default is 1."""
    process = {
        "training_folder": "out",
        "network": {"type": "lora"} | network,
        "datasets": [{"folder_path": "data"}],
        "train": {"optimizer": "adamw8bit", "lr": "1e-4", "optimizer_params": {"weight_decay": 1e-3}},
        "model": {"name_or_path": "some/model"} | model,
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"config": {"name": "x", "process": [process]}}))
    options = parse(["--config", str(path)])
    assert options.problems == []
    assert (options.rank, options.lora_alpha, options.adam_weight_decay) == (32, alpha, 1e-3)
    flux = "is_flux" in model or model.get("arch") == "flux"
    assert options.timestep_sampling == ("sigmoid" if flux or "arch" in model else None)
    assert options.training_guidance_scale == (1.0 if flux else None)
    said = "\n".join(options.notes)
    assert ("NOT USED: network, linear_alpha" in said) == (alpha == 32 and "linear_alpha" in network)


def test_kohyas_rules_that_no_option_states(tmp_path):
    path = tmp_path / "k.toml"
    path.write_text('network_module = "networks.lora_flux"\nnetwork_dim = 16\nnetwork_alpha = 0\n')
    options = parse(["--config", str(path)])
    assert (options.rank, options.lora_alpha, options.discrete_flow_shift) == (16, 16, 3.0)
    path.write_text(path.read_text() + 'timestep_sampling = "flux_shift"\n')
    assert parse(["--config", str(path)]).discrete_flow_shift is None


def test_a_dora_of_lycoris_is_a_dora(preset):
    decomposed = parse(["--config", str(preset("kohya_ss_sd15.json", LoRA_type="LyCORIS/LoCon", dora_wd=True))])
    assert (decomposed.use_dora, decomposed.problems) == (True, [])
    assert parse(["--config", str(preset("kohya_ss_sd15.json", dora_wd=True))]).use_dora is False


def onetrainer(tmp_path, **changes):
    path = tmp_path / "one.json"
    given = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "some/model"}
    path.write_text(json.dumps(given | changes))
    return parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("given", "wanted", "said"),
    [
        ({"layer_filter": "attentions"}, {"target_modules": ["kohya"], "conv_rank": None}, ""),
        ({"layer_filter": "attn"}, {"target_modules": None}, ""),
        ({"lora_rank": 8}, {"target_modules": ["kohya"], "conv_rank": 8, "conv_alpha": 1.0}, "DIFFERENT: layer_filter"),
        ({"layer_filter": "down_blocks"}, {"target_modules": None}, "NOT USED: layer_filter: got 'down_blocks'"),
        ({"model_type": "FLUX_DEV_1", "layer_filter": "transformer_block"}, {"target_modules": ["kohya"]}, ""),
        (
            {"model_type": "Z_IMAGE"},
            {"precondition_outputs": 0, "timestep_sampling": "uniform", "target_modules": None},
            "NOT USED: layer_filter: got ''; the default layers are adapted",
        ),
        ({"model_type": "CHROMA_1", "layer_filter": "transformer_block"}, {"target_modules": ["kohya"]}, ""),
        ({"max_noising_strength": 0.8, "min_noising_strength": 0.1}, {"min_timestep": 100, "max_timestep": 800}, ""),
        ({"loss_weight_fn": "MIN_SNR_GAMMA"}, {"snr_gamma": 5.0}, ""),
        ({"mse_strength": 0, "mae_strength": 1}, {"loss_type": "l1"}, ""),
        ({"mse_strength": 0.5, "mae_strength": 0.5}, {"loss_type": "l2"}, "NOT USED: mse_strength, mae_strength"),
        (
            {"timestep_distribution": "SIGMOID"},
            {"timestep_sampling": None},
            "NOT USED: timestep_distribution: got SIGMOID",
        ),
    ],
)
def test_what_a_configuration_of_onetrainer_trains(tmp_path, given, wanted, said):
    options = onetrainer(tmp_path, **given)
    assert options.problems == []
    assert {name: getattr(options, name) for name in wanted} == wanted
    notes = "\n".join(options.notes)
    assert said in notes
    assert ("NOT USED: layer_filter" in notes) == said.startswith("NOT USED: layer_filter")


@pytest.mark.parametrize("kind", ["HI_DREAM_FULL", "STABLE_DIFFUSION_15_INPAINTING"])
def test_a_model_of_onetrainer_that_is_not_trained_here(tmp_path, kind):
    assert (
        f"model_type: {kind} is of no family that is trained here" in onetrainer(tmp_path, model_type=kind).problems[0]
    )


def ai_toolkit(tmp_path, **process):
    path = tmp_path / "job.yaml"
    given = {"type": "sd_trainer", "datasets": [{"folder_path": "data"}], "network": {"type": "lora", "linear": 8}}
    path.write_text(yaml.safe_dump({"job": "extension", "config": {"name": "x", "process": [given | process]}}))
    return parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("train", "model", "wanted", "said"),
    [
        ({"timestep_type": "shift"}, {"is_v3": True}, {"timestep_sampling": "sigma", "precondition_outputs": 0}, ""),
        ({"timestep_type": "weighted"}, {"arch": "qwen_image"}, {"timestep_sampling": "uniform"}, "DIFFERENT: train"),
        ({"timestep_type": "flux_shift"}, {"is_flux": True}, {"timestep_sampling": "sigma"}, "DIFFERENT: train"),
        ({"loss_type": "mae"}, {}, {"loss_type": "l1", "timestep_sampling": None}, ""),
        ({"gradient_accumulation": 3}, {}, {"gradient_accumulation_steps": 3}, ""),
        ({}, {"arch": "zimage"}, {"timestep_sampling": "sigmoid", "weighting_scheme": "none"}, ""),
        ({}, {"quantize": True}, {"quantization": None}, "--quantization float8wo is closest"),
    ],
)
def test_what_a_job_of_ai_toolkit_trains(tmp_path, train, model, wanted, said):
    options = ai_toolkit(tmp_path, train=train, model={"name_or_path": "some/model"} | model)
    assert options.problems == []
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert said in "\n".join(options.notes)


def test_jobs_of_ai_toolkit_that_train_no_lora(tmp_path):
    (problem,) = ai_toolkit(tmp_path, network=None, model={"name_or_path": "some/model"}).problems
    assert "the whole model is trained" in problem
    (problem,) = ai_toolkit(tmp_path, type="extract", datasets=None).problems
    assert "process: got type extract, wanted sd_trainer" in problem


def test_words_that_kohya_ss_adds_to_the_command_are_read(preset):
    words = "--network_train_unet_only --max_grad_norm=0 --optimizer_args weight_decay=0.3 betas=0.9,0.95"
    options = parse(["--config", str(preset("kohya_ss_sd15.json", additional_parameters=words))])
    assert options.problems == []
    assert (options.train_text_encoder, options.max_grad_norm) == (False, 1e9)
    assert options.optimizer_args == {"weight_decay": "0.3", "betas": "0.9,0.95"}


def test_a_preset_that_trains_a_whole_model_says_so(preset, tmp_path):
    content = json.loads(preset("kohya_ss_sd15.json").read_text())
    del content["LoRA_type"]
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(content))
    assert "DIFFERENT: network_module: it names none" in "\n".join(parse(["--config", str(path)]).notes)


def test_a_loss_with_masks_is_kohyas_mean(tmp_path):
    path = tmp_path / "k.json"
    path.write_text(json.dumps({"network_module": "networks.lora", "alpha_mask": True}))
    assert parse(["--config", str(path)]).masked_mean == "image"
    path.write_text(json.dumps({"network_module": "networks.lora"}))
    assert parse(["--config", str(path)]).masked_mean == "mask"


def test_keys_of_a_dataset_have_a_reason_or_are_unknown(tmp_path):
    path = tmp_path / "d.toml"
    keys = 'color_aug = true\ncaption_separator = ","\nunheard_of = 1'
    path.write_text(f'[general]\n{keys}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"\n')
    said = parse(["--concepts", str(path)]).notes
    assert said == [
        "  NOT USED: color_aug: images are encoded once, before training",
        "  NOT USED: unheard_of: no such key is known of kohya's datasets",
    ]


def test_how_captions_are_read_is_said_by_each_subset(preset, tmp_path):
    options = parse(["--config", str(preset("kohya_sdxl.toml"))])
    (first, second) = concepts_of(options)
    own = {"keep_tokens": 1, "keep_tokens_separator": "|||", "caption_tag_dropout_rate": 0.1, "enable_wildcard": True}
    assert own.items() <= first.own.items()
    assert own.items() <= second.own.items()
    path = tmp_path / "d.toml"
    path.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"\nkeep_tokens_separator = "|||"\n')
    assert "keep_tokens_separator" not in concepts_of(parse(["--concepts", str(path)]))[0].own  # nothing is moved


def test_rates_of_a_concept_have_bounds(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump([{"instance_data_dir": "x", "caption_tag_dropout_rate": 1.5, "repeats": 0}]))
    with pytest.raises(BadInput) as raised:
        concepts_of(parse(["--concepts", str(path)]))
    assert raised.value.problems == [
        f"--concepts {path}, concept 1: repeats is 0, wanted 1 or more",
        f"--concepts {path}, concept 1: caption_tag_dropout_rate is 1.5, wanted 0 or more and below 1",
    ]


def test_a_subset_of_validation_images_is_not_trained_on(tmp_path):
    path = tmp_path / "d.toml"
    subsets = "".join(
        f'[[datasets.subsets]]\nimage_dir = "{SUBJECTS / name}"\nclass_tokens = "sks"\n{more}\n'
        for name, more in (("octopus", ""), ("cake", "validation_split = 1.0"))
    )
    path.write_text("[[datasets]]\nresolution = 64\n" + subsets)
    options = parse(["--concepts", str(path)])
    assert [concept.instance.images[0].path.parent.name for concept in concepts_of(options)] == ["octopus"]
    assert options.validation_split == 0
    assert "subsets of validation images alone are left out" in options.notes[0]
    (problem,) = parse(["--config", str(path)]).problems
    assert "wanted it as --concepts" in problem
