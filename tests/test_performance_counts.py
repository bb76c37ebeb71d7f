"""What a training step costs beside PEFT's, counted on the real UNets without a clock (`benchmarks.counting`)."""

from functools import cache

import pytest
import torch

from benchmarks.counting import Counts, counts_of
from benchmarks.models import SUBJECTS, output
from benchmarks.variants import VARIANTS

OURS = ("lora", "input", "block", "middle")


@cache
def counted(variant: str, subject: str, batch: int) -> Counts:
    return counts_of(variant, subject, batch)


def ratio(variant: str, column: str, subject: str, batch: int, to: str = "peft") -> float:
    return getattr(counted(variant, subject, batch), column) / getattr(counted(to, subject, batch), column)


def kept_overhead(variant: str, column: str, subject: str, batch: int) -> float:
    """The share of what PEFT adds to the frozen model that a variant still adds."""
    floor, peft, own = (getattr(counted(name, subject, batch), column) for name in ("floor", "peft", variant))
    return (own - floor) / (peft - floor)


@pytest.mark.parametrize("variant", ["lora", "input"])
def test_fewer_operations_and_bytes_than_peft(variant: str) -> None:
    at = ("sd15", 1)
    assert ratio(variant, "operations", *at) <= 0.80
    assert ratio(variant, "bytes", *at) <= 0.89
    assert ratio(variant, "peak", *at) <= 1.02
    assert kept_overhead(variant, "operations", *at) <= 0.55
    assert kept_overhead(variant, "bytes", *at) <= 0.45


def test_frozen_forms_need_three_quarters_of_the_memory() -> None:
    assert ratio("input_frozen", "peak", "sd15", 1) <= 0.75
    assert ratio("input_frozen", "operations", "sd15", 1) <= 0.80


@pytest.mark.slow
@pytest.mark.parametrize("variant", OURS)
def test_a_step_of_stable_diffusion(variant: str) -> None:
    at = ("sd15", 4)
    own, frozen = counted(variant, *at), counted(f"{variant}_frozen", *at)
    assert own.operations <= (2100 if variant == "lora" else 2250)
    assert own.bytes <= 32.6e9
    assert own.peak <= 3.35e9
    assert frozen.peak <= 2.2e9
    assert ratio(f"{variant}_frozen", "peak", *at) <= 0.67
    assert ratio(f"{variant}_frozen", "peak", *at, to="peft_autocast") <= 0.48
    assert ratio(variant, "operations", *at) <= 0.80
    assert ratio(variant, "peak", *at, to="lora") <= 1.015
    assert kept_overhead(variant, "bytes", *at) <= 0.45


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["input", "block", "middle"])
def test_less_than_the_paper_written_down_directly(kind: str) -> None:
    at = ("sd15", 4)
    assert ratio(kind, "operations", *at, to=f"paper_{kind}") <= {"input": 0.75, "block": 0.55, "middle": 0.75}[kind]
    assert ratio(kind, "bytes", *at, to=f"paper_{kind}") <= 0.87


@pytest.mark.slow
@pytest.mark.parametrize("variant", OURS)
def test_a_step_of_sdxl(variant: str) -> None:
    at = ("sdxl", 1)
    assert ratio(variant, "operations", *at) <= 0.75
    assert ratio(variant, "bytes", *at) <= 0.85
    assert ratio(variant, "peak", *at) <= 1.03
    assert ratio(f"{variant}_frozen", "peak", *at) <= 0.75
    assert kept_overhead(variant, "bytes", *at) <= 0.45


def test_counts_are_exact() -> None:
    """A layer whose counts can be written down: y = W x + b, then its backward."""
    from benchmarks.counting import count

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 4, device="meta")

        def forward(self, x: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (self.linear(x),)

    found = count(Wrapped(), {"x": torch.empty(3, 8, device="meta")})
    # addmm; dW = dy^T x; db = sum dy
    assert found.by_name == {"addmm": 1, "mm": 1, "sum": 1}
    forward = 4 * (3 * 8 + 8 * 4 + 4 + 3 * 4)
    assert found.bytes == forward + 4 * (3 * 4 + 3 * 8 + 4 * 8) + 4 * (3 * 4 + 4)
    assert found.saved == 4 * 3 * 8


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["floor", "peft", *OURS, "input_frozen"])
def test_compiles_to_one_graph_once(variant: str) -> None:
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    of = SUBJECTS["tiny_unet"]
    model = of.make().requires_grad_(False)
    VARIANTS[variant].adapt(model, of.targets, False)
    dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda inputs: output(model, inputs), backend="aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        compiled(of.inputs(1, torch.device("cpu"), torch.float32)).sum().backward()
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 1
    dynamo.reset()
