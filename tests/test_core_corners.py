"""Corners where a fast or a convenient form could quietly differ from the plain one."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize, prune

from models import UNET_TARGETS, build, inputs, output, randomise
from reslora_diffusion import (
    ResLoraConfig,
    attach,
    calibrate,
    distill,
    explain,
    handover,
    merge_report,
    merged_factors,
    merged_forward,
)
from reslora_diffusion.diffusion.models.attn_processor import set_attn_processors
from reslora_diffusion.diffusion.models.memory import save_memory

SHORTCUTS = ("none", "input", "block", "middle")


class Stack(nn.Module):
    """x + out(relu(fc(x))), three times; what comes between may change things in place."""

    def __init__(self, inplace: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(8, 12), "out": nn.Linear(12, 8), "norm": nn.LayerNorm(8)}) for _ in range(3)
        )
        self.inplace, self.norm = inplace, norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            read = layer["norm"](x) if self.norm else x
            read = read.mul_(2.0) if self.inplace and self.norm else 2.0 * read
            hidden = layer["fc"](read)
            x = x + layer["out"](torch.relu_(hidden) if self.inplace else torch.relu(hidden))
        return x


def stack(seed: int = 0, **options: bool) -> Stack:
    torch.manual_seed(seed)
    return Stack(**options).double()


def config(shortcut: str, **options: object) -> ResLoraConfig:
    return ResLoraConfig(r=2, lora_alpha=4, target_modules=["fc", "out"], shortcut=shortcut, **options)


def batch(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_in_place_neighbours_change_nothing(shortcut: str) -> None:
    models = []
    for inplace in (False, True):
        model = stack(inplace=inplace, norm=True)
        attach(model, config(shortcut))
        randomise(model)
        assert save_memory(model) == 3
        models.append(model)
    wanted, got = (gradients(model, batch(2, 3)) for model in models)
    assert len(wanted) == 12
    assert wanted.keys() == got.keys()
    assert all(torch.allclose(got[name], gradient, atol=1e-10) for name, gradient in wanted.items())


class Pair(nn.Module):
    """Two layers that read x, which may be changed in place between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if self.between:
            x = x.mul_(2) if self.between == "in place" else x * 2
        return torch.tanh(y + self.out(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["fused", "plain"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_what_is_changed_in_place_after_it_was_read(shortcut: str, dropout: float) -> None:
    """The layers see it as it is when they read it, and no later layer takes it for what it was."""
    torch.manual_seed(0)
    model = nn.Sequential(Pair(), Pair()).double()
    attach(model, config(shortcut, lora_dropout=dropout))
    model.eval()
    randomise(model)

    def outputs(place: int) -> list[torch.Tensor]:
        found = []
        for how in ("a copy", "in place"):
            model[place].between = how
            found.append(model(batch(2, 3)))
            model[place].between = None
        return found

    with torch.no_grad():
        wanted, got = outputs(1)
        assert (got - wanted).abs().max() < 1e-12
        if shortcut == "input":
            with pytest.raises(RuntimeError, match="what 0.fc handed on was changed in place"):
                outputs(0)
        else:
            wanted, got = outputs(0)
            assert (got - wanted).abs().max() < 1e-12


def test_hooks_of_backward_on_the_base_are_called() -> None:
    model = stack()
    attach(model, config("none"))
    randomise(model)
    base = model.layers[1]["fc"].get_base_layer()
    called = []
    for name in ("pre_hook", "hook"):
        handle = getattr(base, f"register_full_backward_{name}")(lambda *args, name=name: called.append(name))
        model(batch(2, 3)).sum().backward()
        handle.remove()
    assert called == ["pre_hook", "hook"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_trace_can_be_saved(shortcut: str, tmp_path: Path) -> None:
    model = stack()
    attach(model, config(shortcut))
    randomise(model)
    torch.jit.trace(model, batch(2, 3), check_trace=False).save(tmp_path / "model.pt")
    assert torch.allclose(torch.jit.load(tmp_path / "model.pt")(batch(2, 3)), model(batch(2, 3)), atol=1e-12)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_no_tokens_at_all(shortcut: str) -> None:
    model = stack()
    attach(model, config(shortcut))
    randomise(model)
    for shape in ((0,), (0, 3), (2, 0)):
        assert model(batch(*shape)).shape == (*shape, 8)
        found = gradients(model, batch(*shape))
        assert len(found) == 12
        assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_trained_biases_are_trained_and_not_dropped(shortcut: str) -> None:
    model = get_peft_model(stack(), config(shortcut, bias="lora_only"))
    randomise(model)
    biases = {name: g for name, g in gradients(model, batch(2, 3)).items() if name.endswith("bias")}
    assert len(biases) == 6
    assert all(gradient.abs().max() > 0 for gradient in biases.values())
    with pytest.raises(ValueError, match="trains biases, which are no factors"):
        merged_factors(model)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_only_an_adapter_that_computes_is_calibrated(shortcut: str) -> None:
    model = get_peft_model(stack(), config(shortcut))
    model.add_adapter("second", config(shortcut))
    randomise(model)
    x = [batch(2, 3), batch(2, 3, seed=6)]
    message = "does not compute with its shortcuts now"
    with pytest.raises(ValueError, match=message):
        calibrate(model, x, run, "second")
    with model.disable_adapter(), pytest.raises(ValueError, match=message):
        calibrate(model, x, run)
    calibrate(model, x, run)
    with merged_forward(model), pytest.raises(ValueError, match=message):
        calibrate(model, x, run)
    with pytest.raises(ValueError, match=message):
        distill(model, x, run, "second")
    with pytest.raises(ValueError, match=message):
        merge_report(model, x, run, lambda model, batch: 0.0, "second")
    before = model(x[0])
    with pytest.raises(ValueError, match="call calibrate"):  # before the first layer is touched
        model.merge_adapter(["default", "second"])
    assert torch.equal(model(x[0]), before)


@pytest.mark.parametrize("shortcut", ["input", "middle", "block"])
def test_a_handover_leaves_other_models_of_the_same_configuration(shortcut: str) -> None:
    shared = config(shortcut)
    first, second = (get_peft_model(stack(seed), shared) for seed in (0, 1))
    randomise(first)
    if shortcut != "block":
        calibrate(first, [batch(2, 3)], run)
    handover(first)
    assert second.peft_config["default"].shortcut == shortcut == shared.shortcut
    assert first.peft_config["default"].shortcut == "none"
    if shortcut == "block":
        assert {site.rank for chain in explain(first).chains for site in chain.sites} == {2, 4}


def test_distilling_through_checkpointed_blocks() -> None:
    """diffusers checkpoints in evaluation too, and computes parts again in the backward."""
    results = []
    for checkpointing in (False, True):
        model = build("unet")
        attach(model, ResLoraConfig(r=2, lora_alpha=4, target_modules=UNET_TARGETS, shortcut="middle"))
        model.double()
        randomise(model, size=0.1)
        if checkpointing:
            model.enable_gradient_checkpointing()
        batches = [inputs("unet", seed=n) for n in range(3)]
        calibrate(model, batches, lambda m, b: output("unet", m, b))
        results.append(distill(model, batches, lambda m, b: output("unet", m, b), steps=3))
        assert all(p.grad is None for p in model.parameters())
    assert results[0].after != results[0].before
    assert results[0] == pytest.approx(results[1])


def test_attention_on_images_is_left_to_the_layers() -> None:
    """`UNet2DModel` gives its attentions [B, C, H, W]."""
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    torch.manual_seed(0)
    model = UNet2DModel(sample_size=8, **sizes, **blocks).double().eval()
    attach(model, ResLoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], shortcut="block"))
    randomise(model)
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 4])
    plain = model(x, t).sample
    assert set_attn_processors(model)
    assert torch.allclose(model(x, t).sample, plain, atol=1e-12)


def test_processors_with_two_active_adapters() -> None:
    model = build("unet")
    for name in ("a", "b"):
        model.add_adapter(ResLoraConfig(r=2, target_modules=UNET_TARGETS, shortcut="middle"), name)
    model.double()
    randomise(model)
    model.set_adapter(["a", "b"])
    plain = output("unet", model, inputs("unet"))
    assert set_attn_processors(model, "a")
    assert torch.allclose(output("unet", model, inputs("unet")), plain, atol=1e-12)


def test_deleted_before_it_ever_ran() -> None:
    model = build("unet").double()
    base = output("unet", model, inputs("unet"))
    for name in ("a", "b"):
        model.add_adapter(ResLoraConfig(r=2, target_modules=UNET_TARGETS, shortcut="input"), name)
    model.delete_adapters("a")
    for _ in range(2):
        assert torch.allclose(output("unet", model, inputs("unet")), base, atol=1e-12)
    model.delete_adapters("b")
    assert torch.allclose(output("unet", model, inputs("unet")), base, atol=1e-12)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_weights_that_are_made_of_others(shortcut: str) -> None:
    """Pruned bases and parametrised factors have no parameter called weight."""
    model = stack()
    attach(model, config(shortcut))
    randomise(model)
    x = batch(2, 3)
    for layer in model.layers:
        prune.l1_unstructured(layer["fc"].base_layer, "weight", amount=0.3)
        parametrize.register_parametrization(layer["out"].lora_A["default"], "weight", nn.Tanh())
    by_hand = stack()
    attach(by_hand, config(shortcut))
    by_hand.load_state_dict(
        {
            name: (module.weight if leaf == "weight" else module.bias).detach()
            for name in by_hand.state_dict()
            for path, _, leaf in [name.rpartition(".")]
            for module in [model.get_submodule(path)]
        }
    )
    assert torch.allclose(model(x), by_hand(x), atol=1e-12)
