"""Stage f: each kernel, and each memory-saving form of a frozen layer, against doing without.

    kernels     time of a step, against the plain kernel on the same model
    forms       time and peak memory of a step, each form alone, against none of them

A kernel or a form is worth its code where it gains 3 % somewhere: of the time, or of the peak memory without losing as
much time. What gains nowhere is named at the end.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from reslora_diffusion.diffusion.models.memory import (
    FORMS,
    LowMemoryConv2d,
    LowMemoryNorm,
    SkippedSiLU,
    restore_memory,
    save_memory,
)

from ..forced import force, kernels_of
from ..models import SUBJECTS
from ..results import write_results
from ..step import Models, build, prepare
from ..timing import LEAST, MOST, clock_of, compare, peak_memory, table
from .stages import RESERVE, reason, stage_args

GAIN = 0.03
SHORTCUTS = ("lora", "block", "middle", "input")
# model and batch
CASES = [("sd15", 1), ("sd15", 4), ("llama_1b", 1)]
TINY_CASES = [("tiny_unet", 1), ("tiny_llama", 1)]
LOW_MEMORY = {"convolution": (LowMemoryConv2d,), "norm and SiLU": (LowMemoryNorm, SkippedSiLU)}
LOW_MEMORY |= {kind.__name__: (form,) for kind, form in FORMS.items()}


def only(model: nn.Module, form: str | None) -> None:
    """Put one memory-saving form on a model, and take off the others."""
    restore_memory(model)
    if form is not None:
        save_memory(model)
        for module in model.modules():
            own = module.__dict__.get("forward")
            if (
                own is not None
                and type(own).__module__ == LowMemoryConv2d.__module__
                and not isinstance(own, LOW_MEMORY[form])
            ):
                del module.forward


class Bench:
    """The models of one case; each way to compute has one of its own, as it is put on once."""

    def __init__(self, models: Models, subject: str, batch: int, rounds: int) -> None:
        self.models, self.of, self.subject, self.rounds = models, SUBJECTS[subject], subject, rounds
        self.inputs = self.of.inputs(batch, models.device, models.dtype)

    def compared(
        self, variant: str, ways: tuple[str | None, ...], put: Callable[[nn.Module, Any], None], until: float
    ) -> dict[str, dict[str, Any]]:
        """Times and peak memory of the ways to compute a variant; the first is the yardstick."""
        device, steps, peaks = self.models.device, {}, {}
        base = self.models.base(self.subject)
        for way in ways:
            model = build(variant, self.of, device, self.models.dtype, base)
            put(model, way)
            name = way or "none"
            steps[name] = prepare(model, self.inputs)
            steps[name]()
            peaks[name] = peak_memory(device, steps[name])
        yardstick = next(iter(steps))
        clock = clock_of(device, steps[yardstick])
        found = compare(steps, clock, self.rounds, until, yardstick)
        return {name: values | ({"peak": peaks[name]} if peaks[name] else {}) for name, values in found.items()}


class Comparison(NamedTuple):
    """A comparison of kernels, or of memory-saving forms, on one model."""

    kind: str  # "kernels" or "forms"
    subject: str
    batch: int
    precision: torch.dtype
    variant: str

    def __str__(self) -> str:
        precision = str(self.precision).removeprefix("torch.")
        return f"{self.kind}, {self.subject}, batch {self.batch}, {precision}, {self.variant}"


def comparisons(tiny: bool) -> list[Comparison]:
    """All of them, in the order of their value. RunLoRA's forms are for float32."""
    if tiny:
        cases, shortcuts, precision = TINY_CASES, SHORTCUTS[:2], torch.float32
    else:
        cases, shortcuts, precision = CASES, SHORTCUTS, torch.bfloat16
    found = [Comparison("kernels", *case, precision, shortcut) for shortcut in shortcuts for case in cases]
    found += [Comparison("forms", *case, precision, "block") for case in cases if "llama" not in case[0]]
    if not tiny:
        found += [Comparison("kernels", *case, torch.float32, "block") for case in (CASES[0], CASES[-1])]
    return found


def measure(args: Any, until: float) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """The comparisons that fit the time, each of them as many rounds as its share allows; what raises is named."""
    device, todo, rounds = torch.device(args.device), comparisons(args.tiny), LEAST if args.tiny else MOST
    models = {precision: Models(device, precision) for precision in {each.precision for each in todo}}
    for place, each in enumerate(todo):
        now = time.monotonic()
        if now > until:
            print(f"{each}: left out, the time is over", flush=True)
            continue
        try:
            bench = Bench(models[each.precision], each.subject, each.batch, rounds)
            kernels = each.kind == "kernels"
            ways = kernels_of(bench.models.base(each.subject)) if kernels else (None, *LOW_MEMORY)
            share = now + (until - now) / (len(todo) - place)
            found = bench.compared(each.variant, ways, force if kernels else only, share)
        except RuntimeError as error:
            print(f"{each}: {reason(error)}", flush=True)
            continue
        print(f"\n{each}\n{table(found, next(iter(found)))}", flush=True)
        yield str(each), found


def gains(results: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The most that a kernel or form gains anywhere, of the time and of the peak memory."""
    found: dict[str, dict[str, float]] = {}
    for values in results.values():
        yardstick, *others = values
        for name in others:
            best = found.setdefault(name, {"time": -1.0, "memory": -1.0})
            saved = 1 - values[name]["ratio"][1]
            best["time"] = max(best["time"], saved)
            if "peak" in values[name] and saved > -GAIN:
                best["memory"] = max(best["memory"], 1 - values[name]["peak"] / values[yardstick]["peak"])
    return found


def verdicts(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    lines = []
    for name, best in gains(results).items():
        memory = f", {best['memory']:+.1%} of the peak memory" if best["memory"] > -1 else ""
        worth = f": gains less than {GAIN:.0%} everywhere, may be deleted" if max(best.values()) < GAIN else ""
        lines.append(f"{name}: at best {best['time']:+.1%} of the time{memory}{worth}")
    return lines


def main() -> None:
    args = stage_args(__doc__)
    warnings.filterwarnings("ignore")
    if args.device == "cpu":
        torch.set_num_threads(1)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, found in measure(args, time.monotonic() + args.seconds - RESERVE):
        results[name] = found
        write_results(args.output, "kernels", results, summary=verdicts(results), quiet=True)
    if not results:
        raise SystemExit("nothing could be measured")


if __name__ == "__main__":
    main()
