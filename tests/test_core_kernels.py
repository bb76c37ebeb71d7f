"""Every kernel computes every operation: values, first and second derivatives; and what `choose` says, and why."""

from itertools import product

import pytest
import torch
from torch import nn

from models import UNET_TARGETS, build, inputs, output, randomise
from reslora_diffusion import ResLoraConfig, attach, explain_kernels, get_adapter
from reslora_diffusion.core.functional import Kernel, LinearOp, Publish
from reslora_diffusion.core.kernels import KERNELS, choose, grouped_linears
from reslora_diffusion.core.packed import Layout, pack
from reslora_diffusion.diffusion.models.attn_processor import set_attn_processors
from test_core_shortcuts import adapted, gradients, loss_of

CASES = [("none", 1), ("input", 1), ("block", 2), ("middle", 1), ("middle", 2), ("middle", None)]
COMPUTE_ALL = [name for name in KERNELS if name not in ("closed", "runlora")]


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def by_hand(op: LinearOp) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The equation of `core.functional`, part by part."""
    r = op.x if op.read is None else op.read
    own = torch.cat([r @ D.T for D in op.D], -1)
    z = own if op.carry is None else own + op.carry
    low, at = 0, 0
    for U, s in zip(op.U, op.scalings, strict=True):
        low = low + s * (z[..., at : at + U.shape[1]] @ U.T)
        at += U.shape[1]
    h = op.x @ op.weight.T + low
    y = (h if op.transform is None else op.transform(h)) + (0 if op.bias is None else op.bias)
    ahead = None if op.ahead is None else op.x @ op.ahead.T
    return y, {Publish.AHEAD: ahead, Publish.OWN: own, Publish.SUM: z}.get(op.publish)


def operation(publish: Publish, adds: str, parts: int, scalings: str) -> LinearOp:
    """An operation of every kind; what it needs gradients of is a leaf."""
    torch.manual_seed(0)
    ranks = [2 + place for place in range(parts)]
    x, D, U = leaf(2, 3, 4), [leaf(rank, 4) for rank in ranks], [leaf(3, rank) for rank in ranks]
    weight, bias = leaf(3, 4).detach(), leaf(3).detach()
    s = {"equal": [0.5] * parts, "different": [0.5 + n for n in range(parts)], "on the device": [leaf()] * parts}
    carry = leaf(2, 3, sum(ranks)) if "carry" in adds else None
    read = leaf(2, 3, 4) if "read" in adds else None
    ahead = leaf(2, 4) if publish is Publish.AHEAD else None
    return LinearOp(x, weight, bias, D, U, s[scalings], read, carry, publish, ahead)


def differentiable(op: LinearOp, kernel: Kernel) -> tuple:
    """`(function, arguments)`: y and what is published, of everything in an operation that has a gradient."""
    leaves = [op.x, *op.D, *op.U]
    leaves += [value for value in (op.read, op.carry, op.ahead) if value is not None]
    on_device = isinstance(op.scalings[0], torch.Tensor)
    leaves += op.scalings[:1] if on_device else []

    def run(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = iter(rest)
        changed = op._replace(x=x, D=[next(values) for _ in op.D], U=[next(values) for _ in op.U])
        for name in ("read", "carry", "ahead"):
            if getattr(op, name) is not None:
                changed = changed._replace(**{name: next(values)})
        if on_device:
            changed = changed._replace(scalings=[next(values)] * len(op.D))
        return tuple(value for value in kernel(changed) if value is not None)

    return run, tuple(leaves)


@pytest.mark.parametrize("scalings", ["equal", "different", "on the device"])
@pytest.mark.parametrize(("adds", "parts"), [("", 1), ("", 2), ("carry", 2), ("read", 1), ("read and carry", 2)])
@pytest.mark.parametrize("publish", Publish)
@pytest.mark.parametrize("name", COMPUTE_ALL)
def test_first_and_second_derivatives(name: str, publish: Publish, adds: str, parts: int, scalings: str) -> None:
    if "read" in adds and publish is Publish.AHEAD:
        pytest.skip("the next layer reads x itself; `choose` says plain")
    op = operation(publish, adds, parts, scalings)
    run, args = differentiable(op, KERNELS[name])
    plainly, _ = differentiable(op, by_hand)
    for got, wanted in zip(run(*args), plainly(*args), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(sum(value.square().sum() for value in plainly(*args)), args)
    for gradient, right in zip(
        torch.autograd.grad(sum(v.square().sum() for v in run(*args)), args), wanted, strict=True
    ):
        assert torch.allclose(gradient, right, rtol=0, atol=1e-10)
    if scalings == "equal" and name != "plain":
        assert torch.autograd.gradgradcheck(run, args)


def test_what_reads_ahead_and_something_else_is_plain() -> None:
    op = operation(Publish.AHEAD, "read", 1, "equal")
    choice = choose(op)
    assert (choice.name, choice.reason) == ("plain", "it reads another tensor than the next layer wants projected")
    for got, wanted in zip(choice.kernel(op), by_hand(op), strict=True):
        assert torch.allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("publish", Publish)
def test_groups(publish: Publish, carried: bool) -> None:
    """Two layers of different shapes that read one x."""
    first = operation(publish, "carry" if carried else "", 1, "equal")
    second = operation(publish, "carry" if carried else "", 2, "different")
    second = second._replace(x=first.x, bias=None)
    if second.carry is None and publish is Publish.SUM:
        second = second._replace(scalings=[leaf(), leaf()])
    leaves = [first.x, *first.D, *first.U, *second.D, *second.U]
    leaves += [value for op in (first, second) for value in (op.carry, op.ahead) if value is not None]

    def both(how) -> object:
        def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            new = dict(zip(map(id, leaves), values, strict=True))
            ops = [
                op._replace(
                    x=new[id(first.x)],
                    D=[new[id(D)] for D in op.D],
                    U=[new[id(U)] for U in op.U],
                    carry=None if op.carry is None else new[id(op.carry)],
                    ahead=None if op.ahead is None else new[id(op.ahead)],
                )
                for op in (first, second)
            ]
            return tuple(value for pair in how(ops) for value in pair if value is not None)

        return run

    grouped, plainly = both(grouped_linears), both(lambda ops: [by_hand(op) for op in ops])
    for got, wanted in zip(grouped(*leaves), plainly(*leaves), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12)
    if carried:
        assert torch.autograd.gradcheck(grouped, leaves)
        assert torch.autograd.gradgradcheck(grouped, leaves)


def test_a_group_in_which_some_outputs_have_no_gradient() -> None:
    ops = [operation(Publish.OWN, "carry", 1, "equal") for _ in range(2)]
    ops[1] = ops[1]._replace(x=ops[0].x)
    leaves = [ops[0].x, *(part for op in ops for part in (*op.D, *op.U, op.carry))]
    for chosen in product((True, False), repeat=4):
        got, wanted = (
            sum(value.square().sum() for value, yes in zip(sum(map(list, values), []), chosen, strict=True) if yes)
            for values in (grouped_linears(ops), [by_hand(op) for op in ops])
        )
        if any(chosen):
            ours, right = (torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in (got, wanted))
            for gradient, other in zip(ours, right, strict=True):
                assert torch.allclose(gradient, other, rtol=0, atol=1e-10)


def test_layers_that_hand_on_differently_are_computed_one_by_one() -> None:
    """Without the last `to_q` of a chain, the one before it hands nothing on, while `to_k` and `to_v` beside it do."""
    chains = get_adapter(adapted("unet", "middle", 1)).chains
    chain = next(chain for chain in chains if chain.role.endswith("attn1.to_q") and len(chain.sites) > 1)
    *_, before, last = (site.name for site in chain.sites)
    results = []
    for grouped in (False, True):
        model = build("unet")
        targets = UNET_TARGETS
        attach(model, ResLoraConfig(r=3, target_modules=targets, exclude_modules=[last], shortcut="middle"))
        randomise(model.double().eval())
        if grouped:
            set_attn_processors(model)
        results.append(output("unet", model, inputs("unet")))
    assert (results[0] - results[1]).abs().max() < 1e-10
    kernels = {name: kernel for name, (kernel, _) in explain_kernels(model).layers.items()}
    beside = [before.replace("to_q", leaf) for leaf in ("to_q", "to_k", "to_v")]
    assert "grouped" in kernels.values()
    assert {kernels[name] for name in beside} == {"fused"}


@pytest.mark.parametrize("publish", Publish)
def test_closed_operations_make_no_product_of_low_rank(publish: Publish) -> None:
    for carry in (False, True):
        op = operation(publish, "carry" if carry else "", 2, "equal")._replace(scalings=[0.0, 0.0])
        choice = choose(op)
        assert choice.name == "closed"
        y, value = choice.kernel(op)
        assert torch.equal(y, nn.functional.linear(op.x, op.weight, op.bias))
        if publish is Publish.SUM and carry:
            assert value is op.carry
        elif publish in (Publish.SUM, Publish.OWN):
            assert value.shape == (2, 3, 5)
            assert not value.any()
        assert (value is None) == (publish is Publish.NOTHING)


@pytest.mark.parametrize("given", ["weight", "base"])
@pytest.mark.parametrize("adds", ["", "read"])
def test_a_transform_acts_before_the_bias(adds: str, given: str) -> None:
    """DoRA's magnitudes do so: y = m * (W x + s B A x) + b, whatever computes W x + b."""
    magnitudes = leaf(3)
    op = operation(Publish.NOTHING, adds, 2, "equal")._replace(transform=lambda h: magnitudes * h)
    wanted, _ = by_hand(op)
    if given == "base":
        op = op._replace(base=nn.functional.linear(op.x, op.weight, op.bias))
    got, value = choose(op).kernel(op)
    assert value is None
    assert torch.allclose(got, wanted, atol=1e-12)
    leaves = (op.x, *op.D, *op.U, magnitudes)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, wanted)), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_frozen_parts_get_no_gradient() -> None:
    for name in COMPUTE_ALL:
        op = operation(Publish.NOTHING, "", 2, "equal")
        frozen = op._replace(D=[op.D[0], op.D[1].detach()], U=[op.U[0], op.U[1].detach()])
        leaves = (op.x, op.D[0], op.U[0])
        got = torch.autograd.grad(KERNELS[name](frozen)[0].square().sum(), leaves)
        for a, b in zip(got, torch.autograd.grad(by_hand(op)[0].square().sum(), leaves), strict=True):
            assert torch.allclose(a, b, atol=1e-10), name


def test_packed_factors_get_the_sum_of_their_gradients() -> None:
    torch.manual_seed(0)
    factors = [leaf(2, 4), leaf(3, 4), leaf(5, 2), leaf(5, 3)]
    layouts = [Layout((0, 1), 0), Layout((1,), 0), Layout((1, 0, 1), 0), Layout((2, 3), 1), Layout((3,), 1)]
    for layout, got in zip(layouts, pack(layouts, factors, torch.float64, torch.device("cpu")), strict=True):
        assert torch.equal(got, torch.cat([factors[p] for p in layout.parts], layout.dim))
    assert torch.autograd.gradcheck(lambda *f: pack(layouts, f, torch.float64, torch.device("cpu")), factors)
    assert torch.autograd.gradgradcheck(lambda *f: pack(layouts, f, torch.float64, torch.device("cpu")), factors)


# ------------------------------------------------------------------------------------------------- in whole models


def run(model: nn.Module, name: str = "unet") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = output(name, model, inputs(name))
    loss_of(out).backward()
    return out.detach(), {key: value.clone() for key, value in gradients(model).items()}


def kernels_of(model: nn.Module) -> set[str]:
    return {choice[0] for choice in explain_kernels(model).layers.values() if choice}


@pytest.mark.parametrize("name", COMPUTE_ALL)
@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
def test_every_kernel_computes_every_shortcut(shortcut: str, num_previous: int | None, name: str) -> None:
    model = adapted("llama", shortcut, num_previous)
    wanted, wanted_gradients = run(model, "llama")
    get_adapter(model).kernel = name
    got, got_gradients = run(model, "llama")
    assert kernels_of(model) == {name}
    assert (got - wanted).abs().max() < 1e-12
    for key, gradient in wanted_gradients.items():
        assert (got_gradients[key] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), key


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
def test_packed_factors_change_nothing(shortcut: str, num_previous: int | None, grouped: bool) -> None:
    """A float64 base with float32 factors: packing casts them exactly, and their gradients once."""
    model = build("unet")
    attach(model, ResLoraConfig(r=3, target_modules=UNET_TARGETS, shortcut=shortcut, num_previous=num_previous))
    model.double()
    randomise(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapter = get_adapter(model)
    adapter.set_gates(dict.fromkeys(adapter.sites, 1.0))  # which are not packed
    wanted, wanted_gradients = run(model)
    adapter.set_gates({})
    if grouped:
        set_attn_processors(model)
        run(model)  # groups are known from the first forward on
    packed = []
    model.register_forward_pre_hook(lambda *args: packed.append(len(adapter.packed)))
    got, got_gradients = run(model)
    assert packed == [len(adapter.sites)]
    assert ("grouped" in kernels_of(model)) == grouped
    assert (got - wanted).abs().max() < 1e-12
    for name, gradient in wanted_gradients.items():
        assert (got_gradients[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
def test_packed_factors_are_computed_again_under_checkpointing(
    shortcut: str, num_previous: int | None, grouped: bool
) -> None:
    """In backward the forward of the root is over, and so is what was packed for it."""
    found = []
    for checkpointing in (False, True):
        model = adapted("unet", shortcut, num_previous).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if grouped:
            set_attn_processors(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        found.append(run(model))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("shortcut", ["none", "input", "middle"])
def test_without_gradients_inside_with(shortcut: str) -> None:
    """Factors packed without gradients are not used where gradients are wanted."""
    model = adapted("llama", shortcut, 1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.float64)
    controller, found = get_adapter(model), []
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


def test_explain_kernels_says_which_and_why() -> None:
    model = adapted("clip", "input", 1)
    assert "has not run yet" in str(explain_kernels(model))
    output("clip", model, inputs("clip"))
    found = explain_kernels(model).layers
    first, second = (f"encoder.layers.{n}.self_attn.q_proj" for n in (0, 1))
    assert found[first][0] == "runlora"
    assert "the least arithmetic" in found[first][1]
    assert found[second] == ("fused", "one node for each layer")
    assert "fused    18      one node for each layer" in str(explain_kernels(model))
    with torch.autocast("cpu", torch.bfloat16):
        output("clip", model.float(), inputs("clip"))
    assert set(explain_kernels(model).layers.values()) == {("plain", "autocast")}


def test_odd_bases_compute_their_own_output_and_it_is_said() -> None:
    model = adapted("llama", "block", 1)
    layers = get_adapter(model).layers
    hooked, trained = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    layers[hooked].base_layer.register_forward_hook(lambda module, args, out: None)
    layers[trained].base_layer.weight.requires_grad_()
    run(model, "llama")
    found = explain_kernels(model).layers
    assert found[hooked] == ("plain", "hooks on the base layer")
    assert found[trained] == ("plain", "a base layer that is trained")
    assert layers[trained].base_layer.weight.grad.abs().max() > 0


def test_several_adapters_at_once_and_hooks_on_the_base() -> None:
    model = adapted("llama", "input", 1)
    wanted, _ = run(model, "llama")
    seen = []
    layer = get_adapter(model).layers["model.layers.1.self_attn.q_proj"]
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
