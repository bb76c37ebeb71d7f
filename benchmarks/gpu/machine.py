"""Stage a: what the machine is, and the two ceilings of everything that runs on it.

bandwidth     a copy within the device's memory, bytes read and written
products      C = A B of square matrices, in each precision
launch        the time between small operations that are launched one by one, and replayed as a CUDA graph

The median of repeats counts. Inputs are random: products of zeros run faster.
"""

import statistics
import time
from collections.abc import Callable

import torch

from ..results import write_results
from .stages import stage_args

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of one call, by the device's clock where it has one."""
    times = []
    for turn in range(repeats + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            spent = begin.elapsed_time(end) / 1000
        else:
            began = time.perf_counter()
            function()
            spent = time.perf_counter() - began
        times += [spent] if turn > 1 else []
    return statistics.median(times)


def bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes read and written in a second."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, repeats)


def products(device: torch.device, width: int, repeats: int) -> dict[str, float]:
    """Floating-point operations in a second, by precision."""
    found = {}
    for name, dtype in PRECISIONS.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
        c = torch.empty_like(a)
        found[name] = 2 * width**3 / seconds_of(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), device, repeats)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def launches(device: torch.device, count: int) -> dict[str, float]:
    """Seconds for each of many small operations: on the host, on the device, and in a graph."""
    x = torch.zeros(32, device=device)

    def many() -> None:
        for _ in range(count):
            x.add_(1.0)

    many()
    began = time.perf_counter()
    many()
    found = {"host": (time.perf_counter() - began) / count, "eager": seconds_of(many, device, 5) / count}
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        found["graph"] = seconds_of(graph.replay, device, 5) / count
    return found


def main() -> None:
    args = stage_args(__doc__)
    device = torch.device(args.device)
    size, width, repeats = (2**24, 256, 3) if args.tiny else (2**31, 8192, 10)
    found: dict[str, object] = {"bandwidth": bandwidth(device, size, repeats)}
    found |= {"products": products(device, width, repeats), "launches": launches(device, 1000)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": [properties.major, properties.minor],
            "cudnn": torch.backends.cudnn.version(),
        }
    rates = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in found["products"].items())  # type: ignore[attr-defined]
    times = ", ".join(f"{name} {1e6 * each:.2f}" for name, each in found["launches"].items())  # type: ignore[attr-defined]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    summary = [
        f"{name}, torch {torch.__version__}",
        f"{found['bandwidth'] / 1e12:.3g} TB/s; TFLOP/s: {rates}",  # type: ignore[operator]
        f"microseconds a launch: {times}",
    ]
    print("\n".join(summary))
    write_results(args.output, "machine", found, summary=summary)


if __name__ == "__main__":
    main()
