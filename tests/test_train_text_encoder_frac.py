"""`--train_text_encoder_frac`: text encoders are trained in the first steps alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from dreambooth import arguments, train, train_without_export
from reslora_diffusion.diffusion.objective.frozen_texts import FrozenTexts
from reslora_diffusion.diffusion.options import parse
from reslora_diffusion.diffusion.options.checks import quick_check
from reslora_diffusion.utils.problems import BadInput
from tiny import saved, tiny_pipeline_3, tiny_pipeline_xl

OPTIONS = {"train_text_encoder": True, "max_train_steps": 4, "checkpointing_steps": 1, "lora_dropout": 0.1}
HALF = OPTIONS | {"train_text_encoder_frac": 0.5}
VARIANTS = [
    {"shortcut": "block", "scale_weight_norms": 0.1},
    {"shortcut": "input", "use_ema": True, "handover": 0.75, "validation_prompt": "a dog"},
    {"shortcut": "block", "pretrained_model_name_or_path": tiny_pipeline_xl, "optimizer": "rite"},
    {"method": "lora", "pretrained_model_name_or_path": tiny_pipeline_3, "caption_dropout_rate": 0.3},
]


def of(options):
    build = options.get("pretrained_model_name_or_path")
    return options | ({"pretrained_model_name_or_path": saved(build)} if build else {})


def state(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "state" / "state.safetensors")


def differing(one, other):
    return {name.split(".")[0] for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("options", [VARIANTS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in VARIANTS[1:])])
def test_text_encoders_stay_as_they_are_from_then_on_and_a_resumed_run_is_the_same(options, tmp_path, capsys):
    options = HALF | of(options)
    folder = train(tmp_path / "whole", **options)
    assert capsys.readouterr().out.count("text encoders are not trained after step 2") == 1
    first, second, third, last = (state(folder, step) for step in (1, 2, 3, 4))

    def factors(found):
        return {
            name: value for name, value in found.items() if name.startswith(("text_encoder", "unet", "transformer"))
        }

    assert "text_encoder" in differing(factors(first), factors(second))
    moved = differing(factors(third), factors(last))
    assert len(moved) == 1
    assert not moved & {"text_encoder", "text_encoder_2"}
    if "handover" not in options:
        assert not differing(factors(second), factors(last)) & {"text_encoder", "text_encoder_2"}
    for step in (2, 3):
        again = tmp_path / f"again-{step}"
        shutil.copytree(folder / f"checkpoint-{step}", again / f"checkpoint-{step}")
        train(again, **options, resume_from_checkpoint="latest")
        resumed = state(again, 4)
        assert resumed.keys() == last.keys()
        assert all(torch.equal(resumed[name], last[name]) for name in last), step
        one, other = (load_file(out / "pytorch_lora_weights.safetensors") for out in (folder, again))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_first_part_is_that_of_a_run_which_trains_them_to_the_end(tmp_path):
    options = OPTIONS | {"shortcut": "block"}
    whole = train_without_export(tmp_path / "b", **options)
    stopped = train_without_export(tmp_path / "a", **options, train_text_encoder_frac=0.5)
    one, other = state(stopped, 2), state(whole, 2)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert differing(state(stopped, 3), state(whole, 3)) >= {"text_encoder"}


def test_each_prompt_is_encoded_once_and_the_numbers_are_the_same(tmp_path, monkeypatch):
    """Held against a run that encodes every batch anew."""
    options = HALF | {"shortcut": "block", "max_train_steps": 6, "checkpointing_steps": 6, "lora_dropout": 0.0}
    calls = []
    forward = CLIPTextModel.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    remembered = train_without_export(tmp_path / "a", **options)
    few = len(calls)
    calls.clear()
    monkeypatch.setattr(FrozenTexts, "one", lambda self, tokens, encode: encode(tokens))
    anew = train_without_export(tmp_path / "b", **options)
    assert few < len(calls)
    one, other = state(remembered, 6), state(anew, 6)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_text_encoder_frac": 0.5}, "--train_text_encoder_frac is used only with --train_text_encoder"),
        (
            {"train_text_encoder": True, "train_text_encoder_frac": 1.5},
            "got 1.5, wanted a number above 0 and at most 1",
        ),
        ({"train_text_encoder": True, "train_text_encoder_frac": 0}, "--train_text_encoder_frac: got 0"),
        (HALF | {"cuda_graph": True}, "a recorded step has the prompts it was recorded with"),
        (HALF | {"schedule": "coto"}, "--schedule coto changes adapters that are to stay as they are"),
    ],
)
def test_what_cannot_be_is_refused(options, said, tmp_path):
    with pytest.raises(BadInput) as error:
        quick_check(arguments(tmp_path, **options))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("lines", "share"),
    [
        ("stop_text_encoder_training = 300\nmax_train_steps = 1000", 0.3),
        ("stop_text_encoder_training = 300\nmax_train_epochs = 10", 1.0),
        ("stop_text_encoder_training = 300", 1.0),
        ("stop_text_encoder_training = 0\nmax_train_steps = 1000", 1.0),
        ("stop_text_encoder_training = 300\nmax_train_steps = 1000\nnetwork_train_unet_only = true", 1.0),
    ],
)
def test_a_toml_of_kohyas_says_when_they_stop(lines, share, tmp_path):
    (tmp_path / "k.toml").write_text(f'network_module = "networks.lora"\ntrain_data_dir = "x"\n{lines}\n')
    options = parse(["--config", str(tmp_path / "k.toml")])
    assert options.train_text_encoder_frac == share
    assert options.problems == []


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ({"stop_training_after": 30, "stop_training_after_unit": "EPOCH"}, 0.3),
        ({"stop_training_after": 300}, 1.0),
        ({"stop_training_after": 30, "stop_training_after_unit": "NEVER"}, 1.0),
        ({"stop_training_after": 30, "stop_training_after_unit": "STEP"}, 1.0),
        ({"stop_training_after": "soon"}, 1.0),
    ],
)
def test_a_configuration_of_onetrainer_says_when_they_stop(said, share, tmp_path):
    given = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "x", "epochs": 100}
    given |= {"text_encoder": {"train": True} | said, "concept_file_name": str(tmp_path / "concepts.json")}
    (tmp_path / "concepts.json").write_text(json.dumps([{"path": str(tmp_path)}]))
    (tmp_path / "one.json").write_text(json.dumps(given))
    options = parse(["--config", str(tmp_path / "one.json")])
    assert options.train_text_encoder_frac == share
    assert options.train_text_encoder


def test_a_job_of_ai_toolkit_has_convolutions(tmp_path):
    network = {"type": "lora", "linear": 16, "conv": 8, "conv_alpha": 4}
    process = {"type": "sd_trainer", "network": network, "model": {"name_or_path": "x"}, "datasets": []}
    (tmp_path / "job.json").write_text(json.dumps({"job": "extension", "config": {"name": "a", "process": [process]}}))
    options = parse(["--config", str(tmp_path / "job.json")])
    assert (options.rank, options.conv_rank, options.conv_alpha) == (16, 8, 4)
