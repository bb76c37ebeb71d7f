"""The form an adapted layer is computed in: the cheapest by count, equal to the plain one, used where it may be."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.runlora import operations
from models import inputs, output
from reslora_diffusion import explain_kernels, get_adapter
from reslora_diffusion.core import kernels
from reslora_diffusion.core.functional import Kernel, LinearOp, Publish
from reslora_diffusion.core.kernels import choose, runlora
from reslora_diffusion.core.kernels.fused import fused_linear
from reslora_diffusion.core.kernels.runlora import (
    BACKWARDS,
    FORWARDS,
    LOW_RANK,
    QUICKEST,
    Form,
    cheapest,
    cost,
    named,
    runlora_linear,
)
from test_core_shortcuts import adapted, assert_same_gradients, loss_of, reference_of

FORMS = [
    Form(y, factors, factors, x, keeps)
    for y, factors, x, keeps in product((False, True), repeat=4)
    if not keeps or y and x
]
NAMES = [f"{forward}{backward}" for forward in FORWARDS for backward in BACKWARDS]
MIXED = [named(name) for name in NAMES if named(name) not in FORMS]


def name_of(form: object) -> str:
    return "".join(letter if yes else "-" for letter, yes in zip("yDUxk", form, strict=True))  # type: ignore[call-overload]


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def factors(parts: int, rank: int, width: int, out: int) -> list[torch.Tensor]:
    return [leaf(rank + place, width) for place in range(parts)] + [leaf(out, rank + place) for place in range(parts)]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("form", FORMS + MIXED, ids=name_of)
def test_first_and_second_derivatives(form: Form, parts: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3).double().requires_grad_(False)
    given = (leaf(2, 3, 4), *factors(parts, 1, 4, 3))

    def run(x: torch.Tensor, *both: torch.Tensor) -> torch.Tensor:
        op = LinearOp(x, linear.weight, linear.bias, both[:parts], both[parts:], (0.5,) * parts)
        return runlora_linear(op, form)[0]

    def plainly(x: torch.Tensor, *both: torch.Tensor) -> torch.Tensor:
        delta = sum(U @ D for D, U in zip(both[:parts], both[parts:], strict=True))
        return linear(x) + 0.5 * x @ delta.T

    assert (run(*given) - plainly(*given)).abs().max() < 1e-12
    assert (run(*given) - linear(given[0])).abs().max() > 1e-2
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)
    frozen = [factor.detach() for factor in given[1:]]
    assert torch.autograd.gradcheck(lambda x: run(x, *frozen), given[:1])
    assert torch.autograd.gradcheck(lambda *both: run(given[0].detach(), *both), given[1:])
    some = [frozen[0], *given[2:]]
    assert torch.autograd.gradcheck(lambda x, *both: run(x, frozen[0], *both), (given[0], *some[1:]))
    changed = run(*given)
    changed += 1  # no view, and nothing that backward needs
    assert torch.autograd.grad(changed.sum(), given[0])[0].shape == given[0].shape


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("form", FORMS + MIXED, ids=name_of)
def test_multiplications_are_as_counted(
    form: Form, wanted: tuple[bool, bool], parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for_x, for_factors = wanted
    large = form.dD or not for_factors, form.dU or not for_factors, form.dx or not for_x
    form = Form(form.y, *large, form.keeps and for_x)
    monkeypatch.setattr(runlora, "PASS", 0)
    monkeypatch.setattr(runlora, "LAUNCH", 0)
    rows, width, out = 6, 5, 3
    given = [factor.detach().requires_grad_(for_factors) for factor in factors(parts, 2, width, out)]
    rank = sum(len(factor) for factor in given[:parts])
    x = leaf(rows, width).detach().requires_grad_(for_x)
    weight = leaf(out, width).detach()
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **options: 2 * a[0] * a[1] * b[1]}  # not counted by itself
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        op = LinearOp(x, weight, None, given[:parts], given[parts:], (1.0,) * parts)
        y, _ = runlora_linear(op, form)
        if y.requires_grad:
            y.sum().backward()
    frozen = rows * width * out * (1 + for_x)
    assert counter.get_total_flops() == 2 * (cost(form, rows, width, out, rank, parts, *wanted) + frozen)


# The paper's table (arXiv 2312.03415, section 3), over 2, for X [b, n], W [n, m], U [n, r], V [r, m].
TABLE = {
    "F1": lambda b, n, m, r: b * n * m + b * n * r + b * r * m,
    "F2": lambda b, n, m, r: n * r * m + b * n * m,
    "B1": lambda b, n, m, r: b * m * r + b * n * r + b * n * r + b * m * r + b * n * m + b * n * r,
    "B2": lambda b, n, m, r: b * m * r + b * n * r + b * n * m + n * m * r + b * n * m + b * n * r,
    "B3": lambda b, n, m, r: b * n * m + 2 * n * m * r + b * n * m + b * m * r + b * n * r,
    "B4": lambda b, n, m, r: b * n * m + 2 * n * m * r + n * m * r + b * n * m,
    "B5": lambda b, n, m, r: b * m * r + b * n * r + b * n * r + b * m * r + n * m * r + b * n * m,
    "B6": lambda b, n, m, r: b * n * m + n * m * r + b * n * r + b * m * r + b * n * m + b * m * r + b * n * r,
    "B7": lambda b, n, m, r: b * n * m + n * m * r + b * n * r + b * m * r + n * m * r + b * n * m,
    "B8": lambda b, n, m, r: b * m * r + b * n * r + b * n * m + n * m * r + n * m * r + b * n * m,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_s_table_of_operations_is_what_is_computed(name: str) -> None:
    """One product is saved: of F1, XU is kept for dV where that wants it, and not made again."""
    rows, width, out, rank = 11, 7, 5, 3
    sizes = rows, width, out, rank
    table = tuple(2 * TABLE[part](*sizes) for part in (name[:2], name[2:]))
    assert operations(name, *sizes) == table
    x, weight = leaf(rows, width), leaf(out, width).detach()
    given = factors(1, rank, width, out)
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **options: 2 * a[0] * a[1] * b[1]}
    counted = []
    form = named(name)
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        y, _ = runlora_linear(LinearOp(x, weight, None, given[:1], given[1:], (1.0,)), form)
        counted.append(counter.get_total_flops())
        y.sum().backward()
        counted.append(counter.get_total_flops() - counted[0])
    saved = 2 * rows * width * rank if not form.y and not form.dU else 0
    assert counted == [table[0], table[1] - saved]


def test_no_mixed_form_is_ever_the_least() -> None:
    for rows, width, out, rank in product((16, 700, 40000), (32, 300, 4096), (40, 320, 11000), (1, 16, 400)):
        least = min(sum(operations(name, rows, width, out, rank)) for name in NAMES if named(name) in FORMS)
        mixed = min(sum(operations(name, rows, width, out, rank)) for name in NAMES if named(name) in MIXED)
        assert least <= mixed


@pytest.mark.parametrize("wanted", ["runlora:F2B5", "runlora:f1b8", "runlora:time", "runlora"])
@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_a_form_is_chosen_by_name_by_time_or_by_count(wanted: str, shortcut: str) -> None:
    model, args = adapted("llama", shortcut, 1), inputs("llama")
    base, blocks = reference_of("llama", model, shortcut, 1)
    get_adapter(model).kernel = wanted
    state = torch.random.get_rng_state()
    got, expected = output("llama", model, args), output("llama", base, args)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (got - expected).abs().max() < 1e-10
    loss_of(got).backward()
    loss_of(expected).backward()
    assert_same_gradients(model, blocks)
    choices = set(explain_kernels(model).layers.values())
    assert {kernel for kernel, _ in choices} == {"runlora"}
    if wanted == "runlora:F2B5":
        assert choices == {("runlora", "asked for runlora:F2B5: y, dx through matrices as large as W")}
    model = adapted("llama", "input", 1)  # what crosses layers fits no form but the first
    get_adapter(model).kernel = wanted
    output("llama", model, args)
    assert "fused" in {kernel for kernel, _ in explain_kernels(model).layers.values()}


def test_a_form_is_measured_inside_activation_checkpointing() -> None:
    model, args = adapted("llama", "none", 1), inputs("llama")
    QUICKEST.clear()
    get_adapter(model).kernel = "runlora:time"
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss_of(output("llama", model, args)).backward()
    again = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.activation_checkpointing_disable()
    loss_of(output("llama", model, args)).backward()
    assert all((p.grad - again[name]).abs().max() < 1e-10 for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("wanted", ["runlora:F3B1", "runlora:F1B9", "fussed", "fused:F1B1"])
def test_a_form_that_is_none_is_refused(wanted: str) -> None:
    model = adapted("llama", "none", 1)
    get_adapter(model).kernel = wanted
    with pytest.raises(ValueError, match="wanted F1 or F2 and B1 to B8|got the kernel"):
        output("llama", model, inputs("llama"))


def test_small_layers_and_long_sequences_take_large_matrices() -> None:
    assert cheapest(512, 4096, 4096, 16) == LOW_RANK
    assert cheapest(512, 1280, 1280, 32, parts=2) == LOW_RANK
    assert cheapest(2048, 64, 64, 32, parts=2) == Form(True, True, True, True, keeps=True)
    assert cheapest(4096, 320, 320, 16) == Form(y=True, dD=False, dU=False, dx=True)
    assert cheapest(256, 128, 1024, 32, parts=2) == Form(y=True, dD=False, dU=False, dx=False)
    assert cheapest(4096, 320, 320, 16, for_x=False, for_factors=False) == Form(True, True, True, True)
    assert not cheapest(16, 320, 320, 16, for_x=False, for_factors=False).y


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("rows", "width", "out"), [(700, 300, 320), (4000, 300, 300), (4000, 320, 300), (40, 300, 320)]
)
def test_nothing_more_is_kept_than_in_the_low_rank_form(rows: int, width: int, out: int, parts: int) -> None:
    x, weight, given = leaf(rows, width), leaf(out, width).detach(), factors(parts, 16, width, out)
    own = {tensor.untyped_storage()._cdata for tensor in (x, weight, *given)}

    op = LinearOp(x, weight, None, given[:parts], given[parts:], (1.0,) * parts)

    def kept(kernel: Kernel) -> int:
        seen: dict[int, int] = {}

        def see(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            kernel(op)
        return sum(size for storage, size in seen.items() if storage not in own)

    assert kept(runlora_linear) <= kept(fused_linear)


@pytest.mark.parametrize("name", ["unet", "llama"])
@pytest.mark.parametrize(("shortcut", "num_previous"), [("none", 1), ("block", 2), ("input", 1), ("middle", 1)])
@pytest.mark.parametrize("form", FORMS[::2] + FORMS[-1:], ids=name_of)
def test_every_form_agrees_with_the_naive_reference(
    form: Form, shortcut: str, num_previous: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlora, "cheapest", lambda *shape: form)
    monkeypatch.setattr(kernels, "by_cost", kernels.by_cost.__wrapped__)
    model, args = adapted(name, shortcut, num_previous), inputs(name)
    base, blocks = reference_of(name, model, shortcut, num_previous)
    got, wanted = output(name, model, args), output(name, base, args)
    assert (got - wanted).abs().max() < 1e-10
    loss_of(got).backward()
    loss_of(wanted).backward()
    assert_same_gradients(model, blocks)
    with torch.no_grad():
        assert (output(name, model, args) - wanted).abs().max() < 1e-10
    choices = list(explain_kernels(model).layers.values())
    if shortcut in ("none", "block"):
        assert {kernel for kernel, _ in choices} == {"fused" if form == LOW_RANK else "runlora"}
    elif shortcut == "input" and form != LOW_RANK:  # the first of a chain reads itself
        assert ("runlora", f"the least arithmetic: {form}") in choices


@pytest.mark.parametrize("factors_in", [torch.bfloat16, torch.float32])
def test_a_base_in_low_precision_is_never_merged(factors_in: torch.dtype) -> None:
    model = adapted("llama", "block", 1).bfloat16()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(factors_in)
    loss_of(output("llama", model, inputs("llama")).double()).backward()
    assert all(p.grad is not None and p.grad.dtype == factors_in for p in model.parameters() if p.requires_grad)
    assert {kernel for kernel, _ in explain_kernels(model).layers.values()} == {"fused"}


def test_choose_asks_for_shapes_precision_and_what_crosses_layers() -> None:
    x, weight = torch.randn(64, 8), torch.randn(8, 8)
    op = LinearOp(x, weight, None, [torch.randn(2, 8)], [torch.randn(8, 2)], [1.0])
    assert choose(op).name == "runlora"
    assert choose(op._replace(carry=torch.randn(64, 2))).name == "fused"
    assert choose(op._replace(read=torch.randn(64, 8))).name == "fused"
    assert choose(op._replace(publish=Publish.SUM)).name == "fused"
    half = op._replace(x=x.bfloat16(), weight=weight.bfloat16())
    assert choose(half).reason == "one node for each layer"
    assert choose(op._replace(weight=weight.double())).name == "plain"
