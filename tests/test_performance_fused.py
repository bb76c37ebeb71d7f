"""The fused forms against the plain ones: values, gradients, second derivatives, precisions, and when they are used."""

import logging

import pytest
import torch
from torch import nn

from models import UNET_TARGETS, build, inputs, output, randomise
from reslora_diffusion import ResLoraConfig, attach, get_controller
from reslora_diffusion.core import fast_forward
from reslora_diffusion.core.fused import fused_linears
from reslora_diffusion.core.fused_layer import FusedLinear, Publishes
from reslora_diffusion.core.packing import Layout, concatenate, pack
from reslora_diffusion.diffusion.attn_processor import set_attn_processors
from test_core_shortcuts import adapted, gradients, loss_of

CASES = [("none", 1), ("input", 1), ("block", 2), ("middle", 1), ("middle", 2), ("middle", None)]


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("carry", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("publishes", Publishes)
def test_first_and_second_derivatives(publishes: Publishes, carry: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(4, 3), nn.Linear(4, 2, bias=False)]
    for linear in linears:
        linear.double().requires_grad_(False)
    later = (1, 2) if publishes is Publishes.NEXT else ()
    x, D, U = leaf(2, 3, 4), leaf(5 + sum(later), 4), [leaf(3, 2), leaf(2, 3)]
    carried = [leaf(2, 3, rank) if given else None for rank, given in zip((2, 3), carry, strict=True)]
    given = [c for c in carried if c is not None]

    def run(x: torch.Tensor, D: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = iter(rest[2:])
        c = [next(values) if one is not None else None for one in carried]
        outputs, published = fused_linears(x, D, rest[:2], linears, (0.5, 1.0), c, publishes, later)
        return *outputs, *published

    def plainly(x: torch.Tensor, D: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = iter(rest[2:])
        z = x @ D.T
        own = z[..., :5].split((2, 3), -1)
        totals = [a + next(values) if c is not None else a for a, c in zip(own, carried, strict=True)]
        y = [f(x) + s * t @ u.T for f, s, t, u in zip(linears, (0.5, 1.0), totals, rest[:2], strict=True)]
        more = {
            Publishes.NOTHING: (),
            Publishes.NEXT: z[..., 5:].split(later, -1) if later else (),
            Publishes.OWN: own,
            Publishes.SUM: totals,
        }
        return *y, *more[publishes]

    args = (x, D, *U, *given)
    for got, wanted in zip(run(*args), plainly(*args), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("adds", ["nothing", "carry", "read"])
@pytest.mark.parametrize("publishes", Publishes)
def test_derivatives_of_one_layer(publishes: Publishes, adds: str, parts: int) -> None:
    """D and U in one piece or several, with a carried bottleneck or another input of the down-projection."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 3).double().requires_grad_(False)
    later = 2 if publishes is Publishes.NEXT else 0
    down = [leaf(2 + later if place == parts - 1 else 2, 4) for place in range(parts)]
    up = [leaf(3, 2) for _ in range(parts)]
    x, added = leaf(2, 3, 4), leaf(2, 3, 4 if adds == "read" else 2 * parts)

    def run(x: torch.Tensor, added: torch.Tensor, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        read, carry = added if adds == "read" else None, added if adds == "carry" else None
        found = FusedLinear.apply(publishes, 0.5, parts, x, linear.weight, linear.bias, read, carry, *factors)
        return found if isinstance(found, tuple) else (found,)

    def plainly(x: torch.Tensor, added: torch.Tensor, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = 2 * parts
        rows = (added if adds == "read" else x) @ torch.cat(factors[:parts]).T
        z = rows[..., :own] + (added if adds == "carry" else 0)
        y = linear(x) + 0.5 * z @ torch.cat(factors[parts:], 1).T
        more = {Publishes.NOTHING: (), Publishes.NEXT: (rows[..., own:],), Publishes.OWN: (rows,), Publishes.SUM: (z,)}
        return y, *more[publishes]

    args = (x, added, *down, *up)
    for got, wanted in zip(run(*args), plainly(*args), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12)
    used = args if adds != "nothing" else (x, *down, *up)
    call = run if adds != "nothing" else lambda x, *factors: run(x, added, *factors)
    assert torch.autograd.gradcheck(call, used)
    assert torch.autograd.gradgradcheck(call, used)


def test_packed_factors_get_the_sum_of_their_gradients() -> None:
    torch.manual_seed(0)
    factors = [leaf(2, 4), leaf(3, 4), leaf(5, 2), leaf(5, 3)]
    layouts = [Layout((0, 1), 0), Layout((1,), 0), Layout((1, 0, 1), 0), Layout((2, 3), 1), Layout((3,), 1)]
    for layout, got in zip(layouts, pack(layouts, factors, torch.float64), strict=True):
        assert torch.equal(got, concatenate([factors[p] for p in layout.parts], layout.dim, torch.float64))
    assert torch.autograd.gradcheck(lambda *f: pack(layouts, f, torch.float64), factors)
    assert torch.autograd.gradgradcheck(lambda *f: pack(layouts, f, torch.float64), factors)


def run(model: nn.Module, name: str = "unet") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = output(name, model, inputs(name))
    loss_of(out).backward()
    return out.detach(), {key: value.clone() for key, value in gradients(model).items()}


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
def test_fused_and_packed_is_plain(
    shortcut: str, num_previous: int | None, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float64 base with float32 factors: packing casts them exactly, and their gradients once."""
    model = build("unet")
    attach(model, ResLoraConfig(r=3, target_modules=UNET_TARGETS, shortcut=shortcut, num_previous=num_previous))
    model.double()
    randomise(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with monkeypatch.context() as patch:
        patch.setattr(fast_forward, "why_plain", lambda *args: "the test says so")
        wanted, wanted_gradients = run(model)
    if grouped:
        set_attn_processors(model)
        run(model)  # groups are known from the first forward on
    packed = []
    fusion = get_controller(model).fusion
    monkeypatch.setattr(
        fusion, "factors", lambda *args: packed.append(dict(fusion.packed)) or type(fusion).factors(fusion, *args)
    )
    got, got_gradients = run(model)
    assert all(packed)
    assert any(len(group) == 3 for group in packed[0]) == grouped
    assert (got - wanted).abs().max() < 1e-12
    for name, gradient in wanted_gradients.items():
        assert (got_gradients[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("shortcut", ["none", "input", "middle"])
def test_without_gradients_inside_with(shortcut: str) -> None:
    """Factors packed without gradients are not used where gradients are wanted."""
    model = adapted("llama", shortcut, 1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.float64)
    controller, found = get_controller(model), []
    layer = controller.layers["model.layers.0.self_attn.q_proj"]
    inner = layer.forward

    def with_gradients(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            found.append(inner(x))
        return found[-1]

    layer.forward = with_gradients
    with torch.no_grad():
        output("llama", model, inputs("llama"))
    assert found[0].requires_grad


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_autocast_and_functorch_compute_plainly(shortcut: str) -> None:
    model = adapted("llama", shortcut, 1).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = output("llama", model, inputs("llama"))
    loss_of(out.double()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    double = adapted("llama", shortcut, 1)
    parameters = {name: p.detach() for name, p in double.named_parameters() if p.requires_grad}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return loss_of(torch.func.functional_call(double, values, inputs("llama"))[0])

    by_functorch = torch.func.grad(loss)(parameters)
    loss_of(output("llama", double, inputs("llama"))).backward()
    for name, parameter in double.named_parameters():
        if parameter.requires_grad:
            error = (by_functorch[name] - parameter.grad).abs().max()
            assert error <= 1e-10 * parameter.grad.abs().max().clamp_min(1)


def test_the_form_is_logged_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="reslora_diffusion")
    output("clip", adapted("clip", "input", 1), inputs("clip"))
    assert "ResLoRA layers compute fused, on cpu, each in the form with the least arithmetic" in caplog.text
    output("clip", adapted("clip", "input", 1, lora_dropout=0.1), inputs("clip"))
    assert "ResLoRA layers compute layer by layer: dropout" in caplog.text


def test_several_adapters_at_once_and_hooks_on_the_base() -> None:
    model = adapted("llama", "input", 1)
    wanted, _ = run(model, "llama")
    seen = []
    layer = get_controller(model).layers["model.layers.1.self_attn.q_proj"]
    handle = layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out))
    got, _ = run(model, "llama")
    assert len(seen) == 1
    assert (got - wanted).abs().max() < 1e-12
    handle.remove()
    attach(model, ResLoraConfig(r=2, target_modules=["q_proj"], shortcut="middle"), "second")
    model.double()
    randomise(model, seed=4)
    both = [name for name in ("default", "second")]
    for module in model.modules():
        if hasattr(module, "lora_variant") and "second" in module.lora_A:
            module.set_adapter(both)
    assert (output("llama", model, inputs("llama")) - wanted).abs().max() > 1e-3
