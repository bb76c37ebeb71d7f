"""How long one training step takes, and how much memory: every variant of `benchmarks.variants` in one process.

    python -m benchmarks.step [--device cpu|cuda] [--output FILE]

Timings of a busy machine drift by more than the differences that matter. So variants take turns, in a new random order
each round; each round gives one ratio to PEFT's LoRA; and the table has the median and quartiles of those ratios. PEFT
takes part twice: the ratio of the two ("peft again") is what noise alone does.

    CPU     processor time of one thread; models: a UNet that is bound by launching operations, the one of the embedded
            pipeline, one that is bound by arithmetic, a small Llama; float32. Processor time does not count what
            other processes do to the clock.
    CUDA    time between events, and host time per step, of SD1.5 and SDXL at batch 1, 4, 8 and a 1B Llama in bf16;
            eager, compiled, and forward and backward in a CUDA graph; memory by peak allocation.

A step is forward, loss, backward; `overhead` is (t - floor) / (peft - floor), the share that is left of what PEFT adds.
"""

import argparse
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reslora_diffusion.diffusion.capture import WARM_UP, CudaGraphs

from .models import SUBJECTS, Subject, output
from .results import FOLDER, write_results
from .variants import VARIANTS

AGAIN = "peft again"
LARGE = ("floor", "peft", "peft_autocast", "lora", "input", "block", "middle", "lora_frozen", "input_frozen")
COMPILED = ("floor", "peft", "lora", "input", "block", "middle")
DEFAULT = [name for name in VARIANTS if not name.endswith("_frozen")] + ["lora_frozen", "input_frozen"]
# model, batch, and the number of rounds or the mode
CPU_CASES = [("tiny_unet", 1, 60), ("sticker_unet", 4, 20), ("proxy_unet", 2, 8), ("tiny_llama", 2, 30)]
CUDA_CASES = [(model, batch, mode) for model in ("sd15",) for batch in (1, 4, 8) for mode in ("eager", "graph")]
CUDA_CASES += [("sdxl", 1, "eager"), ("sdxl", 1, "graph"), ("sdxl", 4, "eager"), ("sdxl", 8, "eager")]
CUDA_CASES += [("llama_1b", 1, "eager"), ("llama_1b", 4, "eager"), ("sd15", 4, "compiled")]


def prepare(
    variant: str, of: Subject, batch: int, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> Callable[[], Tensor]:
    """A function that does one forward and backward of a fresh model, and returns the loss."""
    chosen = VARIANTS[variant.removesuffix(" again")]
    torch.manual_seed(0)
    with device:
        model: nn.Module = of.make()
    model.train().requires_grad_(False)
    nn.Module.to(model, dtype)
    chosen.adapt(model, of.targets, device.type == "cuda")
    inputs = of.inputs(batch, device, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    forward = torch.compile(output, dynamic=False) if compiled else output

    def step() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        autocast = chosen.autocast and device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            loss = forward(model, inputs).float().square().mean()
        loss.backward()
        return loss

    return step


def as_graph(step: Callable[[], Tensor]) -> Callable[[], Any]:
    """The step recorded once as a CUDA graph, and replayed."""
    graphs = CudaGraphs()
    with graphs.aside():
        for _ in range(WARM_UP):
            step()
    return graphs.record(step)


# -------------------------------------------------------------------------------------------------------- clocks


def cpu_time(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds that this thread computed."""
    began = time.thread_time()
    step()
    return {"seconds": time.thread_time() - began}


def cuda_time(step: Callable[[], Any], steps: int = 4) -> dict[str, float]:
    """Seconds per step on the device, and on the host until the last launch."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.perf_counter()
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    return {"seconds": begin.elapsed_time(end) / 1000 / steps, "host_seconds": host / steps}


def peak_memory(step: Callable[[], Any]) -> float:
    """Gigabytes above what is there before the step."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


# ----------------------------------------------------------------------------------------------------- comparison


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def compare(
    steps: dict[str, Callable[[], Any]], clock: Callable[[Callable[[], Any]], dict[str, float]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Time all of them in turn; by variant its times and its ratios to PEFT, round by round."""
    order = random.Random(0)
    names = list(steps)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(-2, rounds):
        order.shuffle(names)
        for name in names:
            measured = clock(steps[name])
            if turn >= 0:
                times[name].append(measured)
    seconds = {name: [each["seconds"] for each in measured] for name, measured in times.items()}
    found = {}
    for name, own in seconds.items():
        found[name] = {
            "seconds": quartiles(own),
            "ratio": quartiles([a / b for a, b in zip(own, seconds["peft"], strict=True)]),
        }
        if "host_seconds" in times[name][0]:
            found[name]["host_seconds"] = statistics.median(each["host_seconds"] for each in times[name])
    floor, peft = (found[name]["seconds"][0] for name in ("floor", "peft"))
    for values in found.values():
        values["overhead"] = (values["seconds"][0] - floor) / (peft - floor)
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':20}{'ms (median)':>14}{'x PEFT':>9}{'quartiles':>16}{'overhead':>10}{'host ms':>9}{'peak GB':>9}"]
    for name, values in found.items():
        low, middle, high = values["ratio"]
        host = f"{1000 * values['host_seconds']:.1f}" if "host_seconds" in values else ""
        peak = f"{values['peak']:.2f}" if "peak" in values else ""
        lines.append(
            f"{name:20}{1000 * values['seconds'][1]:>14.2f}{middle:>9.3f}{f'{low:.3f}-{high:.3f}':>16}"
            f"{values['overhead']:>10.2f}{host:>9}{peak:>9}"
        )
    return "\n".join(lines)


def on_cpu(variants: list[str], scale: float) -> dict[str, Any]:
    """All cases of a CPU."""
    torch.set_num_threads(1)
    found = {}
    for subject, batch, rounds in CPU_CASES:
        of, cpu = SUBJECTS[subject], torch.device("cpu")
        names = [name for name in variants if VARIANTS[name].on_cpu]
        if "unet" not in subject:
            names = [name for name in names if not name.endswith("_frozen")]
        steps = {name: prepare(name, of, batch, cpu, torch.float32) for name in [*names, AGAIN]}
        key = f"{subject}, batch {batch}, eager"
        found[key] = compare(steps, cpu_time, max(3, round(rounds * scale)))
        print(f"\n{key}\n{table(found[key])}", flush=True)
    return found


def on_cuda(variants: list[str], scale: float, minutes: float, keep: Callable[[dict], object]) -> dict[str, Any]:
    """All cases of a GPU, as many as fit the time and the memory, kept after each; what does not fit is named."""
    torch._dynamo.config.recompile_limit = 64  # variants share their code, each is compiled by itself
    found: dict[str, Any] = {}
    device, until = torch.device("cuda"), time.monotonic() + 60 * minutes
    for subject, batch, mode in CUDA_CASES:
        key = f"{subject}, batch {batch}, {mode}"
        if time.monotonic() > until:
            print(f"\n{key}: left out, {minutes} minutes are over", flush=True)
            continue
        names = variants if mode == "eager" else [name for name in variants if name in COMPILED]
        if subject == "sdxl":  # of which not all fit a card at once
            names = [name for name in names if name in LARGE]
        if "llama" in subject:
            names = [name for name in names if not name.endswith("_frozen")]
        steps, peaks = {}, {}
        for name in [*names, AGAIN]:
            if time.monotonic() > until:
                print(f"{key}: {name} left out, {minutes} minutes are over", flush=True)
                continue
            try:
                step = prepare(name, SUBJECTS[subject], batch, device, torch.bfloat16, mode == "compiled")
                step()
                peaks[name] = peak_memory(step)
                steps[name] = as_graph(step) if mode == "graph" else step
                steps[name]()
            except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
                steps.pop(name, None)
                print(f"{key}: {name} left out: {str(error).splitlines()[0]}", flush=True)
        if {"floor", "peft"} <= steps.keys():
            try:
                measured = compare(steps, cuda_time, max(3, round(12 * scale)))
            except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
                print(f"{key}: left out: {str(error).splitlines()[0]}", flush=True)
            else:
                found[key] = {name: values | {"peak": peaks[name]} for name, values in measured.items()}
                print(f"\n{key}\n{table(found[key])}", flush=True)
                keep(found)
        step = None
        steps.clear()
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    return found


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--variant", nargs="+", default=DEFAULT, choices=VARIANTS, help="floor and peft are added")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rounds")
    parser.add_argument("--minutes", type=float, default=7.0, help="on a GPU, start no further case after this long")
    parser.add_argument("--output", help="result file (default: benchmarks/results/step-<device>.json)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device, or torch was installed without CUDA")
    variants = list(dict.fromkeys(["floor", "peft", *args.variant]))
    path = args.output or FOLDER / f"step-{args.device}.json"
    keep = partial(write_results, path, "step", clock="thread time" if args.device == "cpu" else "events")
    if args.device == "cpu":
        keep(on_cpu(variants, args.scale))
    elif not on_cuda(variants, args.scale, args.minutes, keep):
        parser.exit(1, "no case fits this card\n")
    from .plots import plot_steps

    plot_steps(path)


if __name__ == "__main__":
    main()
