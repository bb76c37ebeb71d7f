"""How long a whole DreamBooth run takes: start-up, caching, steps, saving; ours and, where it is at hand, diffusers'.

    python -m benchmarks.run --model FOLDER --data FOLDER --prompt "a photo of sks dog" [--steps 200]
        [--diffusers_script path/to/examples/dreambooth/train_dreambooth_lora.py]

Both scripts get the same options and data. Each is run twice, for a few steps and for all of them: what they differ by
is the steps, and what is left is everything else, whatever a script does inside. Of ours the parts are timed as well.
Ratios are of processor time on a CPU, which other programs do not change much, and of the clock on a GPU.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .results import FOLDER, write_results

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "train_scripts" / "train_dreambooth_reslora.py"
FEW = 5
PHASES = "RESLORA_BENCHMARK_PHASES"


def timed_phases(script: str, argv: list[str]) -> None:
    """In a process of its own: our script with a clock around its parts, written to the file that PHASES names."""
    began = time.perf_counter()
    spent: dict[str, float] = {}

    def clocked(function: Any, phase: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[phase] = spent.get(phase, 0.0) + time.perf_counter() - start

        return call

    from reslora_diffusion.diffusion import examples
    from reslora_diffusion.diffusion.run import Run

    examples.encode_examples = clocked(examples.encode_examples, "caching")  # type: ignore[assignment]
    Run.finish = clocked(Run.finish, "saving")  # type: ignore[method-assign]
    spec = importlib.util.spec_from_file_location("script", script)
    module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    module.train = clocked(module.train, "steps")
    module.main(module.parse_args(argv))
    spent["start-up"] = time.perf_counter() - began - sum(spent.values())
    Path(os.environ[PHASES]).write_text(json.dumps(spent), encoding="utf-8")


def run_once(program: list[str], phases: Path | None = None) -> dict[str, Any]:
    """Seconds of one process, and its parts if it tells."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", PHASES: str(phases)}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(program)}\nfailed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = {"seconds": wall, "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
    if phases is not None:
        found["phases"] = json.loads(phases.read_text(encoding="utf-8"))
    return found


def options(args: argparse.Namespace, steps: int, output: Path) -> list[str]:
    """What both scripts understand."""
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
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def measure(program: list[str], extra: list[str], args: argparse.Namespace, ours: bool) -> dict[str, Any]:
    """A short and a whole run; seconds per step and of all the rest."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for steps in (FEW, args.steps):
            output = Path(folder) / f"run-{steps}"
            phases = Path(folder) / "phases.json" if ours else None
            runs.append(run_once([*program, *options(args, steps, output), *extra], phases))
    found = dict(runs[1])
    for clock in ("seconds", "processor"):
        step = (runs[1][clock] - runs[0][clock]) / (args.steps - FEW)
        found[f"{clock}_per_step"], found[f"{clock}_besides"] = step, runs[1][clock] - args.steps * step
    return found


def main() -> None:
    if os.environ.get(PHASES) and len(sys.argv) > 1 and sys.argv[1] == str(OURS):
        timed_phases(sys.argv[1], sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a Stable Diffusion pipeline")
    parser.add_argument("--data", required=True, help="folder of instance pictures")
    parser.add_argument("--prompt", default="a photo of sks dog")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200, help=f"of the whole run; more than {FEW}")
    parser.add_argument("--diffusers_script", type=Path, help="their train_dreambooth_lora.py, to compare with")
    parser.add_argument("--output", default=FOLDER / "run.json", help="result file")
    args = parser.parse_args()
    problems = [f"--{name}: no folder {getattr(args, name)}" for name in ("model", "data")
                if not Path(getattr(args, name)).is_dir()]  # fmt: skip
    if args.diffusers_script and not args.diffusers_script.is_file():
        problems.append(f"--diffusers_script: no file {args.diffusers_script}")
    if args.steps <= FEW:
        problems.append(f"--steps: got {args.steps}, wanted more than {FEW}")
    if problems:
        parser.error("; ".join(problems))
    import torch

    clock = "seconds" if torch.cuda.is_available() else "processor"
    ours = [sys.executable, "-m", "benchmarks.run", str(OURS)]
    found = {"lora": measure(ours, ["--method", "lora", "--report_to", "none"], args, True)}
    found["reslora input"] = measure(ours, ["--shortcut", "input", "--report_to", "none"], args, True)
    if args.diffusers_script:
        found["diffusers"] = measure([sys.executable, str(args.diffusers_script)], [], args, False)
    theirs = found.get("diffusers")
    print(f"{'':16}{'whole run':>11}{'per step':>11}{'besides':>10}   {clock}")
    for name, values in found.items():
        ratio = f"  {values[clock] / theirs[clock]:.2f} x diffusers" if theirs else ""
        cells = (values[clock], values[f"{clock}_per_step"], values[f"{clock}_besides"])
        print(f"{name:16}{cells[0]:>11.1f}{cells[1]:>11.3f}{cells[2]:>10.1f}{ratio}")
        for phase, seconds in values.get("phases", {}).items():
            print(f"    {phase:16}{seconds:.1f} s by the clock")
    facts = {"steps": args.steps, "batch_size": args.batch_size, "resolution": args.resolution}
    write_results(args.output, "run", found, clock=clock, **facts)


if __name__ == "__main__":
    main()
