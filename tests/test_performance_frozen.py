"""Frozen layers that keep less: same outputs, same gradients, less saved, and nothing left when they are taken off."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models import inputs, output, unet
from reslora_diffusion import ResLoraConfig, attach
from reslora_diffusion.diffusion.models import optimize
from reslora_diffusion.diffusion.models.memory import count, restore_memory, save_memory
from test_core_shortcuts import adapted, gradients, loss_of


def run(model: nn.Module, args: tuple, kind: str = "unet") -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Output, gradients, and the bytes that autograd keeps."""
    model.zero_grad()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = output(kind, model, args)
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    saved.clear()
    loss_of(out).backward()
    return out.detach(), {name: value.clone() for name, value in gradients(model).items()}, size


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_nothing_changes_but_what_is_kept(shortcut: str, checkpointing: bool) -> None:
    model, args = adapted("unet", shortcut, 1), inputs("unet")
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    wanted, wanted_gradients, before = run(model, args)
    assert save_memory(model) > 20
    got, got_gradients, after = run(model, args)
    assert (got - wanted).abs().max() < 1e-12
    for name, gradient in wanted_gradients.items():
        assert (got_gradients[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name
    if not checkpointing:
        assert after < 0.85 * before


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_a_transformer_computes_as_before(shortcut: str) -> None:
    """Its normed states are modulated before adapted layers read them: there is nothing to make again."""
    model, args = adapted("flux", shortcut, 1), inputs("flux")
    wanted, wanted_gradients, before = run(model, args, "flux")
    assert save_memory(model) > 5
    got, got_gradients, after = run(model, args, "flux")
    assert (got - wanted).abs().max() < 1e-12
    for name, gradient in wanted_gradients.items():
        assert (got_gradients[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name
    assert after <= before


def test_restoring_leaves_nothing() -> None:
    model, args = adapted("unet", "input", 1), inputs("unet")
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    wanted, _, before = run(model, args)
    save_memory(model)
    assert save_memory(model) == 0
    other = copy.deepcopy(model)
    restore_memory(model)
    assert count(model) == 0
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    got, _, after = run(model, args)
    assert torch.equal(got, wanted)
    assert after == before
    assert count(other) > 20
    assert (output("unet", other, args) - wanted).abs().max() < 1e-12


def test_trained_layers_autocast_and_no_gradients_compute_as_before() -> None:
    model, args = adapted("unet", "none", 1), inputs("unet")
    twin = copy.deepcopy(model)
    save_memory(model)
    for each in (model, twin):
        for module in each.modules():
            if isinstance(module, nn.Conv2d | nn.GroupNorm):
                module.requires_grad_(True)
        loss_of(output("unet", each, args)).backward()
    for (name, got), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        if wanted.grad is not None:
            assert torch.allclose(got.grad, wanted.grad, rtol=1e-9, atol=1e-10), name
    with torch.no_grad():
        assert (output("unet", model, args) - output("unet", twin, args)).abs().max() < 1e-12
    half, other = model.float().requires_grad_(False), twin.float().requires_grad_(False)
    single = tuple(value.float() if value.is_floating_point() else value for value in args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output("unet", half, single), output("unet", other, single))


def test_scale_shift_blocks_and_up_and_down_blocks() -> None:
    """Blocks whose second norm is not followed by their activation keep it as it is."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        norm_num_groups=4,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    model.double().requires_grad_(False)
    noisy, timesteps, prompt = inputs("unet")
    noisy.requires_grad_()
    found = []
    for _ in range(2):
        out = output("unet", model, (noisy, timesteps, prompt))
        found.append((out.detach(), *torch.autograd.grad(loss_of(out), noisy)))
        assert save_memory(model) > 0 or len(found) == 2
    for got, wanted in zip(found[1], found[0], strict=True):
        assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()


def test_what_adapters_read_is_made_again() -> None:
    """Outputs of a LayerNorm that an adapted layer reads are not kept, and second derivatives still come out right."""
    torch.manual_seed(0)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.to_q = nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.to_q(self.norm(x))

    model = Normed().double()
    attach(model, ResLoraConfig(r=2, target_modules=["to_q"], shortcut="none"))
    model.double().requires_grad_(False)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6), (4, 2)))
    names = [f"to_q.lora_{side}.default.weight" for side in "AB"]

    def run(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, factors, strict=True)), (x,))

    wanted = run(x, A, B)
    kept: list[list[int]] = []
    for memory in (False, True):
        if memory:
            assert save_memory(model) == 1
        normed: list[torch.Tensor] = []
        hook = model.norm.register_forward_hook(lambda module, args, out, normed=normed: normed.append(out))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(id(t)) or t, lambda t: t):
            got = run(x, A, B)
        kept.append([id(normed[0]) in saved])
        hook.remove()
        assert torch.equal(got, wanted)
    assert kept == [[True], [False]]
    assert torch.autograd.gradcheck(run, (x, A, B))
    assert torch.autograd.gradgradcheck(run, (x, A, B))


@pytest.mark.parametrize(
    ("kind", "said"),
    [("leaf_level", "not finite"), ("block_level", "not finite"), ("layerwise_casting", "cannot multiply")],
)
def test_weights_that_are_gone_at_backward_are_refused(kind, said, tmp_path):
    """With diffusers' group offload every gradient of an adapter is NaN, and nothing says so."""
    model = unet()
    attach(model, ResLoraConfig(r=4, target_modules=["to_q"], shortcut="none", init_lora_weights="gaussian"))
    if kind == "layerwise_casting":
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    else:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        where = {"onload_device": torch.device("cpu"), "offload_to_disk_path": str(tmp_path)}
        model.enable_group_offload(offload_type=kind, **where, **blocks)
    with pytest.raises(ValueError, match=said):
        optimize.optimize_for_training(model, attention=True)
