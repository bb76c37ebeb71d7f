"""Clocks, peak memory, and the comparison of ways to do one thing that take turns.

Timings of a busy machine drift by more than the differences that matter. So what is compared takes turns in a new
random order each round, and each round gives one ratio to the yardstick.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

LEAST, MOST = 3, 12  # rounds of a case on a GPU
TURN = 0.2  # seconds of the device that one turn takes, about
Clock = Callable[[Callable[[], Any]], dict[str, float]]


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


def clock_of(device: torch.device, step: Callable[[], Any]) -> Clock:
    """The clock of a device; on a GPU with as many steps in one turn as `TURN` allows, judged by this one."""
    if device.type != "cuda":
        return cpu_time
    seconds = cuda_time(step, 2)["seconds"]
    return partial(cuda_time, steps=max(1, min(4, round(TURN / seconds))))


def peak_memory(device: torch.device, step: Callable[[], Any]) -> float | None:
    """Gigabytes above what is allocated before the step; None on a CPU, which does not count."""
    if device.type != "cuda":
        step()
        return None
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
    clock: Clock,
    rounds: int,
    until: float = math.inf,
    yardstick: str = "peft",
) -> dict[str, dict[str, Any]]:
    """Time all of them in turn; by variant its times and its ratios to the yardstick, round by round.

    After `until`, on the monotonic clock, there are no more than `LEAST` rounds. Where there is a `floor`, each variant
    has its overhead over it as a share of that of the yardstick.
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
            "ratio": quartiles([a / b for a, b in zip(own, seconds[yardstick], strict=True)]),
            "rounds": len(own),
        }
        if "host_seconds" in times[name][0]:
            found[name]["host_seconds"] = statistics.median(each["host_seconds"] for each in times[name])
    if "floor" in found:
        floor, whole = (found[name]["seconds"][0] for name in ("floor", yardstick))
        for values in found.values():
            values["overhead"] = (values["seconds"][0] - floor) / (whole - floor)
    return found


def table(found: dict[str, dict[str, Any]], yardstick: str = "PEFT") -> str:
    head = (
        f"{'':20}{'ms (median)':>14}{f'x {yardstick}':>9}{'quartiles':>16}{'overhead':>10}{'host ms':>9}{'peak GB':>9}"
    )
    lines = [head]
    for name, values in found.items():
        low, middle, high = values["ratio"]
        overhead = f"{values['overhead']:.2f}" if "overhead" in values else ""
        host = f"{1000 * values['host_seconds']:.1f}" if "host_seconds" in values else ""
        peak = f"{values['peak']:.2f}" if "peak" in values else ""
        lines.append(
            f"{name:20}{1000 * values['seconds'][1]:>14.2f}{middle:>9.3f}{f'{low:.3f}-{high:.3f}':>16}"
            f"{overhead:>10}{host:>9}{peak:>9}"
        )
    return "\n".join(lines)
