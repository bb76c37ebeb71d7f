"""`--compile`: the numbers of an eager run, and a machine that lacks something trains without."""

import pytest
import torch

from dreambooth import arguments, several_sizes, train
from reslora_diffusion.diffusion.models import compilation
from reslora_diffusion.diffusion.train.history import read_history


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


def test_a_machine_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(compilation, "why_not_compiled", lambda device: "torch.compile needs a C++ compiler")
    said = []
    stays_eager(said, compile=True)
    assert said == ["--compile: torch.compile needs a C++ compiler; going on without"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"shortcut": "input", "validation_steps": 2}, 1),  # not again for later steps, nor for validation
        ({"shortcut": "middle", "validation_steps": 2}, 1),
        ({"shortcut": "block", "handover": 0.5}, 2),
        ({"shortcut": "input", "sizes": True}, 2),
        ({"shortcut": "block", "gradient_checkpointing": True}, 1),
        ({"shortcut": "middle", "gradient_checkpointing": True}, None),  # its values cross what is recomputed
    ],
    ids=["input", "middle", "handover", "sizes", "checkpointing", "checkpointing-middle"],
)
def test_a_compiled_run_is_an_eager_one(tmp_path, options, graphs):
    """To rounding; in graphs without breaks, each compiled once."""
    if reason := compilation.why_not_compiled(torch.device("cpu")):
        pytest.skip(reason)
    from torch._dynamo.utils import counters

    options = {"max_train_steps": 4, "lr_warmup_steps": 0} | options
    options |= several_sizes(tmp_path) if options.pop("sizes", False) else {}
    wanted = losses(train(tmp_path / "eager", **options))
    torch._dynamo.reset()
    counters.clear()
    got = losses(train(tmp_path / "compiled", compile=True, **options))
    if graphs:
        assert dict(counters["graph_break"]) == {}
        assert counters["stats"]["unique_graphs"] == graphs
    assert got == pytest.approx(wanted, rel=1e-4)
    torch._dynamo.reset()
