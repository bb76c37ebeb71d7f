"""How long one training step takes, and how much memory: every variant of `benchmarks.variants` in one process.

    python -m benchmarks.step [--device cpu|cuda] [--output FILE]

Timings of a busy machine drift by more than the differences that matter. So variants take turns, in a new random order
each round; each round gives one ratio to PEFT's LoRA; and the table has the median and quartiles of those ratios. PEFT
takes part twice: the ratio of the two ("peft again") is what noise alone does.

    CPU     processor time of one thread; models: a UNet that is bound by launching operations, the one of the embedded
            pipeline, one that is bound by arithmetic, a small Llama; float32. Processor time does not count what
            other processes do to the clock.
    CUDA    time between events, and host time per step, of SD1.5 and SDXL at batch 1, 4, 8 and a 1B Llama in bf16;
            eager, as a CUDA graph, compiled; memory by peak allocation. What matters most comes first, as many rounds
            of each case as fit its share of the time.

A step is forward, loss, backward; a whole step draws noise and timesteps for cached latents before, and clips and
updates by AdamW after. `overhead` is (t - floor) / (peft - floor), the share that is left of what PEFT adds.
"""

import argparse
import gc
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from reslora_diffusion.diffusion.capture import WARM_UP, CudaGraphs

from .models import SUBJECTS, Subject, output
from .results import FOLDER, write_results
from .variants import VARIANTS

AGAIN = "peft again"
LARGE = ("floor", "peft", AGAIN, "peft_autocast", "lora", "input", "block", "middle", "lora_frozen", "input_frozen")
MAIN = ("floor", "peft", AGAIN, "lora", "input", "block", "middle")
DEFAULT = [name for name in VARIANTS if not name.endswith("_frozen")] + ["lora_frozen", "input_frozen"]
LEAST, MOST = 3, 12  # rounds of a case on a GPU
# model, batch, number of rounds
CPU_CASES = [("tiny_unet", 1, 60), ("sticker_unet", 4, 20), ("proxy_unet", 2, 8), ("tiny_llama", 2, 30)]
# model, batch, mode; models are made once for neighbours
CUDA_CASES = [("sd15", 4, "eager"), ("sd15", 1, "eager"), ("sd15", 1, "graph"), ("sd15", 4, "graph")]
CUDA_CASES += [("sd15", batch, mode) for batch in (1, 4) for mode in ("whole step, eager", "whole step, graph")]
CUDA_CASES += [("sd15", 8, "eager"), ("sd15", 8, "graph"), ("llama_1b", 1, "eager"), ("llama_1b", 4, "eager")]
CUDA_CASES += [("sdxl", 1, "eager"), ("sdxl", 1, "graph"), ("sdxl", 4, "eager"), ("sdxl", 8, "eager")]
CUDA_CASES += [("sd15", 4, "compiled")]


def build(variant: str, of: Subject, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A fresh model, adapted."""
    torch.manual_seed(0)
    with device:
        model: nn.Module = of.make()
    model.train().requires_grad_(False)
    nn.Module.to(model, dtype)
    VARIANTS[variant.removesuffix(" again")].adapt(model, of.targets, device.type == "cuda")
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def prepare(model: nn.Module, inputs: dict[str, Tensor], autocast: bool = False, mode: str = "eager") -> Callable:
    """A function that does one step of a model, and returns the loss."""
    parameters, device = trained(model), next(model.parameters()).device.type
    forward = torch.compile(output, dynamic=False) if mode == "compiled" else output
    precision = partial(torch.autocast, device, torch.bfloat16) if autocast else nullcontext

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        with precision():
            loss = forward(model, inputs).float().square().mean()
        loss.backward()
        return loss

    optimizer = torch.optim.AdamW(parameters, fused=True, capturable=device == "cuda")
    scheduler = DDPMScheduler()

    def whole_step() -> Tensor:
        latents, batch = inputs["sample"], len(inputs["sample"])
        noise = torch.randn_like(latents)
        times = torch.randint(len(scheduler), (batch,), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, times)
        with precision():
            loss = F.mse_loss(output(model, inputs | {"sample": noisy, "timestep": times}).float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return whole_step if mode.startswith("whole") else step


def as_graph(step: Callable[[], Tensor], graphs: CudaGraphs) -> Callable[[], Any]:
    """The step recorded once as a CUDA graph, and replayed."""
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
    steps: dict[str, Callable[[], Any]],
    clock: Callable[[Callable[[], Any]], dict[str, float]],
    rounds: int,
    until: float = math.inf,
) -> dict[str, dict[str, Any]]:
    """Time all of them in turn; by variant its times and its ratios to PEFT, round by round.

    After `until`, on the monotonic clock, there are no more than `LEAST` rounds.
    """
    order = random.Random(0)
    names = list(steps)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(-2, rounds):
        if turn >= LEAST and time.monotonic() > until:
            break
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
            "rounds": len(own),
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
        inputs = of.inputs(batch, cpu, torch.float32)
        steps = {name: prepare(build(name, of, cpu, torch.float32), inputs) for name in [*names, AGAIN]}
        key = f"{subject}, batch {batch}, eager"
        found[key] = compare(steps, cpu_time, max(LEAST, round(rounds * scale)))
        print(f"\n{key}\n{table(found[key])}", flush=True)
    return found


def takes_part(name: str, subject: str, batch: int, mode: str) -> bool:
    """Whether a variant is measured: not all fit a card at once, or the time."""
    if "llama" in subject and name.endswith("_frozen"):
        return False
    return name in MAIN or (mode == "eager" and (name in LARGE or not (subject == "sdxl" or batch == 8)))


def build_all(names: list[str], subject: str, device: torch.device) -> dict[str, nn.Module]:
    """By variant, as many as there is memory for."""
    models = {}
    for name in names:
        try:
            models[name] = build(name, SUBJECTS[subject], device, torch.bfloat16)
        except RuntimeError as error:
            print(f"{subject}: {name} left out: {str(error).splitlines()[0]}", flush=True)
    return models


def measure(
    key: str, models: dict[str, nn.Module], inputs: dict[str, Tensor], mode: str, rounds: int, share: float, end: float
) -> dict[str, dict[str, Any]]:
    """One case on a GPU: of all the models that can; what cannot is named. Empty if `floor` or `peft` cannot.

    Up to `share` there may be more than the least number of rounds; no model begins after `end`.
    """
    steps: dict[str, Callable[[], Any]] = {}
    peaks = {}
    graphs = CudaGraphs()
    for name, model in models.items():
        if time.monotonic() > end:
            print(f"{key}: {name} left out, the time is over", flush=True)
            continue
        try:
            step = prepare(model, inputs, VARIANTS[name.removesuffix(" again")].autocast, mode)
            step()
            peaks[name] = peak_memory(step)
            steps[name] = as_graph(step, graphs) if mode.endswith("graph") else step
            steps[name]()
        except RuntimeError as error:
            steps.pop(name, None)
            print(f"{key}: {name} left out: {str(error).splitlines()[0]}", flush=True)
    if not {"floor", "peft"} <= steps.keys():
        return {}
    measured = compare(steps, cuda_time, rounds, share)
    return {name: values | {"peak": peaks[name]} for name, values in measured.items()}


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()


def on_cuda(variants: list[str], scale: float, minutes: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cases of a GPU, as many as fit the time and the memory; what does not fit is named."""
    torch._dynamo.config.recompile_limit = 64  # variants share their code, each is compiled by itself
    device, until, left = torch.device("cuda"), time.monotonic() + 60 * minutes, len(CUDA_CASES)
    for subject, group in groupby(CUDA_CASES, key=lambda case: case[0]):
        cases = list(group)
        names = [name for name in [*variants, AGAIN] if any(takes_part(name, *case) for case in cases)]
        models = build_all(names, subject, device) if time.monotonic() < until else {}
        for _, batch, mode in cases:
            key, now = f"{subject}, batch {batch}, {mode}", time.monotonic()
            share, left = now + (until - now) / left, left - 1
            if now > until:
                print(f"\n{key}: left out, {minutes} minutes are over", flush=True)
                continue
            chosen = {name: model for name, model in models.items() if takes_part(name, subject, batch, mode)}
            inputs = SUBJECTS[subject].inputs(batch, device, torch.bfloat16)
            try:
                found = measure(key, chosen, inputs, mode, max(LEAST, round(MOST * scale)), share, until)
            except RuntimeError as error:
                print(f"{key}: left out: {str(error).splitlines()[0]}", flush=True)
                found = {}
            if found:
                print(f"\n{key}\n{table(found)}", flush=True)
                yield key, found
            del chosen
            clean()
        models.clear()
        clean()


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
    else:
        found: dict[str, Any] = {}
        for case, values in on_cuda(variants, args.scale, args.minutes):
            keep(found := found | {case: values})  # what there is stays, whatever comes after
        if not found:
            parser.exit(1, "no case fits this card\n")
    from .plots import plot_steps

    plot_steps(path)


if __name__ == "__main__":
    main()
