"""The cost of a whole DreamBooth run, from start-up to saving: ours and, where it is at hand, diffusers'.

    python -m benchmarks.run --model FOLDER --data FOLDER --prompt "a photo of sks dog" [--steps 200] [--rounds 3]
        [--diffusers_script path/to/examples/dreambooth/train_dreambooth_lora.py]

`python -m benchmarks.full_size FOLDER` makes a pipeline of Stable Diffusion 1.5's size, without a download.

diffusers' script (examples/dreambooth of its repository, at the installed version's tag) imports torchvision, which
nothing of ours needs. Where it is not installed, `benchmarks.stand_in` gives the script those transforms by Pillow and
torch, and the results say so; pip install -e '.[benchmarks]' -c constraints.txt brings the real ones.

Both scripts get the same options and data, and nobody validates. The batch size divides the number of images, or
diffusers' script would train fewer images in the last step of each pass. Runs take turns, so that what else the machine
does falls on all of them; figures are medians of the rounds, ratios are taken round by round. A short run before tells
what the steps take and what everything else, whatever a script does inside; of ours the parts are timed as well.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from reslora_diffusion.diffusion.data.scan import IMAGE_SUFFIXES

from . import phases
from .results import FOLDER, write_results

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "train_scripts" / "train_dreambooth_reslora.py"
FEW = 5
MEASURES = ("seconds", "processor", "memory")
THEIRS = "diffusers"


class ScriptFailed(SystemExit):
    """A script ended with an error; the message has the end of what it said."""


def run_once(program: list[str], file: Path | None = None) -> dict[str, Any]:
    """Seconds of one process by the clock and of the processor, its peak memory in MB, and its parts if it tells."""
    with tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        environment = os.environ | {"HF_HUB_OFFLINE": "1", phases.FILE: str(file), phases.BEGAN: str(began)}
        process = subprocess.Popen(program, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise ScriptFailed(f"{' '.join(program)}\nfailed:\n{said.read()[-6000:]}")
    found: dict[str, Any] = {
        "seconds": wall,
        "processor": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss / 1000,
    }
    if file is not None:
        found["phases"] = json.loads(file.read_text(encoding="utf-8"))
        found["phases"]["leaving Python"] = wall - sum(found["phases"].values())
    return found


def program_of(script: Path) -> list[str]:
    """Return the words that start diffusers' script: as it is, or with a stand-in for torchvision."""
    stand_in = ["-m", "benchmarks.stand_in"] if find_spec("torchvision") is None else []
    return [sys.executable, *stand_in, str(script)]


def options(args: argparse.Namespace, steps: int, output: Path) -> list[str]:
    """Return the options that both scripts have."""
    given = {
        "pretrained_model_name_or_path": args.model,
        "instance_data_dir": args.data,
        "instance_prompt": args.prompt,
        "resolution": args.resolution,
        "train_batch_size": args.batch_size,
        "rank": args.rank,
        "learning_rate": 1e-4,
        "max_train_steps": steps,
        "checkpointing_steps": steps + 1,
        "seed": 0,
        "output_dir": output,
    }
    given |= {"mixed_precision": args.mixed_precision} if args.mixed_precision else {}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run_script(program: list[str], extra: list[str], args: argparse.Namespace, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "phases.json" if str(OURS) in program else None
        return run_once([*program, *options(args, steps, Path(folder) / "run"), *extra], file)


def figures(rounds: list[dict[str, dict[str, Any]]], name: str) -> dict[str, Any]:
    """Medians of the runs of one script, its parts, and in each round the ratios to diffusers' script."""
    runs = [turn[name] for turn in rounds if name in turn]
    own: dict[str, Any] = {measure: median(run[measure] for run in runs) for measure in MEASURES}
    if "phases" in runs[0]:
        own["phases"] = {part: median(run["phases"][part] for run in runs) for part in runs[0]["phases"]}
    if both := [turn for turn in rounds if {name, THEIRS} <= turn.keys()]:
        own["ratios"] = {m: [turn[name][m] / turn[THEIRS][m] for turn in both] for m in MEASURES}
    return own | {"rounds": [{measure: run[measure] for measure in MEASURES} for run in runs]}


def measure(scripts: Mapping[str, tuple[list[str], list[str]]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of each script, with seconds per step and of all the rest."""
    short = {name: run_script(*script, args, FEW) for name, script in scripts.items()}
    rounds = [
        {name: run_script(*script, args, args.steps) for name, script in scripts.items()} for _ in range(args.rounds)
    ]
    found = {}
    for name in scripts:
        own = figures(rounds, name)
        for clock in ("seconds", "processor"):
            step = (own[clock] - short[name][clock]) / (args.steps - FEW)
            own |= {f"{clock}_per_step": step, f"{clock}_besides": own[clock] - args.steps * step}
        found[name] = own
    return found


def unequal_batches(data: Path, batch_size: int) -> Iterator[str]:
    """diffusers' script ends each pass with what is left of the images, as a smaller batch; ours has none."""
    count = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in data.iterdir())
    if count % batch_size:
        yield f"--batch_size: got {batch_size}, wanted a divisor of the {count} images of {data} (equal steps)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a Stable Diffusion pipeline")
    parser.add_argument("--data", required=True, help="folder of instance images")
    parser.add_argument("--prompt", default="a photo of sks dog")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--mixed_precision", choices=["fp16", "bf16"], help="for all scripts")
    parser.add_argument("--steps", type=int, default=200, help=f"of the whole run; more than {FEW}")
    parser.add_argument("--rounds", type=int, default=3, help="whole runs of each script")
    parser.add_argument("--diffusers_script", type=Path, help="their train_dreambooth_lora.py, to compare with")
    parser.add_argument("--output", default=FOLDER / "run.json", help="result file")
    args = parser.parse_args()
    problems = [f"--{name}: no folder {getattr(args, name)}" for name in ("model", "data")
                if not Path(getattr(args, name)).is_dir()]  # fmt: skip
    if args.diffusers_script and not args.diffusers_script.is_file():
        problems.append(f"--diffusers_script: no file {args.diffusers_script}")
    if args.diffusers_script and not problems:
        problems += unequal_batches(Path(args.data), args.batch_size)
    if args.steps <= FEW:
        problems.append(f"--steps: got {args.steps}, wanted more than {FEW}")
    if problems:
        parser.error("; ".join(problems))
    ours = [sys.executable, "-m", "benchmarks.phases", str(OURS)]
    scripts = {
        "lora": (ours, ["--method", "lora", "--report_to", "none"]),
        "reslora input": (ours, ["--shortcut", "input", "--report_to", "none"]),
    }
    if args.diffusers_script:
        scripts[THEIRS] = (program_of(args.diffusers_script), [])
    found = measure(scripts, args)
    print(f"{'':16}{'seconds':>9}{'processor':>11}{'MB':>7}{'a step':>9}{'besides':>9}   the first three x diffusers")
    for name, values in found.items():
        print(
            f"{name:16}{values['seconds']:>9.1f}{values['processor']:>11.1f}{values['memory']:>7.0f}"
            f"{values['seconds_per_step']:>9.3f}{values['seconds_besides']:>9.1f}   "
            + "  ".join(f"{median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in values.get("ratios", {}).values())
        )
        for phase, seconds in values.get("phases", {}).items():
            print(f"    {phase:16}{seconds:.1f} s by the clock")
    facts: dict[str, Any] = {"steps": args.steps, "batch_size": args.batch_size, "resolution": args.resolution}
    facts |= {"turns": args.rounds, "torchvision": "installed" if find_spec("torchvision") else "benchmarks.stand_in"}
    write_results(args.output, "run", found, **facts)


if __name__ == "__main__":
    main()
