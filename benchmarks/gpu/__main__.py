"""Run the stages one after the other, whatever becomes of each, and end with a table."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .stages import RESERVE, ROOT, STAGES, Stage, environment

BUDGET, TINY_BUDGET = 480.0, 900.0
LEAST = 5.0  # seconds with which a stage is begun at all
TAIL = 40  # lines of a failed stage that its file holds


@dataclass
class Outcome:
    """The outcome of a stage."""

    stage: Stage
    seconds: float
    status: str  # "done", "failed: ...", "stopped ...", "left out ..."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    letters = "".join(stage.letter for stage in STAGES)
    lines = [f"  {stage.letter}  {stage.name:14}{stage.seconds:>4} s" for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measure on a GPU whatever only a GPU can tell.",
        epilog="stages, and what each takes on an H100:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--budget", type=float, help=f"seconds for all stages ({BUDGET:.0f})")
    parser.add_argument("--stages", default=letters, help=f"letters of the stages to run ({letters})")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="small models and few rounds, to try the program")
    parser.add_argument("--diffusers_script", type=Path, help="diffusers' train_dreambooth_lora.py, for stage e")
    args = parser.parse_args(argv)
    problems = [f"--stages: no stage {letter!r}, wanted some of {letters}" for letter in args.stages.strip(letters)]
    if not args.stages:
        problems.append(f"--stages: got none, wanted some of {letters}")
    if args.budget is None:
        args.budget = TINY_BUDGET if args.tiny else BUDGET
    if args.budget <= 0:
        problems.append(f"--budget: got {args.budget:g}, wanted seconds above 0")
    if args.diffusers_script and not args.diffusers_script.is_file():
        problems.append(f"--diffusers_script: no file {args.diffusers_script}")
    if args.out.exists() and not args.out.is_dir():
        problems.append(f"--out: {args.out} is a file, wanted a folder")
    if problems:
        parser.error("; ".join(problems))
    return args


def command_of(stage: Stage, args: argparse.Namespace, seconds: float) -> list[str]:
    words = [sys.executable, "-m", f"benchmarks.gpu.{stage.module}", "--output", str(args.out.resolve() / stage.file)]
    words += ["--seconds", f"{seconds:.1f}", "--device", args.device, *stage.extra]
    words += ["--tiny"] if args.tiny else []
    return words + (["--diffusers_script", str(args.diffusers_script.resolve())] if args.diffusers_script else [])


def stop(process: subprocess.Popen) -> None:
    """End a stage and every process that it started."""
    for signal_, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, signal_)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def follow(process: subprocess.Popen, tail: deque[str]) -> None:
    """Print what a stage says, and remember the end of it."""
    for line in process.stdout or ():
        print(line, end="", flush=True)
        tail.append(line.rstrip())


def run_stage(stage: Stage, args: argparse.Namespace, seconds: float, limit: float) -> Outcome:
    """Run one stage with a budget of `seconds`; it is ended after `limit`."""
    print(f"\n===== {stage.letter}  {stage.name}: {seconds:.0f} s, stopped after {limit:.0f} s", flush=True)
    began, tail = time.monotonic(), deque[str](maxlen=TAIL)
    process = subprocess.Popen(
        command_of(stage, args, seconds),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=follow, args=(process, tail), daemon=True)
    reader.start()
    status = "done"
    try:
        code = process.wait(limit)
        if code:
            said = next((line for line in reversed(tail) if line.strip()), "")
            status = f"failed with exit code {code}: {said[:150]}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    finally:
        stop(process)  # also what a stage that ended has left running
    reader.join(2)
    file = args.out / stage.file
    if status != "done" and not file.exists():
        note_failure(file, stage, status, tail)
    return Outcome(stage, time.monotonic() - began, status)


def note_failure(file: Path, stage: Stage, status: str, tail: deque[str]) -> None:
    """Write down why a stage has no results."""
    content = {"kind": "failed", "stage": stage.name, "status": status, "log": list(tail)}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def table(outcomes: list[Outcome], out: Path) -> str:
    """Return the stages, their outcomes, and the first lines of the results."""
    lines = [f"{'stage':20}{'seconds':>8}{'estimate':>10}   outcome"]
    for outcome in outcomes:
        stage = outcome.stage
        lines.append(f"{stage.letter}  {stage.name:17}{outcome.seconds:>8.0f}{stage.seconds:>10}   {outcome.status}")
    for file in dict.fromkeys(outcome.stage.file for outcome in outcomes):
        lines += ["", f"{file}:", *(f"    {line}" for line in read(out / file).get("summary", []))]
    return "\n".join(lines)


def main() -> int:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in STAGES if stage.letter in args.stages]
    for stage in chosen:
        (args.out / stage.file).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + args.budget
    outcomes: list[Outcome] = []
    try:
        for place, stage in enumerate(chosen):
            left = end - time.monotonic()
            if left < LEAST:
                outcomes.append(Outcome(stage, 0.0, "left out, the time is over"))
                continue
            share = left * stage.seconds / sum(later.seconds for later in chosen[place:])
            limit = min(left, 1.3 * share + 10)
            outcomes.append(run_stage(stage, args, max(1.0, min(share, limit - RESERVE)), limit))
    except KeyboardInterrupt:
        print("\ninterrupted", flush=True)
    print(f"\n{table(outcomes, args.out)}", flush=True)
    return 0 if [outcome.status for outcome in outcomes] == ["done"] * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
