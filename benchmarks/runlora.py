"""RunLoRA's forms against PEFT and the plain form: one linear layer, forward and backward, where they may win.

    python -m benchmarks.runlora [--rounds N] [--shapes N ...] [--output FILE]

Layers have many rows and ranks that are not small beside their widths. What is compared takes turns in one process, and
is timed by the processor time of one thread, into which other programs do not count (`benchmarks.timing`).

    frozen     the base layer alone, with the gradient of its input
    peft       PEFT's lora.Linear                                             (the yardstick)
    plain      ours, by torch's own functions
    fused      ours, one node of the autograd graph, through rank R
    auto       ours, the form with the least operations
    F1B1 ..    ours, by the paper's names

All are float32 with the gradients of x, lora_A and lora_B. `block` has two blocks side by side.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from reslora_diffusion.core.functional import LinearOp
from reslora_diffusion.core.kernels import choose
from reslora_diffusion.core.kernels.runlora import cheapest, named, shape_of

from .results import FOLDER, write_results
from .timing import compare, cpu_time

NAMED = ("F1B1", "F2B1", "F1B5", "F2B5", "F2B4")
OURS = ("plain", "fused", "auto", *NAMED)


class Shape(NamedTuple):
    """A layer and what it is called on."""

    rows: int
    width: int
    out: int
    rank: int
    parts: int = 1

    def __str__(self) -> str:
        side_by_side = f", {self.parts} blocks of it" if self.parts > 1 else ""
        return f"{self.rows} rows, {self.width} to {self.out}, rank {self.rank}{side_by_side}"


SHAPES = [
    Shape(4096, 320, 320, 16),  # SD1.5 at 512 px, its first blocks
    Shape(4096, 320, 320, 64),
    Shape(4096, 320, 320, 128),
    Shape(4096, 320, 320, 64, parts=2),
    Shape(4096, 640, 640, 128),
    Shape(8192, 512, 512, 128),  # a small language model on long sequences
    Shape(2048, 1024, 1024, 128),
    Shape(512, 1280, 1280, 16),  # where large matrices cannot win
]


def operations(name: str, rows: int, width: int, out: int, rank: int) -> tuple[int, int]:
    """The paper's table: floating-point operations of the forward and of the backward of a named form, the frozen
    layer's among them. b, n, m, r there are `rows`, `width`, `out`, `rank`; what is counted twice is a product that a
    backward makes again."""
    form = named(name)
    frozen, V = rows * width * out, rank * width * out
    z, t = rows * rank * width, rows * rank * out
    forward = frozen + (V if form.y else z + t)
    backward = frozen + (V if form.dx else z)  # dx
    if not (form.dD and form.dx):
        backward += t  # t, of dD and dx
    if form.dD or form.dU:
        backward += frozen  # G
    backward += (V if form.dD else z) + (V if form.dU else z + t)
    return 2 * forward, 2 * backward


def peft_layer(shape: Shape) -> nn.Module:
    model = nn.Sequential(nn.Linear(shape.width, shape.out))
    rank = shape.rank * shape.parts
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False), model)
    return model


def steps_of(shape: Shape) -> dict[str, Callable[[], Any]]:
    """One forward and backward of each."""
    torch.manual_seed(0)
    x = torch.randn(shape.rows, shape.width, requires_grad=True)
    g = torch.randn(shape.rows, shape.out)
    base = nn.Linear(shape.width, shape.out).requires_grad_(False)
    theirs = peft_layer(shape)
    trained = [x, *(p for p in theirs.parameters() if p.requires_grad)]
    D = [torch.randn(shape.rank, shape.width, requires_grad=True) for _ in range(shape.parts)]
    U = [torch.randn(shape.out, shape.rank, requires_grad=True) for _ in range(shape.parts)]
    op = LinearOp(x, base.weight, base.bias, D, U, [1.0] * shape.parts)

    def run(y: Tensor, leaves: list[Tensor]) -> None:
        torch.autograd.grad(y, leaves, g)

    def ours(name: str) -> Callable[[], None]:
        wanted = {"auto": None}.get(name, f"runlora:{name}" if name in NAMED else name)
        kernel = choose(op, wanted=wanted).kernel
        return lambda: run(kernel(op)[0], [x, *D, *U])

    steps: dict[str, Callable[[], Any]] = {"frozen": lambda: run(base(x), [x]), "peft": lambda: run(theirs(x), trained)}
    return steps | {name: ours(name) for name in OURS}


def chosen(shape: Shape) -> str:
    x = torch.zeros(shape.rows, shape.width, requires_grad=True)
    D = [torch.zeros(shape.rank, shape.width, requires_grad=True) for _ in range(shape.parts)]
    U = [torch.zeros(shape.out, shape.rank, requires_grad=True) for _ in range(shape.parts)]
    weight = torch.zeros(shape.out, shape.width)
    return str(cheapest(*shape_of(LinearOp(x, weight, None, D, U, [1.0] * shape.parts))))


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':12}{'ms':>9}{'x PEFT':>9}{'quartiles':>16}{'operations x F1B1':>19}"]
    for name, values in found.items():
        low, middle, high = values["ratio"]
        counted = f"{values['operations']:.3f}" if "operations" in values else ""
        span = f"{low:.3f}-{high:.3f}"
        lines.append(f"{name:12}{1000 * values['seconds'][1]:>9.2f}{middle:>9.3f}{span:>16}{counted:>19}")
    return "\n".join(lines)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="numbers of some of them")
    parser.add_argument("--output", default=FOLDER / "runlora.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for shape in (SHAPES[number] for number in args.shapes):
        found = compare(steps_of(shape), cpu_time, args.rounds)
        sizes = shape.rows, shape.width, shape.out, shape.rank * shape.parts
        for name in NAMED:
            found[name]["operations"] = sum(operations(name, *sizes)) / sum(operations("F1B1", *sizes))
        results[str(shape)] = {"auto_is": chosen(shape), "times": found}
        print(f"\n{shape}\nauto: {chosen(shape)}\n{table(found)}", flush=True)
        write_results(args.output, "runlora", results, quiet=True, clock="thread time")


if __name__ == "__main__":
    main()
