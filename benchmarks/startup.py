"""The time until commands answer: help, a look at a file, and bad input. The aim is 1.5 s on two cores.

    python -m benchmarks.startup [--repeats 3]

Of every command the least of its repeats, by the clock and in processor time (which a busy machine does not change).
Each must end as it should: with 0 if it was asked for help or to look, with 2 if its input is bad.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .results import FOLDER, write_results

ROOT = Path(__file__).resolve().parent.parent
MODEL, SUBJECT = ROOT / "assets" / "sticker-sd", ROOT / "assets" / "subjects" / "octopus"
AIM = 1.5


def make_lora(folder: Path) -> Path:
    """A LoRA of 128 layers, as of Stable Diffusion 1.5."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for layer in range(128):
        name = f"unet.down_blocks.0.attentions.{layer}.transformer_blocks.0.attn1.to_q"
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, 320)
        tensors[f"{name}.lora_B.weight"] = torch.randn(320, 8)
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, path)
    return path


def of_cli(lora: Path, missing: Path, taken: Path) -> dict[str, list[object]]:
    """Command lines of the `reslora` command."""
    out = missing / "out"
    return {
        "--help": ["--help"],
        "inspect FILE": ["inspect", lora],
        "inspect, no such file": ["inspect", missing],
        "verify, no such file": ["verify", missing],
        "verify, no such base": ["verify", lora, "--base", missing],
        "merge, no such file": ["merge", missing, out, "--base", MODEL],
        "merge, no such base": ["merge", lora, out, "--base", missing],
        "merge, a folder that is taken": ["merge", lora, taken, "--base", MODEL],
        "merge, another base": ["merge", lora, out, "--base", MODEL],
        "resize, no such file": ["resize", missing, "--rank", "4"],
        "resize, no rank": ["resize", lora, "--rank", "none"],
        "combine, too few weights": ["combine", lora, lora, "--weights", "1"],
        "convert, no such format": ["convert", lora, "--to", "webui"],
        "extract, no such model": ["extract", missing, MODEL, "--rank", "4"],
        "extract, models of two kinds": ["extract", MODEL, ROOT / "assets" / "tiny-llm", "--rank", "4"],
        "export, no such run": ["export", missing, out],
    }


def of_dreambooth(missing: Path, unreadable: Path) -> dict[str, list[object]]:
    """Command lines of the DreamBooth script: faults of words, of folders, of the model's shapes."""
    good = {"pretrained_model_name_or_path": MODEL, "instance_data_dir": SUBJECT, "instance_prompt": "a dog"}
    good |= {"resolution": 64, "output_dir": missing / "run"}

    def with_options(**options: object) -> list[object]:
        return [
            word
            for name, value in (good | options).items()
            for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
        ]

    return {
        "--help": ["--help"],
        "unknown option": [*with_options(), "--no_such_option"],
        "no number": with_options(rank="many"),
        "number out of range": with_options(learning_rate=0),
        "no such folders": with_options(pretrained_model_name_or_path=missing, instance_data_dir=missing),
        "unreadable image": with_options(instance_data_dir=unreadable),
        "no such optimizer": with_options(optimizer="none"),
        "no such checkpoint": with_options(resume_from_checkpoint="checkpoint-7"),
        "rank above the layers' width": with_options(rank=4000),
        "targets that are not there": with_options(target_modules=["to_qq", "conv_in"]),
        "pattern that matches nothing": with_options(rank_pattern=["nowhere=4"]),
        "size off the model's grid": with_options(resolution=8),
        "option of another family": with_options(weighting_scheme="mode"),
        "prompts above the model's length": with_options(tokenizer_max_length=1000),
        "all contenders of a race": with_options(compare=["lora", "reslora-input:rank=4000"]),
    }


def of_llm(missing: Path) -> dict[str, list[object]]:
    """Command lines of the scripts for language models."""
    model = ["--model_name_or_path", ROOT / "assets" / "tiny-llm"]
    return {
        "--help": ["--help"],
        "unknown option": ["--no_such_option", "1"],
        "no number": ["--learning_rate", "fast"],
        "no such model": ["--model_name_or_path", missing],
        "no such data": [*model, "--dataset_name", missing],
        "rank above the layers' width": [*model, "--rank", "4000", "--target_modules", "q_proj"],
        "texts above the model's length": [*model, "--max_length", "100000"],
        "options that contradict": ["--method", "lora", "--shortcut", "block"],
    }


def commands(folder: Path) -> dict[str, list[object]]:
    """Command lines by title."""
    lora, missing, taken, unreadable = make_lora(folder), folder / "missing", folder / "taken", folder / "images"
    for made in (taken, unreadable):
        made.mkdir()
        (made / "0.png").write_text("no image", encoding="utf-8")

    def script(name: str) -> list[object]:
        return [sys.executable, ROOT / "train_scripts" / f"{name}.py"]

    programs = {
        "reslora": ([sys.executable, "-m", "reslora_diffusion.cli"], of_cli(lora, missing, taken)),
        "train_dreambooth": (script("train_dreambooth_reslora"), of_dreambooth(missing, unreadable)),
        "train_llm": (script("train_llm_reslora"), of_llm(missing)),
        "train_glue": (script("train_glue_reslora"), of_llm(missing)),
        "reslora-compare": (
            [sys.executable, "-m", "app"],
            {"--help": ["--help"], "no such folder": ["--base", missing], "no such runs": ["--runs", missing]},
        ),
        **{
            name: (script(name), {"--help": ["--help"]})
            for name in ("demo", "demo_llm", "generate", "answer_with_peft")
        },
    }
    return {
        f"{name} {title}" if title.endswith(("--help", "FILE")) else f"{name}: {title}": [*program, *words]
        for name, (program, cases) in programs.items()
        for title, words in cases.items()
    }


def measure(command: list[object], wanted: int, repeats: int) -> dict[str, float]:
    wall, cpu = [], []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for _ in range(repeats + 1):  # the first fills the caches of the system
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
        wall.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode != wanted:
            sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}, wanted {wanted}:\n{done.stderr}")
    return {"seconds": min(wall[1:]), "processor_seconds": min(cpu[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=FOLDER / "startup.json", help="result file")
    args = parser.parse_args()
    found = {}
    print(f"{'':56}{'seconds':>9}{'processor':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(Path(folder)).items():
            wanted = 0 if name.endswith(("--help", "FILE")) else 2
            found[name] = measure(command, wanted, args.repeats)
            mark = "" if found[name]["processor_seconds"] <= AIM else "  over the aim"
            print(f"{name:56}{found[name]['seconds']:>9.2f}{found[name]['processor_seconds']:>11.2f}{mark}", flush=True)
    write_results(args.output, "startup", found, aim=AIM)


if __name__ == "__main__":
    main()
