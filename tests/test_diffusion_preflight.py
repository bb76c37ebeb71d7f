"""What a run says it will take, held against what it takes."""

import re
import shutil

import torch
from torch import nn

from dreambooth import SUBJECTS, arguments, train
from reslora_diffusion.diffusion.options import DreamBoothOptions, checks, preflight
from reslora_diffusion.diffusion.options.preflight import kept_for_backward, optimizer_line
from reslora_diffusion.diffusion.train import history
from reslora_diffusion.utils import environment


class Plain:
    """The part of a denoiser that is asked: two layers, whose inputs are kept, and a square, whose argument is."""

    def __init__(self) -> None:
        self.models = (nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)),)

    def loss(self, batch: torch.Tensor, instances: int) -> torch.Tensor:
        return self.models[0](batch).square().sum() / instances


def test_a_warm_up_is_a_number_of_steps_or_a_share_of_them():
    for given, said in ((0.125, "cosine with 12.5 % of the steps of warm-up"), (50, "cosine with 50 steps of warm-up")):
        assert said in optimizer_line(DreamBoothOptions(lr_scheduler="cosine", lr_warmup_steps=given), 1)


def test_activations_are_what_backward_needs_without_the_weights():
    batch = torch.randn(10, 64)
    # Input, the result of ReLU (its own and the next layer's), and what is squared; the loss's divisor is a number.
    assert kept_for_backward(Plain(), [batch]) == 4 * 10 * (64 + 32 + 16)


def test_more_images_are_said_to_take_more_and_checkpointing_less(tmp_path, capsys):
    def megabytes(name: str, **options: object) -> float:
        train(tmp_path / name, max_train_steps=1, **options)
        said = capsys.readouterr().out
        assert "what a training forward keeps" in said
        return float(re.search(r"activations ([\d.,]+) MB", said)[1].replace(",", ""))

    one, four = megabytes("one", train_batch_size=1), megabytes("four", train_batch_size=4)
    assert 3 < four / one < 4.5
    assert megabytes("less", train_batch_size=4, gradient_checkpointing=True) < 0.6 * four


def test_extras_that_are_not_installed_are_said_and_not_needed(monkeypatch, tmp_path) -> None:
    """The default tracker and the loss plot are extras; a tracker that was asked for needs its package."""
    for module in (preflight, history, environment):
        monkeypatch.setattr(module, "is_installed", lambda package: package not in ("tensorboard", "matplotlib"))
    default, asked = DreamBoothOptions(), DreamBoothOptions()
    asked.update({"report_to": "tensorboard"})
    assert preflight.tracker_of(default) == "none"
    assert preflight.tracker_of(asked) == "tensorboard"
    tracker, plot = preflight.not_installed(default)
    assert "pip install tensorboard" in tracker
    assert "pip install matplotlib" in plot
    assert list(checks.missing_packages(default)) == []
    assert "tensorboard" in next(iter(checks.missing_packages(asked)))
    history.plot_losses({"LoRA": [{"step": 1, "loss": 1.0}]}, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_without_a_step_count_a_run_has_steps_for_its_images_and_records_them(tmp_path) -> None:
    """100 for each image between 500 and 2,000; passes that are asked for are taken; the record repeats the run."""
    subject = tmp_path / "many"
    subject.mkdir()
    for number in range(7):
        shutil.copy(SUBJECTS / "octopus" / "0.png", subject / f"{number}.png")
    for options, steps in (
        ({}, 500),
        ({"instance_data_dir": subject}, 700),
        ({"num_train_epochs": 2}, 6),
        ({"max_train_steps": 9}, 9),
    ):
        given = arguments(tmp_path / "out", **{"max_train_steps": None} | options)
        assert checks.check(given).max_train_steps == steps
        assert given.recorded()["max_train_steps"] == (None if "num_train_epochs" in options else steps)
