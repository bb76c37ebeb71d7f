"""Outputs and gradients of every shortcut against the naive float64 reference: a UNet, a CLIP encoder, a Llama,
a Flux."""

import copy

import pytest
import torch
from torch import nn

from models import TARGETS, build, inputs, output, randomise
from reference import adapt_naively
from reslora_diffusion import ResLoraConfig, Shortcut, attach, get_adapter
from reslora_diffusion.core.functional import concatenated, up_add
from reslora_diffusion.core.shortcuts import SHORTCUTS
from reslora_diffusion.rules import MERGE_EXACTLY

MODELS = ("unet", "clip", "llama", "flux")
CASES = [("none", 1), ("input", 1), ("input", 0), ("block", 1), ("block", 3), ("block", None), ("middle", 1)]
CASES += [("middle", 2), ("middle", None)]


def adapted(name: str, shortcut: str, num_previous: int | None, **options: object) -> nn.Module:
    model = build(name)
    config = ResLoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS[name], shortcut=shortcut, num_previous=num_previous, **options
    )
    attach(model, config)
    model.double().eval()
    randomise(model)
    return model


def factors_of(model: nn.Module) -> dict:
    controller = get_adapter(model)
    return {name: (*controller.factors(name), controller.layers[name].scaling["default"]) for name in controller.sites}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{side}": getattr(layer, side)["default"].weight.grad
        for name, layer in get_adapter(model).layers.items()
        for side in ("lora_A", "lora_B")
    }


def reference_of(name: str, model: nn.Module, shortcut: str, num_previous: int | None) -> tuple[nn.Module, dict]:
    """A naively adapted copy of the base with the same factors."""
    base, args = build(name), inputs(name)
    blocks = adapt_naively(base, factors_of(model), shortcut, num_previous, lambda m: output(name, m, args))
    return base, blocks


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A fixed random direction: the square of a normalised output would hardly depend on anything."""
    generator = torch.Generator().manual_seed(7)
    return (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()


def assert_same_gradients(model: nn.Module, blocks: dict, tolerance: float = 1e-10) -> None:
    got = gradients(model)
    for name, block in blocks.items():
        for side in ("lora_A", "lora_B"):
            wanted = getattr(block, side).grad
            error = (got[f"{name}.{side}"] - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)
            assert error < tolerance, f"{name}.{side}: {error:.1e}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
def test_agrees_with_the_naive_reference(name: str, shortcut: str, num_previous: int | None) -> None:
    model, args = adapted(name, shortcut, num_previous), inputs(name)
    base, blocks = reference_of(name, model, shortcut, num_previous)
    got, wanted = output(name, model, args), output(name, base, args)
    untouched = output(name, build(name), args)
    assert (got - untouched).abs().max() > 1e-3
    assert (got - wanted).abs().max() < 1e-10
    loss_of(got).backward()
    loss_of(wanted).backward()
    assert_same_gradients(model, blocks)


def test_programs_know_without_torch_which_shortcuts_merge_exactly() -> None:
    assert SHORTCUTS.keys() == set(Shortcut)
    assert {kind for kind, shortcut in SHORTCUTS.items() if shortcut.merges_exactly} == MERGE_EXACTLY


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_shortcuts_differ_from_plain_lora(shortcut: str) -> None:
    args = inputs("unet")
    plain, residual = (output("unet", adapted("unet", kind, 1), args) for kind in ("none", shortcut))
    assert (plain - residual).abs().max() > 1e-3


def test_starts_as_the_base() -> None:
    model = build("unet")
    attach(model, ResLoraConfig(r=3, target_modules=TARGETS["unet"], shortcut="middle"))
    model.double()
    args = inputs("unet")
    assert torch.equal(output("unet", model, args), output("unet", build("unet"), args))


def test_rslora_and_patterns() -> None:
    model = adapted(
        "llama", "block", 2, use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 5}, alpha_pattern={"o_proj": 9}
    )
    controller = get_adapter(model)
    q_proj = controller.layers["model.layers.1.self_attn.q_proj"]
    assert q_proj.r["default"] == 5
    assert q_proj.scaling["default"] == pytest.approx(6 / 5**0.5)
    base, blocks = reference_of("llama", model, "block", 2)
    args = inputs("llama")
    assert (output("llama", model, args) - output("llama", base, args)).abs().max() < 1e-10


def test_middle_links_only_equal_ranks() -> None:
    model = adapted("llama", "middle", 1, rank_pattern={"layers.1.self_attn.q_proj": 5})
    chains = [c for c in get_adapter(model).chains if c.role == "self_attn.q_proj"]
    assert [len(chain.sites) for chain in chains] == [1, 1, 2]


@pytest.mark.parametrize(("shortcut", "num_previous"), [("input", 1), ("block", 2), ("middle", 2), ("middle", None)])
def test_gradcheck_through_shortcuts(shortcut: str, num_previous: int | None) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}).double()

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model["layers"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).tanh()
            return x

    stack = Stack()
    config = ResLoraConfig(r=2, target_modules=r"layers\.\d", shortcut=shortcut, num_previous=num_previous)
    attach(stack, config)
    stack.double()
    randomise(stack)
    assert get_adapter(stack).explain().links == 2
    parameters = [p for p in stack.parameters() if p.requires_grad]
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        names = [name for name, p in stack.named_parameters() if p.requires_grad]
        return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_dropout_acts_in_training_only(shortcut: str) -> None:
    torch.manual_seed(0)
    model = adapted("clip", shortcut, 1, lora_dropout=0.5)
    args = inputs("clip")
    still = output("clip", model, args)
    model.train()
    assert (output("clip", model, args) - output("clip", model, args)).abs().max() > 1e-6
    model.eval()
    assert torch.equal(output("clip", model, args), still)


def test_input_drops_the_sum_with_one_mask() -> None:
    """The paper's code has D(x + x'), not D(x) + D(x')."""
    model = adapted("llama", "input", 1, lora_dropout=0.4)
    controller = get_adapter(model)
    name = "model.layers.1.self_attn.q_proj"
    layer, seen = controller.layers[name], {}
    layer.lora_dropout["default"].register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    inner = {}
    previous = controller.layers["model.layers.0.self_attn.q_proj"]
    previous.register_forward_pre_hook(lambda module, args: inner.update(before=args[0]))
    layer.register_forward_pre_hook(lambda module, args: inner.update(now=args[0]))
    model.train()
    output("llama", model, inputs("llama"))
    assert torch.allclose(seen["x"], inner["now"] + inner["before"])


def test_functional_forms() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    A, B = torch.randn(3, 7, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    result = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.allclose(up_add(result, x @ A.T, B, 0.5), result + 0.5 * x @ A.T @ B.T)
    assert up_add(result.bfloat16(), x @ A.T, B, 0.5).dtype is torch.bfloat16
    A2, B2 = torch.randn(2, 7, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    cat_A, cat_B = concatenated([(A, B), (A2, B2)])
    assert torch.allclose(cat_B @ cat_A, B @ A + B2 @ A2)


def test_deepcopy_has_a_controller_of_its_own() -> None:
    model, args = adapted("unet", "input", 1), inputs("unet")
    other = copy.deepcopy(model)
    assert get_adapter(other) is not get_adapter(model)
    assert get_adapter(other).root is other
    before = output("unet", model, args)
    randomise(other, seed=5)
    assert torch.equal(output("unet", model, args), before)
    assert (output("unet", other, args) - before).abs().max() > 1e-3
