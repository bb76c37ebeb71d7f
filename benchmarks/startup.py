"""How soon the commands answer: help, a look at a file, and bad input. Aim: 1.5 s on two cores.

    python -m benchmarks.startup [--repeats 5]

Of every command the least of its repeats, by the clock and in processor time (which a busy machine does not change).
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
SCRIPTS = ("train_dreambooth_reslora", "train_llm_reslora")
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


def commands(folder: Path) -> dict[str, list[str]]:
    cli = [sys.executable, "-m", "reslora_diffusion.cli"]
    missing = str(folder / "missing")
    found = {
        "reslora --help": [*cli, "--help"],
        "reslora inspect FILE": [*cli, "inspect", str(make_lora(folder))],
        "reslora inspect, no such file": [*cli, "inspect", missing],
        "reslora merge, no such file": [*cli, "merge", missing, str(folder / "out"), "--base", missing],
    }
    for script in SCRIPTS:
        program = [sys.executable, str(ROOT / "train_scripts" / f"{script}.py")]
        found[f"{script} --help"] = [*program, "--help"]
        found[f"{script}, unknown option"] = [*program, "--no_such_option"]
    wrong = ["--pretrained_model_name_or_path", missing, "--instance_data_dir", missing, "--instance_prompt", "a dog"]
    first = [sys.executable, str(ROOT / "train_scripts" / f"{SCRIPTS[0]}.py")]
    found[f"{SCRIPTS[0]}, no such folders"] = [*first, *wrong, "--output_dir", str(folder / "run")]
    return found


def measure(command: list[str], repeats: int) -> dict[str, float]:
    wall, cpu = [], []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for _ in range(repeats + 1):  # the first fills the caches of the system
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"seconds": min(wall[1:]), "processor_seconds": min(cpu[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default=FOLDER / "startup.json", help="result file")
    args = parser.parse_args()
    found = {}
    print(f"{'':46}{'seconds':>9}{'processor':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(Path(folder)).items():
            found[name] = measure(command, args.repeats)
            mark = "" if found[name]["processor_seconds"] <= AIM else "  over the aim"
            print(f"{name:46}{found[name]['seconds']:>9.2f}{found[name]['processor_seconds']:>11.2f}{mark}", flush=True)
    write_results(args.output, "startup", found, aim=AIM)


if __name__ == "__main__":
    main()
