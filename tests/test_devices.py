"""Devices without float64, such as Apple's GPU: trained on, merged and exported, on an imitation that refuses it."""

import json
from collections.abc import Iterator
from pathlib import Path

import accelerate.state
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from dreambooth import train
from imitated_mps import REFUSED, imitated_mps
from reslora_diffusion import ResLoraConfig, attach, calibrate, merged_forward
from reslora_diffusion.core import functional
from reslora_diffusion.core.functional import to_float64

RUNS = {
    "middle": {"shortcut": "middle", "train_text_encoder": True, "use_ema": True},
    "block": {"shortcut": "block", "validation_prompt": "a sticker", "mixed_precision": "fp16"},
    "dora": {"method": "lora", "use_dora": True},
}


@pytest.fixture(params=["without float64", "with float64"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training runs on the imitated device: Apple's, or one that lacks nothing but is not the CPU."""
    monkeypatch.setattr(accelerate.state, "is_mps_available", lambda *args: True)
    if exact := request.param == "with float64":
        monkeypatch.setattr(functional, "WITHOUT_FLOAT64", frozenset())
    AcceleratorState._reset_state(True)
    with imitated_mps(exact):
        yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("device", "name"),
    [*(("without float64", name) for name in RUNS), ("with float64", "dora")],
    indirect=["device"],
)
def test_a_run_stays_on_its_device_and_in_what_that_can_compute(name: str, tmp_path: Path, device: None) -> None:
    output = train(tmp_path / "out", max_train_steps=2, **RUNS[name])
    assert json.loads((output / "run.json").read_text())["steps"] == 2
    report = json.loads((output / "export_report.json").read_text())
    assert report["files"]
    assert any(path.name == "pytorch_lora_weights.safetensors" for path in output.iterdir())


def test_the_imitation_refuses_what_the_device_refuses() -> None:
    with imitated_mps():
        x = torch.ones(2, 3, device="mps")
        with pytest.raises(TypeError, match=REFUSED):
            x.double()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2, 3)
        exact = to_float64(x)
        assert (exact.dtype, exact.device.type, (x + 1).device.type) == (torch.float64, "cpu", "mps")


class Spread(nn.Module):
    """Blocks of which the last half lies on another device; what goes from one block to the next is moved there, as
    accelerate does with `device_map`."""

    def __init__(self, size: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(size, size)}) for _ in range(blocks)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["proj"](x.to(layer["proj"].weight.device)))
        return x.to("cpu")


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["one precision", "cast and packed"])
@pytest.mark.parametrize(("shortcut", "num_previous"), [("input", 1), ("block", 2), ("middle", 2), ("middle", None)])
def test_a_model_that_is_spread_over_devices(shortcut: str, num_previous: int | None, precision: torch.dtype) -> None:
    """Values, gradients and the merge are those of one device; with `precision` of a base under float64 factors."""
    torch.manual_seed(0)
    model = Spread()
    attach(model, ResLoraConfig(r=2, target_modules=["proj"], shortcut=shortcut, num_previous=num_previous))
    model.double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        nn.init.normal_(parameter, std=0.5)
    for layer in model.layers:
        layer["proj"].base_layer.to(precision)
    x = torch.randn(3, 5, 8, dtype=precision)

    def found() -> list[torch.Tensor]:
        y = model(x)
        model.zero_grad()
        y.square().sum().backward()
        calibrate(model, [{"x": x}])
        with torch.no_grad(), merged_forward(model):
            merged = model(x)
        return [y.detach(), merged, *(p.grad.cpu().clone() for p in model.parameters() if p.requires_grad)]

    wanted = found()
    with imitated_mps(float64=True):
        for layer in model.layers[2:]:
            layer.to("mps")
        got = found()
        assert {p.device.type for p in model.parameters()} == {"cpu", "mps"}
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
