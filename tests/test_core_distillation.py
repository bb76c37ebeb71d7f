"""Refining a merge by teaching the merged model what the unmerged one says."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import inputs
from reslora_diffusion import calibrate, distill, get_adapter, merged_factors, merged_forward
from test_core_merging import BATCHES, HELD_OUT, adapted, forward

MANY = [inputs("llama", batch=8, seed=n) for n in range(32)]  # enough tokens not to be learned by heart


def far(model: nn.Module) -> float:
    """Mean squared error of the merged model's output on batches that nothing was fitted on."""
    with torch.no_grad():
        trained = [forward(model, batch) for batch in HELD_OUT]
        with merged_forward(model):
            return sum(F.mse_loss(forward(model, b), t).item() for b, t in zip(HELD_OUT, trained, strict=True))


@pytest.mark.parametrize(("shortcut", "num_previous"), [("input", 1), ("middle", None)])
def test_it_brings_the_merged_model_nearer_at_equal_rank(shortcut: str, num_previous: int | None) -> None:
    model = adapted(shortcut, num_previous=num_previous)
    calibrate(model, MANY, forward)
    before, factors = far(model), merged_factors(model)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    result = distill(model, MANY, forward, steps=200)
    assert result.kept
    assert result.after < result.before
    assert far(model) < 0.9 * before
    for name, f in merged_factors(model).items():
        assert f.lora_A.shape == factors[name].lora_A.shape
        assert torch.equal(f.lora_B, factors[name].lora_B)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_the_gradient_is_that_of_the_plain_lora() -> None:
    """One step of descent, against autograd through a base whose weights are W + s B A written out."""
    model = adapted("middle", num_previous=None)
    calibrate(model, BATCHES, forward)
    factors, batch = merged_factors(model), BATCHES[1]
    target = forward(model, batch).detach()
    base = copy.deepcopy(model)
    layers = dict(base.named_modules())
    leaves = {name: f.lora_A.clone().requires_grad_() for name, f in factors.items()}
    weights = {
        f"{name}.base_layer.weight": layers[name].base_layer.weight + f.scaling * f.lora_B @ leaves[name]
        for name, f in factors.items()
    }
    for layer in (layers[name] for name in factors):
        layer.enable_adapters(False)
    F.mse_loss(torch.func.functional_call(base, weights, batch)[0], target).backward()
    distill(model, [BATCHES[0], batch], forward, steps=1, learning_rate=1e-3)
    for name, f in merged_factors(model).items():
        moved, gradient = f.lora_A - factors[name].lora_A, leaves[name].grad
        clear = gradient.abs() > 1e-6 * gradient.abs().max()  # the first step of Adam is the sign
        assert torch.equal(moved.sign()[clear], -gradient.sign()[clear])
        assert moved[clear].abs().max() <= 1.01e-3 * factors[name].lora_A.square().mean().sqrt()


def test_a_merge_that_it_would_not_improve_stays() -> None:
    model = adapted("input")
    calibrate(model, BATCHES, forward)
    before = merged_factors(model)
    result = distill(model, BATCHES, forward, steps=3, learning_rate=50.0)
    assert not result.kept
    assert result.after > result.before
    assert all(torch.equal(f.lora_A, before[name].lora_A) for name, f in merged_factors(model).items())


def test_exact_merges_are_left_alone() -> None:
    for shortcut in ("none", "block"):
        assert not distill(adapted(shortcut), BATCHES, forward).kept


def test_what_is_missing_is_said() -> None:
    model = adapted("input")
    with pytest.raises(ValueError, match="call calibrate"):
        distill(model, BATCHES, forward)
    get_adapter(model).config.merge_method = "drop"
    with pytest.raises(ValueError, match=r"got 1 batches, wanted at least 2(?s:.*)merge_method drop keeps no"):
        distill(model, BATCHES[:1], forward)
