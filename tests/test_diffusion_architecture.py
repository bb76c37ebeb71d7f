"""A model's architecture: from files without torch, and from modules, the same layers and the same problems."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn

from dreambooth import ROOT, SUBJECTS, arguments, words
from reslora_diffusion.diffusion.models.architecture import LINEAR, Architecture, is_target, read_architecture
from reslora_diffusion.diffusion.models.meta_pipeline import load_meta_pipeline
from reslora_diffusion.diffusion.options.model_checks import model_problems
from reslora_diffusion.diffusion.options.training import OPTIMIZERS, PACKAGED
from reslora_diffusion.methods.pair_optimizers import PAIR_OPTIMIZERS
from tiny import (
    saved,
    tiny_pipeline,
    tiny_pipeline_3,
    tiny_pipeline_3_without_t5,
    tiny_pipeline_flux,
    tiny_pipeline_xl,
)

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")
PIPELINES = {
    "sd": lambda: saved(tiny_pipeline),
    "xl": lambda: saved(tiny_pipeline_xl),
    "sd3": lambda: saved(tiny_pipeline_3),
    "sd3 without t5": lambda: saved(tiny_pipeline_3_without_t5),
    "flux": lambda: saved(tiny_pipeline_flux),
    "embedded": lambda: ROOT / "assets" / "sticker-sd",
}
MISFITS = [  # options, and what is said of them whatever the family
    ({"rank": 5000, "train_text_encoder": True}, "--rank is larger than layers of the text_encoder"),
    ({"rank_pattern": ["to_q=5000"]}, "to_q "),
    ({"target_modules": ["to_qq"]}, "target module 'to_qq' matches nothing"),
    (
        {"target_modules": ["to_q", "attn1", "attn", "norm1", "conv_in", "proj"]},
        "that are neither linear layers nor convolutions",
    ),
    ({"train_text_encoder": True, "text_encoder_target_modules": ["token_embedding"]}, "token_embedding (Embedding)"),
    ({"train_text_encoder": True, "text_encoder_target_modules": ["q"]}, "'q' matches nothing in the text_encoder"),
    ({"lr_pattern": ["nowhere=2"], "alpha_pattern": ["attn=2", "[=1"]}, "--lr_pattern: 'nowhere' matches no adapted"),
    ({"train_text_encoder": True, "lr_pattern": ["text_model.encoder.layers.0.*=2"]}, ""),
    ({"resolution": 8, "tokenizer_max_length": 999}, "--tokenizer_max_length: got 999, wanted at most 32"),
    ({"skip_t5": True, "snr_gamma": 5, "weighting_scheme": "mode", "max_sequence_length": 9}, "does not apply to"),
]


@pytest.fixture(scope="module", params=PIPELINES)
def both(request, tmp_path_factory) -> tuple[Path, Architecture, Architecture]:
    folder = PIPELINES[request.param]()
    args = arguments(tmp_path_factory.mktemp("out"), pretrained_model_name_or_path=folder)
    return folder, read_architecture(args), load_meta_pipeline(args)


def test_files_tell_what_the_modules_are(both):
    _, architecture, base = both
    for field in fields(Architecture):
        found, wanted = (getattr(part, field.name) for part in (architecture, base))
        if field.name in ("vae", "denoiser_config"):  # the library notes down more, none of which is asked for
            assert {key: value for key, value in wanted.items() if found.get(key, value) != value} == {}
        else:
            assert found == wanted, field.name
    assert (architecture.grid, architecture.vae_scale_factor) == (base.grid, base.vae_scale_factor)
    for component, model in {base.family.denoiser: base.denoiser, **base.text_encoders}.items():
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert {name for name, layer in architecture.layers[component].items() if layer.kind == LINEAR} == linear


def test_layers_that_are_left_out_are_in_neither(tmp_path):
    args = arguments(tmp_path, skip_clip_layers=1)
    architecture, base = read_architecture(args), load_meta_pipeline(args)
    assert architecture.layers == base.layers
    assert (
        architecture.layers["text_encoder"].keys()
        < read_architecture(arguments(tmp_path)).layers["text_encoder"].keys()
    )


@pytest.mark.parametrize(("options", "said"), MISFITS, ids=[" ".join(options) for options, _ in MISFITS])
def test_both_find_the_same_problems_in_the_same_words(both, tmp_path, options, said):
    folder, architecture, base = both
    args = arguments(tmp_path / "out", pretrained_model_name_or_path=folder, **options)
    found = [*model_problems(architecture, args)]
    assert found == [*model_problems(base, args)]
    assert said in "\n".join(found)


def test_another_prediction_type_and_more_channels(tmp_path):
    folder = shutil.copytree(saved(tiny_pipeline), tmp_path / "model")
    for file, change in (
        ("unet/config.json", {"in_channels": 33}),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}),
    ):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | change))
    args = arguments(tmp_path / "out", pretrained_model_name_or_path=folder)
    found = [*model_problems(read_architecture(args), args)]
    assert found == [*model_problems(load_meta_pipeline(args), args)]
    assert len(found) == 2


def test_targets_are_matched_as_peft_matches_them(both):
    _, architecture, base = both
    targets = ["to_q", "attn1.to_k", "net.2", "q_proj", "attentions.0.proj_in", "conv_in", "k"]
    config = LoraConfig(target_modules=targets)
    for layers in architecture.layers.values():
        matched = {name for name in layers if is_target(name, targets)}
        assert matched == {name for name in layers if check_target_module_exists(config, name)}
    args = arguments("out", train_text_encoder=True, rank=3, rank_pattern=["to_q=2"])
    wanted = 0
    for model, config in base.adapters(args).values():
        model.add_adapter(config, "counted")
        wanted += sum(p.numel() for name, p in model.named_parameters() if ".counted." in name)
        model.delete_adapter("counted") if hasattr(model, "delete_adapter") else model.delete_adapters("counted")
    assert architecture.adapter_size(args) == wanted


@pytest.mark.parametrize("form", ["sharded", "fp16", "sharded fp16", "one level deeper"])
def test_every_form_of_weights_is_read(tmp_path, form):
    folder = shutil.copytree(saved(tiny_pipeline), tmp_path / "model")
    args = arguments(tmp_path / "out", pretrained_model_name_or_path=folder)
    expected = read_architecture(args)
    variant = "fp16" if "fp16" in form else None
    if form == "one level deeper":  # as versions of transformers before 5 wrote it, with a buffer of even older ones
        file = folder / "text_encoder" / "model.safetensors"
        tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
        save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(32)[None]}, file)
    else:
        base = load_meta_pipeline(args)
        for name, model in {"unet": base.denoiser, **base.text_encoders}.items():
            for file in (folder / name).glob("*.safetensors"):
                file.unlink()
            size = "200KB" if "sharded" in form else "10GB"
            model.to_empty(device="cpu").save_pretrained(folder / name, variant=variant, max_shard_size=size)
        assert (len([*folder.glob("unet/*.safetensors")]) > 1) == ("sharded" in form)
    args.variant = variant
    assert read_architecture(args) == expected


@pytest.mark.parametrize("fault", ["no header", "quantised", "other names", "no configuration", "not there"])
def test_files_that_do_not_tell_leave_it_to_the_libraries(tmp_path, fault):
    folder = shutil.copytree(saved(tiny_pipeline), tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    if fault == "no header":
        weights.write_bytes(b"\xff" * 100)
    elif fault == "quantised":
        save_file({name: value.to(torch.uint8) for name, value in tensors.items()}, weights)
    elif fault == "other names":
        save_file({name.replace("to_q", "query"): value for name, value in tensors.items()}, weights)
    elif fault == "no configuration":
        (folder / "unet" / "config.json").unlink()
    else:
        shutil.rmtree(folder)
    assert read_architecture(arguments(tmp_path / "out", pretrained_model_name_or_path=folder)) is None


def test_optimizers_that_may_be_chosen_are_those_of_torch():
    found = {
        name.lower(): name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    ours = {*PACKAGED, *PAIR_OPTIMIZERS, "sgdnesterov"}  # the last is sgd with settings
    assert set(OPTIMIZERS) - ours == set(found) - {"optimizer", "lbfgs", "sparseadam"}


def cached(folder: Path, cache: Path, name: str) -> None:
    """A pipeline as the hub's client keeps it."""
    home = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / "abc")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")


@pytest.mark.parametrize("source", ["folder", "cache"])
def test_what_does_not_fit_is_said_without_torch(tmp_path, source):
    cached(saved(tiny_pipeline), tmp_path / "hub", "nobody/tiny")
    model = "nobody/tiny" if source == "cache" else saved(tiny_pipeline)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_text("no image")
    shutil.copy(SUBJECTS / "octopus" / "1.png", tmp_path / "broken")
    cases = [
        ({"rank": 999, "instance_data_dir": tmp_path / "broken"}, ["--rank is larger than", "1 unreadable image"]),
        ({"target_modules": ["to_qq"], "learning_rate": -1}, ["matches nothing in the unet", "--learning_rate"]),
        ({"skip_t5": True, "resolution": 8}, ["--skip_t5 does not apply", "--resolution: got 8"]),
        (
            {"optimizer": "nosuch", "shortcut": "input", "num_previous": 3},
            ["--optimizer: got 'nosuch'", "num_previous: got 3"],
        ),
        (
            {"pretrained_vae_model_name_or_path": "/nowhere"},
            ["--pretrained_vae_model_name_or_path: /nowhere is missing"],
        ),
        ({"aspect_ratio_buckets": "7,7"}, ["--aspect_ratio_buckets: got 7,7"]),
        ({"compare": ["lora", "reslora-input:rank=99"]}, ["reslora-input:rank=99: --rank is larger than layers"]),
        ({"resume_from_checkpoint": "checkpoint-7"}, ["checkpoint-7 is no complete checkpoint"]),
    ]
    code = (
        "import json, sys; sys.path.insert(0, 'train_scripts'); import train_dreambooth_reslora as script\n"
        "for line, wanted in json.loads(sys.argv[1]):\n"
        "    try: script.main(script.parse_args(line))\n"
        "    except ValueError as error: said = str(error)\n"
        "    assert said.startswith(f'{len(wanted)} problem') and all(part in said for part in wanted), said\n"
        f"    assert not set({HEAVY}) & set(sys.modules), line\n"
    )
    lines = [
        (words(tmp_path / "out", **{"pretrained_model_name_or_path": model} | options), wanted)
        for options, wanted in cases
    ]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
