"""What schedules and variants change about an operation: gates, frozen factors and transforms, in whole models."""

import copy

import pytest
import torch
from torch import nn

from models import build, inputs, output
from reference import adapt_naively
from reslora_diffusion import explain_kernels, get_adapter, merged_factors, merged_forward
from reslora_diffusion.diffusion.models.attn_processor import set_attn_processors
from test_core_shortcuts import adapted, factors_of, gradients, loss_of

CASES = [("none", 1), ("input", 1), ("block", 2), ("middle", 2), ("middle", None)]


def with_gates(model: nn.Module, on_device: bool) -> dict[str, object]:
    """Every third block closed."""
    adapter = get_adapter(model)
    numbers = {name: float(place % 3 != 1) for place, name in enumerate(adapter.sites)}
    gates = {name: torch.tensor(gate, dtype=torch.float64) if on_device else gate for name, gate in numbers.items()}
    adapter.set_gates(gates)
    return numbers


def gated_reference(name: str, model: nn.Module, shortcut: str, m: int | None, gates: dict) -> tuple[nn.Module, dict]:
    """A closed block adds nothing wherever it is used; `input` still hands on x, `middle` no bottleneck."""
    factors = {
        layer: (A * gates[layer] if shortcut == "middle" else A, B * gates[layer], scaling)
        for layer, (A, B, scaling) in factors_of(model).items()
    }
    base = build(name)
    return base, adapt_naively(base, factors, shortcut, m, lambda m: output(name, m, inputs(name)))


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
def test_a_gate_acts_wherever_a_block_is_used(shortcut: str, num_previous: int | None, on_device: bool) -> None:
    model = adapted("llama", shortcut, num_previous)
    open_output = output("llama", model, inputs("llama"))
    gates = with_gates(model, on_device)
    base, blocks = gated_reference("llama", model, shortcut, num_previous, gates)
    got, wanted = output("llama", model, inputs("llama")), output("llama", base, inputs("llama"))
    assert (got - wanted).abs().max() < 1e-10
    assert (got - open_output).abs().max() > 1e-3
    loss_of(got).backward()
    loss_of(wanted).backward()
    for key, gradient in gradients(model).items():
        layer, _, side = key.rpartition(".")
        if gates[layer]:
            reference = getattr(blocks[layer], side).grad
            assert (gradient - reference).abs().max() <= 1e-10 * reference.abs().max(), key
        else:
            assert gradient is None or not gradient.any(), key
    get_adapter(model).set_gates({})
    assert torch.allclose(output("llama", model, inputs("llama")), open_output, atol=1e-12)


def test_a_closed_number_costs_no_product_of_low_rank() -> None:
    model = adapted("llama", "none", 1)
    adapter = get_adapter(model)
    adapter.set_gates(dict.fromkeys(adapter.sites, 0.0))
    out = output("llama", model, inputs("llama"))
    assert set(explain_kernels(model).layers.values()) == {("closed", "its gate is 0")}
    assert torch.equal(out, output("llama", build("llama"), inputs("llama")))


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_gates_in_groups_and_under_checkpointing(shortcut: str) -> None:
    results = []
    for way in ("alone", "grouped", "checkpointed"):
        model = adapted("unet", shortcut, 1).train()
        with_gates(model, on_device=True)
        if way == "grouped":
            set_attn_processors(model)
        elif way == "checkpointed":
            model.enable_gradient_checkpointing()
        loss_of(output("unet", model, inputs("unet"))).backward()
        results.append(gradients(model))
    for other in results[1:]:
        for key, gradient in results[0].items():
            assert (other[key] - gradient).abs().max() <= 1e-10 * gradient.abs().max().clamp_min(1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["block", "middle"])
def test_a_gate_on_the_device_changes_without_recompilation(shortcut: str) -> None:
    import torch._dynamo as dynamo

    dynamo.reset()
    model = adapted("llama", shortcut, 1)
    with_gates(model, on_device=True)
    frames: list[int] = []

    def backend(graph: nn.Module, examples: list) -> nn.Module:
        frames.append(1)
        return graph

    compiled = torch.compile(lambda *args: output("llama", model, args), backend=backend)
    for round_of in range(3):
        for place, gate in enumerate(get_adapter(model).gates.values()):
            gate.fill_(float((place + round_of) % 2))
        got = compiled(*inputs("llama"))
        assert torch.allclose(got, output("llama", model, inputs("llama")), atol=1e-12)
    assert len(frames) == 1
    dynamo.reset()


@pytest.mark.parametrize(("shortcut", "num_previous"), [("none", 1), ("block", 2)])
def test_frozen_factors_stand_beside_the_trained_ones(shortcut: str, num_previous: int) -> None:
    model = adapted("llama", shortcut, num_previous)
    adapter, own = get_adapter(model), factors_of(model)
    torch.manual_seed(1)
    frozen = {
        name: (torch.randn(2, A.shape[1], dtype=A.dtype) / 4, torch.randn(B.shape[0], 2, dtype=B.dtype) / 4)
        for name, (A, B, _) in list(own.items())[::2]
    }
    adapter.add_frozen(frozen)
    factors = {
        name: (torch.cat([A, frozen[name][0]]), torch.cat([B, frozen[name][1]], 1), s) if name in frozen else (A, B, s)
        for name, (A, B, s) in own.items()
    }
    base, args = build("llama"), inputs("llama")
    blocks = adapt_naively(base, factors, shortcut, num_previous, lambda m: output("llama", m, args))
    got, wanted = output("llama", model, args), output("llama", base, args)
    assert (got - wanted).abs().max() < 1e-10
    loss_of(got).backward()
    loss_of(wanted).backward()
    for name, (A, _, _) in own.items():
        reference = blocks[name].lora_A.grad[: len(A)]
        assert (gradients(model)[f"{name}.lora_A"] - reference).abs().max() <= 1e-10 * reference.abs().max()
    with merged_forward(model):
        assert torch.allclose(output("llama", model, args), wanted, atol=1e-10)
    name = next(iter(frozen))
    assert len(merged_factors(model)[name].lora_A) == len(factors[name][0])
    other = copy.deepcopy(model)
    assert torch.allclose(output("llama", other, args), wanted, atol=1e-10)


def test_frozen_factors_and_gates_are_refused_where_they_do_not_fit() -> None:
    adapter = get_adapter(adapted("llama", "middle", 1))
    with pytest.raises(ValueError, match="no layers nonsense; it has such as model.layers.0"):
        adapter.set_gates({"nonsense": 0.0})
    name = next(iter(adapter.sites))
    with pytest.raises(ValueError, match="for shortcuts none and block; got 'middle'"):
        adapter.add_frozen({name: adapter.factors(name)})


def test_a_transform_scales_the_whole_layer() -> None:
    model, base = adapted("llama", "block", 1), build("llama")
    adapter = get_adapter(model)
    adapter.transform = lambda layer, op: lambda h: 0.5 * h
    half = adapted("llama", "block", 1)
    for layer in get_adapter(half).layers.values():
        layer.base_layer.weight.data.mul_(0.5)
        layer.scaling["default"] *= 0.5
    args = inputs("llama")
    assert torch.allclose(output("llama", model, args), output("llama", half, args), atol=1e-12)
    assert (output("llama", model, args) - output("llama", base, args)).abs().max() > 1e-3
    layer = next(iter(adapter.layers.values()))
    layer.base_layer.register_forward_hook(lambda module, args, out: None)
    assert torch.allclose(output("llama", model, args), output("llama", half, args), atol=1e-12)
