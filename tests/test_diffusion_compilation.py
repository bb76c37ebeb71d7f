"""`--compile` and `--cuda_graph`: the numbers of an eager run, and a machine that lacks something trains without."""

import pytest
import torch

from dreambooth import arguments, train
from reslora_diffusion.diffusion import compilation
from reslora_diffusion.diffusion.history import read_history


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_history(folder) if "loss" in row]


def stays_eager(said, **options):
    """What `compiled` makes of a denoiser, if it may not compile."""
    denoiser = object()
    args = arguments("out", **options)
    assert compilation.compiled(denoiser, args, torch.device("cpu"), 1, said.append) is denoiser


def test_nothing_is_compiled_or_said_unasked():
    said = []
    stays_eager(said)
    assert said == []


def test_a_machine_without_a_gpu_says_so_once_and_trains(tmp_path, capsys):
    folder = train(tmp_path / "out", cuda_graph=True, max_train_steps=1)
    assert len(losses(folder)) == 1
    assert capsys.readouterr().out.count("without a CUDA device; going on without graphs") == 1


def test_a_machine_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(compilation, "why_not_compiled", lambda device: "torch.compile needs a C++ compiler")
    said = []
    stays_eager(said, compile=True)
    assert said == ["--compile: torch.compile needs a C++ compiler; going on without"]


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_a_compiled_run_is_an_eager_one(tmp_path, shortcut):
    """To rounding; one graph without breaks, compiled once: not again for later steps, nor for validation."""
    if reason := compilation.why_not_compiled(torch.device("cpu")):
        pytest.skip(reason)
    from torch._dynamo.utils import counters

    options = {"shortcut": shortcut, "max_train_steps": 4, "validation_steps": 2}
    wanted = losses(train(tmp_path / "eager", **options))
    torch._dynamo.reset()
    counters.clear()
    got = losses(train(tmp_path / "compiled", compile=True, **options))
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 1
    assert got == pytest.approx(wanted, rel=1e-4)
    torch._dynamo.reset()
