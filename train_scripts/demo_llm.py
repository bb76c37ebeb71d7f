#!/usr/bin/env python
"""The language model's whole job in one command: teach a model a task that it cannot do, by LoRA and by ResLoRA.

    python train_scripts/demo_llm.py                      # the embedded model: three minutes on two idle CPU cores
    python train_scripts/demo_llm.py --num_train_epochs 1 # the same road, too short to learn much
    python train_scripts/demo_llm.py --model smollm2      # SmolLM2-135M-Instruct learns to spell backward

Processes that share nothing but files; the two runs side by side, each on half of the cores:

    train_llm_reslora.py --method lora      ->  demo/llm/lora/adapter_model.safetensors
    train_llm_reslora.py --method reslora   ->  demo/llm/reslora/adapter_model.safetensors
    answer_with_peft.py, without our code   ->  demo/llm/{lora,reslora}/reloaded.jsonl, demo/llm/base.jsonl

and from those demo/llm/comparison.png and demo/llm/demo.json. Both runs have the same number of trained parameters, see
the same problems in the same order and start from the same seed. One task, one seed and one learning rate show that the
machinery works; they do not show that one method is better than the other.
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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reslora_diffusion.llm.records import Row, choose, read_json_lines
from reslora_diffusion.llm.tasks import TASKS, Task
from reslora_diffusion.utils.files import atomic_write
from reslora_diffusion.utils.problems import printable, run_program

if TYPE_CHECKING:  # what needs torch is imported where it is used: `--help` should answer at once
    from reslora_diffusion.llm.generation import Generations

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"LoRA": "lora", "ResLoRA": "reslora"}
DEMOS: dict[str, dict[str, Any]] = {  # settings by model; those of a name in `--help` can be given
    "tiny": {
        "model_name_or_path": ROOT / "assets" / "tiny-llm",
        "dataset_name": ROOT / "assets" / "tiny-llm" / "word_problems",
        "task": "svamp",
        "max_new_tokens": 40,
        "output_dir": Path("demo", "llm"),
        "num_train_epochs": 6,
        "learning_rate": 3e-3,
        "rank": 4,
        "dtype": "float32",
        "train_batch": 16,
        "eval_batch": 125,
    },
    "smollm2": {
        "output_dir": Path("demo", "smollm2"),
        "task": "answers",
        "max_new_tokens": 16,
        "num_train_epochs": 1,
        "learning_rate": 2e-3,
        "rank": 8,
        "max_eval_examples": 100,
        "dtype": "bfloat16",
        "train_batch": 8,
        "eval_batch": 50,
    },
}
SHOWN = 3  # problems whose answers are printed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=tuple(DEMOS), help="the embedded one, or SmolLM2-135M")
    parser.add_argument("--model_name_or_path", type=Path, help="another model, trained by the settings of --model")
    parser.add_argument("--dataset_name", type=Path, help="a folder with train, validation and test.jsonl")
    parser.add_argument("--output_dir", type=Path, help="default: demo/llm, or demo/smollm2")
    parser.add_argument("--num_train_epochs", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--max_train_examples", type=int)
    parser.add_argument("--max_eval_examples", type=int, help="problems to validate on, and to test on")
    parser.add_argument("--shortcut", default="block", choices=("input", "block", "middle"))
    parser.add_argument("--num_previous", default="1", help="layers a shortcut reaches back to, or all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, value in DEMOS[args.model].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def start(script: str, words: Sequence[object], share: int = 1) -> subprocess.Popen:
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
    words = [f"--method={method}", f"--model_name_or_path={args.model_name_or_path}", f"--task={args.task}"]
    words += [f"--dataset_name={args.dataset_name}", f"--output_dir={folder}", f"--seed={args.seed}"]
    words += [f"--rank={args.rank}", "--target_modules=all-linear", f"--learning_rate={args.learning_rate}"]
    words += [f"--num_train_epochs={args.num_train_epochs}", f"--per_device_train_batch_size={args.train_batch}"]
    words += [f"--{n}={getattr(args, n)}" for n in ("max_train_examples", "max_eval_examples") if getattr(args, n)]
    words += [
        f"--dtype={args.dtype}",
        f"--per_device_eval_batch_size={args.eval_batch}",
        f"--max_new_tokens={args.max_new_tokens}",
        "--export_dtype=float32",
        "--disable_tqdm=true",
    ]
    words += ["--dataloader_pin_memory=false", "--eval_base=false"]
    if method == "reslora":
        words += [f"--shortcut={args.shortcut}", f"--num_previous={args.num_previous}"]
    return start("train_llm_reslora.py", words, share=len(RUNS))


def write_questions(args: argparse.Namespace) -> Sequence[Row]:
    """The test problems without their answers, for a program that does not know the task; returns the rows, which are
    those that the runs choose."""
    rows = choose(read_json_lines(args.dataset_name / "test.jsonl"), args.max_eval_examples, args.seed)
    lines = [json.dumps({"messages": TASKS[args.task].messages(row)[:1]}) for row in rows]
    (args.output_dir / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def ask(args: argparse.Namespace, adapter: Path | None, output: Path, share: int = 1) -> subprocess.Popen:
    """Plain PEFT answers the questions with an exported folder; without one, transformers does."""
    words = [f"--model_name_or_path={args.model_name_or_path}", f"--adapter={adapter or 'none'}"]
    words += [f"--questions={args.output_dir / 'questions.jsonl'}", f"--output={output}"]
    words += [f"--batch_size={args.eval_batch}", f"--max_new_tokens={args.max_new_tokens}"]
    return start("answer_with_peft.py", words, share)


def responses_in(path: Path) -> list[str]:
    return [row["response"] for row in read_json_lines(path)]


def judged(task: Task, responses: list[str], rows: Sequence[Row]) -> "Generations":
    from reslora_diffusion.llm.generation import Generations

    return Generations(responses, [task.read(text) for text in responses], [task.answer(row) for row in rows])


def show_answers(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """The first few problems, and what the base and both exports say."""
    files = {"base": args.output_dir / "base.jsonl"}
    files |= {label: args.output_dir / method / "reloaded.jsonl" for label, method in RUNS.items()}
    task = TASKS[args.task]
    said = {label: responses_in(path) for label, path in files.items()}
    for number, row in enumerate(rows[:SHOWN]):
        print(f"\n{task.ask(row)}\n  wanted   {task.answer(row)}")
        for label, responses in said.items():
            print(f"  {label:8} {printable(responses[number])}")


def draw(args: argparse.Namespace, figures: dict[str, Any], path: Path) -> None:
    """Left: loss in training and on validation rows. Right: exact match on validation rows, and on test at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, match = figure.subplots(1, 2)
    for number, (label, method) in enumerate(RUNS.items()):
        rows = json.loads((args.output_dir / method / "history.json").read_text(encoding="utf-8"))
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
    if args.model_name_or_path is None:
        from smollm2 import smollm2

        args.model_name_or_path = smollm2()
    if args.dataset_name is None:
        from smollm2 import write_words

        args.dataset_name = write_words(args.output_dir / "problems")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    figures: dict[str, Any] = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "runs": {},
    }
    rows = write_questions(args)
    follow({label: train(args, method) for label, method in RUNS.items()})
    folders = {method: args.output_dir / method for method in RUNS.values()}
    follow({m: ask(args, folder, folder / "reloaded.jsonl", len(RUNS)) for m, folder in folders.items()})
    follow({"base": ask(args, None, args.output_dir / "base.jsonl")})
    task = TASKS[args.task]
    base = judged(task, responses_in(args.output_dir / "base.jsonl"), rows)
    figures |= {"base_exact_match": base.exact_match, "base_text": str(base)}
    for label, method in RUNS.items():
        folder = folders[method]
        found = judged(task, responses_in(folder / "reloaded.jsonl"), rows)
        recorded = responses_in(folder / "predictions.jsonl")
        same = sum(a == b for a, b in zip(found.responses, recorded, strict=True))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        figures["runs"][label] = {
            "exact_match": found.exact_match,
            "text": str(found),
            "same_responses_after_reload": f"{same} of {len(rows)}",
            "as_trained": results["exact_match"].get("as trained"),
            "best_step": results["best_step"],
            "exported_rank": json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"],
            "trained_parameters": json.loads((folder / "run.json").read_text(encoding="utf-8"))["trained_parameters"],
        }
    figures["seconds"] = round(time.monotonic() - started, 1)
    from reslora_diffusion.llm.results import write_json

    write_json(args.output_dir / "demo.json", figures)
    draw(args, figures, args.output_dir / "comparison.png")
    print(f"\nexact match on the test problems, by plain PEFT from the exported folders ({figures['seconds']:.0f} s):")
    print(f"  base     {figures['base_text']}")
    for label, run in figures["runs"].items():
        print(f"  {label:8} {run['text']}, rank {run['exported_rank']}")
        print(f"           same responses as before the export: {run['same_responses_after_reload']}")
    show_answers(args, rows)
    print(f"\ncurves: {args.output_dir / 'comparison.png'}\nfigures: {args.output_dir / 'demo.json'}")


if __name__ == "__main__":
    sys.exit(run_program(main))
