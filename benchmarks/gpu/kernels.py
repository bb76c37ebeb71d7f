"""Stage f: each kernel, and each memory-saving form of a frozen layer, against doing without.

    kernels     time of a step, against the plain kernel on the same model
    forms       time and peak memory of a step, each form alone, against none of them

A kernel or a form is worth its code where it gains 3 % somewhere: of the time, or of the peak memory without losing as
much time. What gains nowhere is named at the end.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from reslora_diffusion.diffusion.frozen import FORMS, FrugalConv2d, FrugalNorm, SkippedSiLU, restore_memory, save_memory

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
FRUGAL = {"convolution": (FrugalConv2d,), "norm and SiLU": (FrugalNorm, SkippedSiLU)}
FRUGAL |= {kind.__name__: (form,) for kind, form in FORMS.items()}


def only(model: nn.Module, form: str | None) -> None:
    """Put one memory-saving form on a model, and take off the others."""
    restore_memory(model)
    if form is not None:
        save_memory(model)
        for module in model.modules():
            own = module.__dict__.get("forward")
            if (
                own is not None
                and type(own).__module__ == FrugalConv2d.__module__
                and not isinstance(own, FRUGAL[form])
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


def measure(args: Any, models: Models, until: float) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """All comparisons, those of kernels first; a comparison that raises is named."""
    cases, rounds = (TINY_CASES, LEAST) if args.tiny else (CASES, MOST)
    shortcuts = SHORTCUTS[:2] if args.tiny else SHORTCUTS
    todo: list[tuple[str, str, str, int]] = []
    for shortcut in shortcuts:
        todo += [("kernels", shortcut, *case) for case in cases]
    todo += [("forms", "block", *case) for case in cases if "llama" not in case[0]]
    for place, (kind, variant, subject, batch) in enumerate(todo):
        now = time.monotonic()
        name = f"{kind}, {subject}, batch {batch}, {variant}"
        if now > until:
            print(f"{name}: left out, the time is over", flush=True)
            continue
        try:
            bench = Bench(models, subject, batch, rounds)
            ways = kernels_of(models.base(subject)) if kind == "kernels" else (None, *FRUGAL)
            share = now + (until - now) / (len(todo) - place)
            found = bench.compared(variant, ways, force if kind == "kernels" else only, share)
        except RuntimeError as error:
            print(f"{name}: {reason(error)}", flush=True)
            continue
        print(f"\n{name}\n{table(found, next(iter(found)))}", flush=True)
        yield name, found


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
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    models = Models(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, found in measure(args, models, time.monotonic() + args.seconds - RESERVE):
        results[name] = found
        write_results(args.output, "kernels", results, summary=verdicts(results), quiet=True)
    if not results:
        raise SystemExit("nothing could be measured")


if __name__ == "__main__":
    main()
