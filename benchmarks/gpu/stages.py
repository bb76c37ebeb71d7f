"""The stages, what each is expected to take, and the options that they share."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESERVE = 5  # seconds that a stage leaves unused of what it is given


@dataclass(frozen=True)
class Stage:
    """One stage: `python -m benchmarks.gpu.<module>` writes `file`."""

    letter: str
    name: str
    module: str
    file: str
    seconds: int  # estimate on an H100 with defaults; time is divided in proportion to these
    what: str
    extra: tuple[str, ...] = ()


STAGES = (
    Stage("a", "machine", "machine", "machine.json", 15, "bandwidth, matrix products, launches"),
    Stage("b", "correctness", "correctness", "correctness.json", 110, "`pytest -m gpu`, every kernel against float64"),
    Stage("c", "images", "steps", "step-cuda.json", 150, "a step of SD1.5 and SDXL", ("--subjects", "images")),
    Stage("d", "language", "steps", "step-cuda.json", 45, "a step of a 1B Llama", ("--subjects", "language")),
    Stage("e", "run", "run", "run-cuda.json", 80, "a whole DreamBooth run"),
    Stage("f", "kernels", "kernels", "kernels-cuda.json", 45, "each kernel and memory-saving form by itself"),
    Stage("g", "pretraining", "pretraining", "pretraining.json", 35, "more training of the embedded pipeline"),
)


def stage_args(description: str | None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The options of a stage; `parser` has those that it does not share with the others."""
    parser = parser or argparse.ArgumentParser()
    parser.description = (description or "").splitlines()[0]
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the stage may take")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="small models and few rounds, to try the program")
    parser.add_argument("--diffusers_script", type=Path, help="diffusers' train_dreambooth_lora.py")
    args = parser.parse_args()
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: this machine has no CUDA device, or torch was installed without CUDA")
    return args


def environment() -> dict[str, str]:
    """The environment of a process that uses this repository without installing it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    return os.environ | quiet | {"PYTHONPATH": path}


def reason(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
