"""docs/performance.md, and the table of the README, from the result files: no number in them is typed by hand.

    python -m benchmarks.report [--check]

The README's table stands between `<!-- performance -->` and `<!-- /performance -->`; without these lines it is left
alone. `--check` writes nothing and fails if a file is not what its results make of it.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

from reslora_diffusion.utils.files import write_text

from .gpu.stages import STAGES
from .plots import plot_steps
from .results import FOLDER, with_block
from .run import MEASURES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
NAMES = {
    "floor": "frozen model, no adapter",
    "peft": "**PEFT LoRA**",
    "peft again": "PEFT LoRA, again (noise)",
    "peft_bf16_autocast": "PEFT LoRA, bf16 autocast",
    "peft_fp32": "PEFT LoRA, fp32 adapters",
    "peft_autocast": "PEFT LoRA, fp32 adapters, autocast",
    "kohya": "LoRA as kohya's scripts compute it",
    "paper_input": "ResLoRA `input`, written as in the paper",
    "paper_block": "ResLoRA `block`, written as in the paper",
    "paper_middle": "ResLoRA `middle`, written as in the paper",
    "lora": "ours, LoRA",
    **{kind: f"ours, `{kind}`" for kind in ("input", "block", "middle")},
    "peft_dora": "PEFT DoRA",
    "dora": "ours, DoRA",
    "block_dora": "ours, DoRA with `block`",
    "lora_frozen": "ours, LoRA, `save_memory`",
    **{f"{kind}_frozen": f"ours, `{kind}`, `save_memory`" for kind in ("input", "block", "middle")},
}
TITLES = {"machine": "The GPU", "correctness": "Correctness on the GPU", "kernels": "What each kernel gains on the GPU"}
KINDS = ("counting", "step", "methods", "run", "startup", *TITLES)
RUN_AIM = 0.6
TIME_AIM, MEMORY_AIM, OVERHEAD_AIM = 1.0, 0.75, 0.45
OURS = ("lora", "input", "block", "middle")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(machine: dict[str, Any]) -> str:
    """One line on the machine and the versions."""
    device = f"{machine['device']} (CUDA {machine['cuda']}), " if "device" in machine else ""
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers", "peft", "transformers"))
    return (
        f"{device}{machine['processor']}, {machine['cores']} cores, load {machine['load']}; Python "
        f"{machine['python']}, {libraries}; {machine['date']}."
    )


def verdict(value: float, limit: float) -> str:
    return f"{value:.2f} {'(met)' if value <= limit else '**(missed)**'}"


def counting_section(content: dict[str, Any]) -> str:
    parts = ["## Operations, traffic and memory of a step, counted\n"]
    parts.append(
        "One forward and backward, bf16 base, rank 16 on `to_q`, `to_k`, `to_v`, `to_out.0`; counted on the `meta` "
        "device with the operations of a GPU (`python -m benchmarks.counting`), so the same on every machine. "
        "Operations approximate kernel launches, traffic is what they read and write, and peak is that of activations. "
        "Brackets have the ratio to PEFT's. Rows with autocast, fp32 adapters or kohya run LoRA as common scripts do. "
        "No time was measured here."
    )
    for case, found in content["results"].items():
        peft = found["peft"]
        rows = [
            [
                NAMES[name],
                f"{values['operations']} ({values['operations'] / peft['operations']:.2f})",
                *(f"{values[key]:.2f} ({values[key] / peft[key]:.2f})" for key in ("bytes", "saved", "peak")),
            ]
            for name, values in found.items()
        ]
        parts.append(f"### {case}\n\n{markdown(['', 'operations', 'traffic, GB', 'saved, GB', 'peak, GB'], rows)}")
        floor = found["floor"]
        goals = []
        for name in OURS:
            left = (found[name]["bytes"] - floor["bytes"]) / (peft["bytes"] - floor["bytes"])
            memory = found[f"{name}_frozen"]["peak"] / peft["peak"]
            goals.append([NAMES[name], verdict(left, OVERHEAD_AIM), verdict(memory, MEMORY_AIM)])
        head = [
            "",
            f"share of PEFT's traffic overhead (aim {OVERHEAD_AIM})",
            f"peak with `save_memory` (aim {MEMORY_AIM} x PEFT)",
        ]
        parts.append(markdown(head, goals))
    return "\n\n".join([*parts, where(content["machine"])])


def step_section(content: dict[str, Any], image: str) -> str:
    kind = "CUDA" if "device" in content["machine"] else "CPU"
    parts = [f"## Time of a step, {kind}\n"]
    parts.append(
        f"`python -m benchmarks.step`: all variants in one process, by turns; {content['clock']}. A step is forward, "
        "loss and backward; a whole step has noise, clipping and AdamW as well. The ratio is the median over rounds, "
        "with its quartiles; overhead is the share of PEFT's overhead over the frozen model that "
        f"is left. Aim: at most {TIME_AIM:.2f} x PEFT for every shortcut."
    )
    for case, found in content["results"].items():
        rows = [
            [
                NAMES[name],
                f"{1000 * values['seconds'][1]:.2f}",
                f"{values['ratio'][1]:.3f}",
                f"{values['ratio'][0]:.3f} to {values['ratio'][2]:.3f}",
                f"{values['overhead']:.2f}",
                *([f"{values['peak']:.2f}"] if "peak" in values else []),
            ]
            for name, values in found.items()
        ]
        head = ["", "ms", "x PEFT", "quartiles", "overhead"]
        head += ["peak, GB"] if any("peak" in values for values in found.values()) else []
        missed = [NAMES[name] for name in OURS if name in found and found[name]["ratio"][1] > TIME_AIM]
        outcome = f"Missed by {', '.join(missed)}." if missed else "The aim is met."
        parts.append(f"### {case}\n\n{markdown(head, rows)}\n\n{outcome}")
    return "\n\n".join([*parts, f"![times relative to PEFT]({image})", where(content["machine"])])


def startup_section(content: dict[str, Any]) -> str:
    rows = [
        [f"`{name}`", f"{values['seconds']:.2f}", verdict(values["processor_seconds"], content["aim"])]
        for name, values in content["results"].items()
    ]
    head = ["", "seconds", f"processor seconds (aim {content['aim']})"]
    return f"## How soon commands answer\n\n{markdown(head, rows)}\n\n{where(content['machine'])}"


def methods_section(content: dict[str, Any]) -> str:
    parts = [
        "## What each method costs",
        f"Whole runs of {content['steps']} steps beside plain LoRA with AdamW, on one thread of a CPU, rank 16, "
        "float32 (`python -m benchmarks.methods`). The runs take turns, one step each, in one process. Times are "
        "processor time of the thread, as the machine was loaded; ratios are of whole runs, quartiles step by step. "
        "`lora again` is what noise does. Memory is counted: factors, gradients, optimizer, schedule and what forwards "
        "save. On models as small as these, what an optimizer does for each pair of factors weighs more than on large "
        "ones with many tokens. The papers' numbers are of GPUs and of models of billions of parameters.",
    ]
    head = ["", "ms a step", "x LoRA", "quartiles", "memory, MB", "optimizer, MB", "claimed"]
    for case, methods in content["results"].items():
        rows = []
        for name, values in methods.items():
            memory, (low, _, high) = values["megabytes"], values["quartiles"]
            times = [f"{1000 * values['seconds']:.1f}", f"{values['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
            rows.append(
                [f"`{name}`", *times, f"{sum(memory.values()):.1f}", f"{memory['optimizer']:.2f}", values["claim"]]
            )
        parts += [f"### {case}", markdown(head, rows)]
    return "\n\n".join([*parts, where(content["machine"])])


def run_section(content: dict[str, Any]) -> str:
    found = content["results"]

    def compared(values: dict[str, Any], measure: str) -> str:
        ratios = values.get("ratios", {}).get(measure)
        return f" ({median(ratios):.2f}; {min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""

    rows = [
        [
            name,
            *(f"{values[m]:.{0 if m == 'memory' else 1}f}{compared(values, m)}" for m in MEASURES),
            f"{values['seconds_per_step']:.3f}" if "seconds_per_step" in values else "",
            f"{values['seconds_besides']:.1f}" if "seconds_besides" in values else "",
            "; ".join(f"{phase} {seconds:.1f} s" for phase, seconds in values.get("phases", {}).items()),
        ]
        for name, values in found.items()
    ]
    times = {name: median(values["ratios"]["seconds"]) for name, values in found.items() if "ratios" in values}
    missed = [name for name, ratio in times.items() if name != "diffusers" and ratio > RUN_AIM]
    outcome = f" **Missed** by {', '.join(missed)}." if missed else ""
    head = ["", "seconds", "processor seconds", "peak memory, MB", "seconds a step", "besides steps", "parts"]
    where_run = ", CUDA" if "device" in content["machine"] else ""
    return (
        f"## A whole DreamBooth run{where_run}\n\n{content['steps']} steps at batch {content['batch_size']}, "
        f"{content['resolution']} px, without validation: medians of {content['turns']} runs that took turns. "
        f"Brackets have the ratio to diffusers' own script, median and range (aim {RUN_AIM}).{outcome}\n\n"
        f"{markdown(head, rows)}\n\n{where(content['machine'])}"
    )


def marked(text: str, value: float, limit: float) -> str:
    return text if value <= limit else f"**{text}** missed"


def summary(results: dict[str, dict[str, Any]]) -> str:
    """The README's table."""
    rows, machines = [], []
    for stem, content in results.items():
        if content["kind"] == "step":
            kind = stem.removeprefix("step-").upper()
            machines.append(f"Times, {kind}: {where(content['machine'])}")
            for case, found in content["results"].items():
                cells = []
                for name in ("floor", *OURS):
                    if name not in found:  # for want of memory or time
                        cells.append("")
                        continue
                    low, middle, high = found[name]["ratio"]
                    cells.append(marked(f"{middle:.2f} ({low:.2f} to {high:.2f})", middle, TIME_AIM))
                rows.append([f"time, {case} ({kind})", *cells])
                saved = [found.get(f"{name}_frozen", {}).get("peak") for name in OURS]
                if any(saved):
                    ratios = [peak and peak / found["peft"]["peak"] for peak in saved]
                    cells = [marked(f"{ratio:.2f}", ratio, MEMORY_AIM) if ratio else "" for ratio in ratios]
                    rows.append([f"peak memory with `save_memory`, {case} ({kind})", "", *cells])
        elif content["kind"] == "counting":
            for case, found in content["results"].items():
                for key, label in (("operations", "operations"), ("bytes", "memory traffic"), ("peak", "peak memory")):
                    cells = [f"{found[name][key] / found['peft'][key]:.2f}" for name in ("floor", *OURS)]
                    rows.append([f"{label}, {case}", *cells])
                ratios = [found[f"{name}_frozen"]["peak"] / found["peft"]["peak"] for name in OURS]
                cells = [marked(f"{ratio:.2f}", ratio, MEMORY_AIM) for ratio in ratios]
                rows.append([f"peak memory with `save_memory`, {case}", "", *cells])
    head = ["one training step, x PEFT LoRA", "frozen model", "our LoRA", "`input`", "`block`", "`middle`"]
    note = (
        f"Aims: time at most {TIME_AIM:.2f}, peak memory with `save_memory` at most {MEMORY_AIM:.2f}. Counts are of "
        "the operations of a GPU and exact; times are medians of paired rounds with their quartiles. More in "
        "[docs/performance.md](docs/performance.md)."
    )
    return "\n\n".join([markdown(head, rows), " ".join([note, *machines])])


def lines_section(content: dict[str, Any]) -> str:
    """Return the description that a result file has of itself."""
    lines = "\n".join(f"- {line.strip()}" for line in content["summary"])
    return f"## {TITLES[content['kind']]}\n\n{lines}\n\n{where(content['machine'])}"


def gpu_section(measured: bool) -> str:
    """Return the lines on how to measure on a GPU."""
    rows = [[stage.letter, stage.name, stage.what, f"{stage.seconds} s", f"`{stage.file}`"] for stage in STAGES]
    return "\n\n".join(
        [
            "## On a GPU",
            "" if measured else "No time on a GPU has been measured yet.",
            "`python -m benchmarks.gpu --out DIR --budget 480` runs every measurement that needs a GPU. "
            "Stages run in this order, each in a process of its own with a time limit, and one that fails does not "
            "stop the next. `--stages bf` picks stages, `--help` lists all options, and `--device cpu --tiny` runs the "
            "programs without a GPU. The times are estimates for an H100; the budget is divided in proportion to them.",
            markdown(["stage", "", "measures", "time", "file in DIR"], rows),
            "For a machine without network, `benchmarks/gpu_kit.sh .gpu-kit` collects diffusers, PEFT and a font and "
            "prints the command to run there. With the path of diffusers' "
            "`examples/dreambooth/train_dreambooth_lora.py` as a second argument, stage e compares with that script.",
            "Copy the result files into `benchmarks/results` and run `python -m benchmarks.report` to update this page "
            "and the README's table. `sticker-sd.tar` from stage g holds the weights that changed.",
        ]
    ).replace("\n\n\n\n", "\n\n")


def document(results: dict[str, dict[str, Any]]) -> str:
    make = {"counting": counting_section, "startup": startup_section, "run": run_section, "methods": methods_section}
    make |= dict.fromkeys(TITLES, lines_section)
    parts = [
        "# Performance",
        "`python -m benchmarks.report` generates this page from the files in `benchmarks/results`.",
    ]
    measured = [content["machine"] for content in results.values() if content["kind"] == "step"]
    parts.append(gpu_section(any("device" in machine for machine in measured)))
    for stem, content in results.items():
        if content["kind"] == "step":
            image = os.path.relpath(FOLDER / f"{stem}.png", DOCUMENT.parent)
            parts.append(step_section(content, image))
        else:
            parts.append(make[content["kind"]](content))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    args = parser.parse_args()
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    results = {stem: content for stem, content in found.items() if content.get("kind") in KINDS}
    for stem, content in results.items():
        if content["kind"] == "step" and not args.check and not (FOLDER / f"{stem}.png").exists():
            plot_steps(FOLDER / f"{stem}.json")
    wanted = {DOCUMENT: document(results)}
    wanted[README] = with_block(README.read_text(encoding="utf-8"), "performance", summary(results))
    stale = [p for p, content in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != content]
    if args.check:
        sys.exit("".join(f"{path.relative_to(ROOT)} is not what its results make of it\n" for path in stale) or None)
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        write_text(path, wanted[path])
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
