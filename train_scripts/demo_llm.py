#!/usr/bin/env python
"""The language model's whole job in one command: teach the embedded model new word problems by LoRA and by ResLoRA.

    python train_scripts/demo_llm.py                      # three minutes on two CPU cores, five on busy ones
    python train_scripts/demo_llm.py --num_train_epochs 1 # the same road, too short to learn much

Processes that share nothing but files; the two runs side by side, each on half of the cores:

    train_llm_reslora.py --method lora      ->  demo/llm/lora/adapter_model.safetensors
    train_llm_reslora.py --method reslora   ->  demo/llm/reslora/adapter_model.safetensors
    answer_with_peft.py, without our code   ->  demo/llm/{lora,reslora}/reloaded.jsonl

and from those demo/llm/comparison.png and demo/llm/demo.json. Both runs see the same problems in the same order and
start from the same seed. One task, one seed and one learning rate show that the machinery works; they do not show that
one method is better than the other.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reslora_diffusion.llm.records import read_json_lines
from reslora_diffusion.llm.tasks import TASKS
from reslora_diffusion.utils.files import atomic_write

if TYPE_CHECKING:  # what needs torch is imported where it is used: `--help` should answer at once
    from reslora_diffusion.llm.generation import Generations

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"LoRA": "lora", "ResLoRA": "reslora"}
TASK = TASKS["svamp"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", type=Path, default=ROOT / "assets" / "tiny-llm")
    parser.add_argument("--dataset_name", type=Path, default=ROOT / "assets" / "tiny-llm" / "word_problems")
    parser.add_argument("--output_dir", type=Path, default=Path("demo") / "llm")
    parser.add_argument("--num_train_epochs", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--shortcut", default="block", choices=("input", "block", "middle"))
    parser.add_argument("--num_previous", default="1", help="layers a shortcut reaches back to, or all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def start(script: str, words: list[object], share: int = 1) -> subprocess.Popen:
    """Run a script beside this one in a process of its own, on one of `share` parts of the cores."""
    command = [sys.executable, "-u", ROOT / "train_scripts" / script, *words]
    threads = str(max(1, (os.cpu_count() or 1) // share))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [str(word) for word in command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def follow(processes: dict[str, subprocess.Popen]) -> None:
    """Print what the processes say, line by line under their names; leave with the exit code of one that fails."""

    def show(label: str, process: subprocess.Popen) -> None:
        for line in process.stdout or ():
            if line.strip() and "Loading weights" not in line:
                print(f"{label:8}| {line}", end="", flush=True)

    readers = [threading.Thread(target=show, args=item) for item in processes.items()]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    if codes := [code for process in processes.values() if (code := process.wait())]:
        sys.exit(codes[0])


def train(args: argparse.Namespace, method: str) -> subprocess.Popen:
    folder = args.output_dir / method
    if (folder / "run.json").is_file():
        shutil.rmtree(folder)
    words = [f"--method={method}", f"--model_name_or_path={args.model_name_or_path}", "--task=svamp"]
    words += [f"--dataset_name={args.dataset_name}", f"--output_dir={folder}", f"--seed={args.seed}"]
    words += [f"--rank={args.rank}", "--target_modules=all-linear", f"--learning_rate={args.learning_rate}"]
    words += [f"--num_train_epochs={args.num_train_epochs}", "--per_device_train_batch_size=16"]
    words += [
        "--per_device_eval_batch_size=125",
        "--max_new_tokens=40",
        "--export_dtype=float32",
        "--disable_tqdm=true",
    ]
    words += ["--dataloader_pin_memory=false", f"--eval_base={method == 'lora'}"]
    if method == "reslora":
        words += [f"--shortcut={args.shortcut}", f"--num_previous={args.num_previous}"]
    return start("train_llm_reslora.py", words, share=len(RUNS))


def write_questions(args: argparse.Namespace) -> list[dict]:
    """The test problems without their answers, for a program that does not know the task; returns the rows."""
    rows = read_json_lines(args.dataset_name / "test.jsonl")
    lines = [json.dumps({"messages": TASK.messages(row)[:1]}) for row in rows]
    (args.output_dir / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return rows


def reload(args: argparse.Namespace, method: str) -> subprocess.Popen:
    """Plain PEFT answers the questions with the exported folder."""
    folder = args.output_dir / method
    words = [f"--model_name_or_path={args.model_name_or_path}", f"--adapter={folder}"]
    words += [f"--questions={args.output_dir / 'questions.jsonl'}", f"--output={folder / 'reloaded.jsonl'}"]
    return start("answer_with_peft.py", words, share=len(RUNS))


def answers(folder: Path, rows: list[dict]) -> tuple["Generations", int]:
    """`(what plain PEFT answered, how many responses are the same as the run's own)`."""
    from reslora_diffusion.llm.generation import Generations

    responses = [row["response"] for row in read_json_lines(folder / "reloaded.jsonl")]
    recorded = [row["response"] for row in read_json_lines(folder / "predictions.jsonl")]
    same = sum(a == b for a, b in zip(responses, recorded, strict=True))
    return Generations(responses, [TASK.read(text) for text in responses], [TASK.answer(row) for row in rows]), same


def draw(args: argparse.Namespace, figures: dict[str, Any], path: Path) -> None:
    """Left: loss in training and on validation rows. Right: exact match on validation rows, and on test at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, match = figure.subplots(1, 2)
    for number, (label, method) in enumerate(RUNS.items()):
        rows = json.loads((args.output_dir / method / "history.json").read_text())
        trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        checked = [(row["step"], row["eval_loss"], row["eval_exact_match"]) for row in rows if "eval_loss" in row]
        color = f"C{number}"
        loss.plot(*zip(*trained, strict=True), color=color, alpha=0.5, label=f"{label}, training")
        steps, losses, matches = zip(*checked, strict=True)
        loss.plot(steps, losses, color=color, marker="o", linestyle="--", label=f"{label}, validation")
        match.plot(steps, matches, color=color, marker="o", label=f"{label}, validation")
        test = figures["runs"][label]["exact_match"]
        match.axhline(test, color=color, linestyle=":", label=f"{label}, test, exported: {test:.1%}")
    base = figures["base_exact_match"]
    match.axhline(base, color="gray", linestyle=":", label=f"base, test: {base:.1%}")
    loss.set(xlabel="step", ylabel="loss per token", yscale="log")
    match.set(xlabel="step", ylabel="exact match of generated answers", ylim=(0, 1))
    for axes in (loss, match):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic_write(path) as fresh:
        figure.savefig(fresh, dpi=120, format="png")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    figures: dict[str, Any] = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "runs": {},
    }
    rows = write_questions(args)
    follow({label: train(args, method) for label, method in RUNS.items()})
    follow({label: reload(args, method) for label, method in RUNS.items()})
    for label, method in RUNS.items():
        folder = args.output_dir / method
        found, same = answers(folder, rows)
        results = json.loads((folder / "results.json").read_text())
        figures["runs"][label] = {
            "exact_match": found.exact_match,
            "text": str(found),
            "same_responses_after_reload": f"{same} of {len(rows)}",
            "as_trained": results["exact_match"].get("as trained"),
            "best_step": results["best_step"],
            "exported_rank": json.loads((folder / "adapter_config.json").read_text())["r"],
            "trained_parameters": json.loads((folder / "run.json").read_text())["trained_parameters"],
        }
        figures.setdefault("base_exact_match", results["exact_match"].get("base"))
    figures["seconds"] = round(time.monotonic() - started, 1)
    from reslora_diffusion.llm.results import write_json

    write_json(args.output_dir / "demo.json", figures)
    draw(args, figures, args.output_dir / "comparison.png")
    print(f"\nexact match on the test problems, by plain PEFT from the exported folders ({figures['seconds']:.0f} s):")
    print(f"  base     {figures['base_exact_match']:.1%}")
    for label, run in figures["runs"].items():
        print(f"  {label:8} {run['text']}, rank {run['exported_rank']}")
        print(f"           same responses as before the export: {run['same_responses_after_reload']}")
    print(f"curves: {args.output_dir / 'comparison.png'}\nfigures: {args.output_dir / 'demo.json'}")


if __name__ == "__main__":
    main()
