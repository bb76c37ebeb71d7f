"""Stages c and d: the time of a step and its peak memory, of the UNets and of the Llama (`benchmarks.step`).

Both stages write one file, in the form of `benchmarks/results/step-cuda.json`: `benchmarks.report` makes the tables of
the documentation from it.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from ..report import OURS
from ..results import write_results
from ..step import LARGE, Case, Models, measure_all
from .stages import RESERVE, stage_args

# What can fail stands last: a recording that breaks off may keep the process from drawing random numbers.
CASES = {
    "images": [
        Case("sd15", 1, "eager"),
        Case("sd15", 4, "eager"),
        Case("sdxl", 1, "eager"),
        Case("sd15", 1, "graph"),
        Case("sd15", 4, "graph"),
        Case("sdxl", 1, "graph"),
        Case("sd15", 1, "compiled blocks"),
    ],
    "language": [Case("llama_1b", 1, "eager"), Case("llama_1b", 1, "compiled blocks"), Case("llama_1b", 1, "graph")],
}
TINY_CASES = {
    "images": [Case("tiny_unet", 1, "eager"), Case("tiny_unet", 2, "whole step, eager")],
    "language": [Case("tiny_llama", 1, "eager"), Case("tiny_llama", 1, "compiled blocks")],
}
TINY_VARIANTS = ("floor", "peft", "block", "block_frozen")


def earlier_results(file: Path) -> dict[str, Any]:
    """Read the measurements of the other of the two stages."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError):
        return {}


def lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each case: times PEFT's time, and in brackets times its peak memory."""
    found = []
    for case, values in results.items():
        cells = []
        for name in ("floor", *OURS, *(f"{name}_frozen" for name in OURS), "peft_autocast", "peft again"):
            if name in values:
                cell = f"{name} {values[name]['ratio'][1]:.3f}"
                if "peak" in values[name] and values["peft"].get("peak"):
                    cell += f" ({values[name]['peak'] / values['peft']['peak']:.2f})"
                cells.append(cell)
        found.append(f"{case}, PEFT {1000 * values['peft']['seconds'][1]:.1f} ms: {', '.join(cells)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--subjects", choices=CASES, required=True)
    args = stage_args(__doc__, parser)
    warnings.filterwarnings("ignore")
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    clock = "events" if device.type == "cuda" else "thread time"
    if device.type == "cpu":
        torch.set_num_threads(1)
    results = earlier_results(args.output)
    models = Models(device, dtype)
    cases, variants = (TINY_CASES, TINY_VARIANTS) if args.tiny else (CASES, LARGE)
    options = {"scale": 0.3, "backend": "eager"} if args.tiny else {}
    for case, found in measure_all(cases[args.subjects], variants, models, args.seconds - RESERVE, **options):
        results = results | {case: found}
        summary = ["x PEFT's time, in brackets x its peak memory", *lines(results)]
        write_results(args.output, "step", results, clock=clock, summary=summary, quiet=True)


if __name__ == "__main__":
    main()
