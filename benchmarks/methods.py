"""The cost of each method of the family beside plain LoRA: processor time of whole runs, and memory of a step.

    python -m benchmarks.methods [--model NAME ...] [--steps N] [--output FILE]

Every method trains the same model for a whole run of N steps, since a schedule costs differently early and late. The
runs take turns, one step of each in a new random order, in one process and one thread. A step is forward, backward,
schedule and optimizer, and its time is the processor time of the thread, which does not count what other processes do
to the clock. The ratio is that of the whole runs to plain LoRA with AdamW, which takes part twice ("again"): the ratio
of the two is what noise does. Quartiles are of the ratios step by step.

Memory is counted, not measured: trained parameters, their gradients, the optimizer's state, what a schedule holds, and
what the last step's forward saves for its backward pass, weights apart.
"""

import argparse
import copy
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reslora_diffusion import ResLoraConfig, attach, factor_pairs, get_adapter
from reslora_diffusion.core.attach import AdaptedModel
from reslora_diffusion.methods.optimizers import OPTIMIZERS
from reslora_diffusion.methods.schedules import parse_schedule
from reslora_diffusion.methods.schedules.base import Change, Schedule
from reslora_diffusion.methods.schedules.making import make_schedule

from .models import SUBJECTS, output
from .results import FOLDER, write_results
from .timing import quartiles

YARDSTICK = "lora"
CASES = {"sticker_unet": 4, "tiny_llama": 2}  # and the batch size
RANK, LR = 16, 1e-3


@dataclass(frozen=True)
class Method:
    """The options of a run beside plain LoRA, and its paper's claim for the time of a step."""

    schedule: str | None = None
    optimizer: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of the optimizer
    adapter: dict[str, Any] = field(default_factory=dict)
    kernel: str | None = None
    claim: str = ""


METHODS = {
    "lora": Method(),
    "lora again": Method(),
    "coto": Method("coto", claim="-7 %"),
    "coto with block": Method("coto", adapter={"shortcut": "block"}),
    "block": Method(adapter={"shortcut": "block"}),
    "restart:stages=3": Method("restart:stages=3"),
    "prune:ratio=0.5,parts=heads": Method("prune:ratio=0.5,parts=heads"),
    "ranks:ratio=0.5": Method("ranks:ratio=0.5"),
    "rite": Method(optimizer="rite", claim="+5 to 8 %; measured by others: +23 to 38 %"),
    "pro": Method(optimizer="pro", claim="measured by others, the full form: +66 to 84 %"),
    "pro, full": Method(optimizer="pro", settings={"full": True}),
    "scaled_adamw": Method(optimizer="scaled_adamw"),
    "reflora": Method(optimizer="reflora", claim="+1 %, of its scalar form"),
    "dora": Method(adapter={"use_dora": True}, claim="measured by others: +26 to 100 %"),
    "runlora, wherever it can": Method(kernel="runlora", claim="up to -28 %"),
    "runlora, nowhere": Method(kernel="plain"),
}


class Run:
    """One method on a model of its own."""

    def __init__(self, method: Method, base: nn.Module, targets: list[str], steps: int) -> None:
        self.model = copy.deepcopy(base, {id(each): each for each in [*base.parameters(), *base.buffers()]})
        torch.manual_seed(0)
        adapter = {"shortcut": "none"} | method.adapter
        attach(self.model, ResLoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, **adapter))
        if method.kernel:
            get_adapter(self.model).kernel = method.kernel
        self.optimizer = self.make_optimizer(method)
        settings = method.schedule and parse_schedule(method.schedule)
        self.schedule = make_schedule(settings, seed=0) if settings else Schedule()
        self.schedule.start([AdaptedModel(self.model)], steps, self.optimizer)
        self.done = 0

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def make_optimizer(self, method: Method) -> torch.optim.Optimizer:
        if method.optimizer is None:
            return torch.optim.AdamW(self.trained(), lr=LR, fused=True)
        return OPTIMIZERS[method.optimizer](self.trained(), factor_pairs(self.model), lr=LR, **method.settings)

    def step(self, inputs: dict[str, Tensor]) -> Change:
        self.schedule.before_step(self.done)
        output(self.model, inputs).float().square().mean().backward()
        self.schedule.after_backward(self.done)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return self.schedule.after_step(self.done)

    def memory(self, inputs: dict[str, Tensor]) -> dict[str, float]:
        """Megabytes of a step, after the last."""
        kept: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output(self.model, inputs).float().square().mean()
        state = [value for one in self.optimizer.state.values() for value in one.values() if torch.is_tensor(value)]
        parts = {
            "factors and gradients": 2 * bytes_of(self.trained()),
            "optimizer": bytes_of(state),
            "schedule": bytes_of(self.schedule.tensors().values()),
            "activations": sum(kept.values()),
        }
        return {name: value / 1e6 for name, value in parts.items()}


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(subject: str, batch: int, steps: int) -> dict[str, dict[str, Any]]:
    """All methods on one model."""
    of, cpu = SUBJECTS[subject], torch.device("cpu")
    torch.manual_seed(0)
    base = of.make().train().requires_grad_(False)
    inputs = of.inputs(batch, cpu, torch.float32)
    runs = {name: Run(method, base, of.targets, steps) for name, method in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, names = random.Random(0), list(runs)
    for _ in range(steps):
        order.shuffle(names)
        for name in names:
            began = time.thread_time()
            runs[name].step(inputs)
            times[name].append(time.thread_time() - began)
    found = {}
    for name, own in times.items():
        found[name] = {
            "seconds": sum(own) / steps,
            "ratio": sum(own) / sum(times[YARDSTICK]),
            "quartiles": quartiles([a / b for a, b in zip(own, times[YARDSTICK], strict=True)]),
            "megabytes": runs[name].memory(inputs),
            "claim": METHODS[name].claim,
        }
    return found


def lines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, values in found.items():
        low, middle, high = values["quartiles"]
        memory = sum(values["megabytes"].values())
        ratio = f"{values['ratio']:.3f}  ({low:.3f} {middle:.3f} {high:.3f})"
        yield f"{name:28} {1000 * values['seconds']:8.1f} ms  x {ratio}  {memory:7.1f} MB  {values['claim']}"


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(CASES), choices=CASES, metavar="NAME")
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--output", default=FOLDER / "methods.json", help="result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for subject in args.model:
        key = f"{subject}, batch {CASES[subject]}"
        results[key] = measure(subject, CASES[subject], args.steps)
        print(f"\n{key}, {args.steps} steps", *lines(results[key]), sep="\n", flush=True)
    write_results(args.output, "methods", results, clock="thread time", steps=args.steps)


if __name__ == "__main__":
    main()
