"""Optimizers by name and by import path, and those whose trained weights are not the ones to be used."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dreambooth import arguments, train
from reslora_diffusion.diffusion.options import parse
from reslora_diffusion.diffusion.options.training import ONE_RATE, OPTIMIZERS, PACKAGED
from reslora_diffusion.diffusion.train.optimizers import optimizer_problems, settings, used_weights
from reslora_diffusion.utils.environment import is_installed
from schedule_free import AveragedSGD
from test_diffusion_checks import refused, without_weights  # noqa: F401


def test_an_optimizer_may_be_given_by_its_import_path(tmp_path):
    options = arguments(tmp_path, optimizer="torch.optim.RAdam", optimizer_args=["betas=(0.5, 0.9)"])
    assert options.optimizer == "torch.optim.RAdam"
    assert (options.problems, optimizer_problems(options)) == ([], [])
    plain, named = (train(tmp_path / name, optimizer=name) for name in ("radam", "torch.optim.RAdam"))
    assert_same(*(load_file(folder / "pytorch_lora_weights.safetensors") for folder in (plain, named)))


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch.optim.Nothing", "--optimizer: torch.optim has no Nothing"),
        ("no_such_module.Adam", "--optimizer: No module named 'no_such_module'"),
        ("torch.nn.Linear", "--optimizer: torch.nn.Linear is no torch.optim.Optimizer"),
        ("adam2000", "--optimizer: got 'adam2000', wanted"),
    ],
)
def test_what_is_no_optimizer_is_refused_before_weights_are_read(refused, name, said):  # noqa: F811
    assert said in refused(optimizer=name)


@pytest.mark.parametrize("name", sorted(name for name in PACKAGED if not is_installed(PACKAGED[name].module)))
def test_a_package_that_is_not_there_is_named_as_pip_knows_it(refused, name):  # noqa: F811
    said = refused(optimizer=name)
    assert f"--optimizer {name} needs the package {PACKAGED[name].package}" in said
    assert f"pip install {PACKAGED[name].package}" in said


@pytest.mark.parametrize("name", sorted(name for name in PACKAGED if is_installed(PACKAGED[name].module)))
def test_packaged_optimizers_train_three_steps_and_resume(tmp_path, name):
    """Run where the packages are installed; what differs on a resume is named."""
    first = 6 if name == "radamschedulefree" else 2  # it changes nothing in its first five steps
    options = {"optimizer": name, "learning_rate": 1.0 if name in ONE_RATE else 1e-3, "max_train_steps": first + 2}
    options |= {"checkpointing_steps": first, "save_precision": "fp32"}  # some find a rate that is small at first
    whole = train(tmp_path / "whole", **options)
    weights = load_file(whole / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for key, value in weights.items() if "lora_B" in key)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / f"checkpoint-{first}", resumed / f"checkpoint-{first}")
    train(resumed, resume_from_checkpoint="latest", **options)
    assert_same(weights, load_file(resumed / "pytorch_lora_weights.safetensors"))


def test_names_are_those_of_kohyas_scripts_in_small_letters():
    kohyas = "AdamW AdamW8bit PagedAdamW PagedAdamW8bit Lion8bit PagedLion8bit Lion SGDNesterov DAdaptation "
    kohyas += "DAdaptAdam DAdaptAdaGrad DAdaptAdan DAdaptLion Prodigy Adafactor "
    kohyas += "AdamWScheduleFree RAdamScheduleFree SGDScheduleFree"
    assert {name.lower() for name in kohyas.split()} <= set(OPTIMIZERS)


def test_sgdnesterov_has_nesterovs_momentum():
    options = parse(["--optimizer", "SGDNesterov"])
    chosen = settings(torch.optim.SGD, options)
    assert (chosen["nesterov"], chosen["momentum"]) == (True, 0.9)
    assert "nesterov" not in settings(torch.optim.SGD, parse(["--optimizer", "sgd"]))


def test_defaults_of_adam_are_not_meant_for_optimizers_of_other_libraries():
    plain = settings(AveragedSGD, parse(["--optimizer", "schedule_free.AveragedSGD"]))
    assert plain == {}


# ---------------------------------------------------------------------------------------------- schedule-free


def test_weights_to_be_used_are_there_inside_and_the_trained_ones_after_it_to_the_bit():
    parameter = torch.nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = AveragedSGD([parameter])
    optimizer.train()
    for _ in range(3):
        parameter.grad = torch.randn(3, 3)
        optimizer.step()
    before = parameter.detach().clone()
    with used_weights(optimizer):
        torch.testing.assert_close(parameter, optimizer.state[parameter]["x"], rtol=0, atol=0)
        assert not torch.equal(parameter, before)
    assert torch.equal(parameter, before)
    assert optimizer.param_groups[0]["train_mode"]


def test_a_schedule_free_run_exports_what_is_to_be_used_and_resumes_bit_for_bit(tmp_path):
    """Validation and checkpoints in the middle leave what is trained as it is."""
    options = {"optimizer": "schedule_free.AveragedSGD", "learning_rate": 1.0, "max_train_steps": 4, "method": "lora"}
    whole = train(tmp_path / "whole", checkpointing_steps=2, validation_prompt=["a dog"], validation_steps=1, **options)
    quiet = train(tmp_path / "quiet", checkpointing_steps=4, **options)
    exported = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, quiet)]
    assert_same(*exported)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(resumed, resume_from_checkpoint="latest", checkpointing_steps=2, **options)
    assert_same(exported[0], load_file(resumed / "pytorch_lora_weights.safetensors"))
    state = load_file(whole / "checkpoint-4" / "state" / "state.safetensors")
    layer = next(name for name in state if "to_q.lora_B" in name and not name.startswith("optimizer."))

    def product(end: str) -> torch.Tensor:
        """B A of one layer: as trained, or with the ending of what is to be used."""
        names = (
            f"{'optimizer.state.' if end else ''}{layer}{end}".replace("lora_B", factor)
            for factor in ("lora_B", "lora_A")
        )
        up, down = (state[name] for name in names)
        return up @ down

    used = product(".x")
    assert (product("") - used).norm() > 0.01 * used.norm()
    names = (layer.replace(".default", "").replace("lora_B", factor) for factor in ("lora_B", "lora_A"))
    up, down = (exported[0][name].float() for name in names)
    torch.testing.assert_close(up @ down, used, atol=1e-3, rtol=1e-2)
    report = json.loads((whole / "merge_report.json").read_text())
    assert report["loss_trained"] == pytest.approx(report["loss_merged"], rel=1e-4)


def test_averaging_twice_is_refused(refused):  # noqa: F811
    assert "--use_ema averages weights, and so does --optimizer" in refused(
        optimizer="schedule_free.AveragedSGDScheduleFree", use_ema=True
    )
