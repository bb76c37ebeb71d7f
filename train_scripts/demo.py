#!/usr/bin/env python
"""The whole job in one command: teach the embedded pipeline a subject by LoRA and by ResLoRA, and look at both.

    python train_scripts/demo.py                      # two to three minutes on two CPU cores
    python train_scripts/demo.py --max_train_steps 20 # the same road in a minute, too short to learn much

Three processes that share nothing but files:

    train_dreambooth_reslora.py --method lora      ->  demo/lora/pytorch_lora_weights.safetensors, samples/
    train_dreambooth_reslora.py --method reslora   ->  demo/reslora/pytorch_lora_weights.safetensors, samples/
    generate.py, plain diffusers                   ->  demo/images/

and from those demo/contact_sheet.png, demo/loss.png and demo/demo.json. Both runs see the same images, noise and
timesteps in the same order and start from the same seed. One subject, one seed and one learning rate show that the
machinery works; they do not show that one method is better than the other.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reslora_diffusion.choices import GUIDANCE
from reslora_diffusion.diffusion.data.scan import open_upright, scan
from reslora_diffusion.diffusion.train.sheet import contact_sheet
from reslora_diffusion.rules import ShortcutFields

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"LoRA": "lora", "ResLoRA": "reslora"}
BACKGROUNDS = ("blue", "yellow", "pink")
SEEDS = (0, 1)
WATCHED, LOOKS = 2, 5  # validation prompts of a run, and how often after the first time
TRAINING_IMAGES = "training images"
SHOWN, SMALL = 6, 76  # training images on the sheet, and pixels of their side


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", type=Path, default=ROOT / "assets" / "sticker-sd")
    parser.add_argument("--instance_data_dir", type=Path, default=ROOT / "assets" / "subjects" / "panda")
    parser.add_argument("--class_noun", default="animal", help="what the subject is a kind of")
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--max_train_steps", type=int, default=400, help="optimizer steps of each run")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shortcut", default=str(ShortcutFields.shortcut), choices=("input", "block", "middle"))
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def call(script: str, words: Sequence[object]) -> None:
    """Run a script beside this one in a process of its own; leave with its exit code if it fails."""
    command = [sys.executable, ROOT / "train_scripts" / script, *words]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([str(word) for word in command], env=os.environ | quiet)
    if done.returncode:
        sys.exit(done.returncode)


def train(args: argparse.Namespace, method: str) -> float:
    """One DreamBooth run; returns its seconds."""
    folder, steps, started = args.output_dir / method, args.max_train_steps, time.monotonic()
    if (folder / "run.json").is_file():
        shutil.rmtree(folder)
    words = [f"--method={method}", f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}"]
    words += [f"--instance_data_dir={args.instance_data_dir}", f"--instance_prompt={instance_prompt(args)}"]
    words += ["--with_prior_preservation", f"--class_prompt=a sticker of {article(args.class_noun)}"]
    words += [f"--class_data_dir={args.output_dir / 'class_images'}", f"--num_class_images={min(40, 2 * steps)}"]
    words += [f"--output_dir={folder}", f"--rank={args.rank}", f"--learning_rate={args.learning_rate}"]
    words += ["--train_text_encoder", "--train_batch_size=4", f"--max_train_steps={steps}", "--resolution=64"]
    words += [f"--validation_guidance_scale={args.guidance_scale}", f"--seed={args.seed}", "--report_to=none"]
    words += [f"--validation_steps={max(1, steps // LOOKS)}", f"--checkpointing_steps={steps + 1}"]
    words += ["--validation_prompt", *prompts(args)[:WATCHED], "--num_validation_images=1"]
    if method == "reslora":
        words += [f"--shortcut={args.shortcut}"]
        words += [f"--distillation_steps={min(100, steps)}"] if args.shortcut != "block" else []  # block merges exactly
    print(f"\n--- {method}: {steps} steps", flush=True)
    call("train_dreambooth_reslora.py", words)
    return round(time.monotonic() - started, 1)


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def instance_prompt(args: argparse.Namespace) -> str:
    return f"a sticker of sks {args.class_noun}"


def prompts(args: argparse.Namespace) -> list[str]:
    return [f"{instance_prompt(args)} on a {colour} background" for colour in BACKGROUNDS]


def generate(args: argparse.Namespace) -> float:
    """Every prompt from every seed, by the base and with each exported file; returns its seconds."""
    started = time.monotonic()
    shutil.rmtree(args.output_dir / "images", ignore_errors=True)
    words = [f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}", "--prompt", *prompts(args)]
    words += ["--seed", *map(str, SEEDS), f"--guidance_scale={args.guidance_scale}", "--resolution=64"]
    words += ["--lora", *(f"{label}={args.output_dir / method}" for label, method in RUNS.items())]
    print("\n--- generating images with the exported files", flush=True)
    call("generate.py", [*words, f"--output_dir={args.output_dir / 'images'}"])
    return round(time.monotonic() - started, 1)


def draw_sheet(args: argparse.Namespace) -> Path:
    """The training images in a line, which belong to no prompt. Below, rows of prompt and seed, in columns base, LoRA,
    ResLoRA."""
    rows = [f"{prompt}, seed {seed}" for prompt in prompts(args) for seed in SEEDS]
    names = [f"{n}-{seed}.png" for n in range(len(BACKGROUNDS)) for seed in SEEDS]
    subject = [open_upright(image.path) for image in scan(args.instance_data_dir).images]
    columns = {label: [args.output_dir / "images" / label / name for name in names] for label in ("base", *RUNS)}
    line = contact_sheet({" " * n: [image] for n, image in enumerate(subject[:SHOWN])}, [TRAINING_IMAGES], side=SMALL)
    below = contact_sheet(columns, rows)
    sheet = Image.new("RGB", (max(line.width, below.width), line.height + below.height), "white")
    sheet.paste(line, (0, 0))
    sheet.paste(below, (0, line.height))
    path = args.output_dir / "contact_sheet.png"
    sheet.save(path)
    return path


def draw_losses(args: argparse.Namespace) -> Path:
    from reslora_diffusion.diffusion.train.history import plot_losses, read_history

    path = args.output_dir / "loss.png"
    plot_losses({label: read_history(args.output_dir / method) for label, method in RUNS.items()}, path)
    return path


def write_figures(args: argparse.Namespace, seconds: dict[str, float]) -> Path:
    """Every setting and figure of the demo and of both runs."""
    figures: dict[str, Any] = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "prompts": prompts(args),
        "seeds": SEEDS,
        "seconds": seconds,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "runs": {},
    }
    for label, method in RUNS.items():
        folder = args.output_dir / method
        parts = {
            name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("run", "merge_report", "export_report")
        }
        del parts["merge_report"]["output_errors"], parts["export_report"]["modules"]
        figures["runs"][label] = {"weights": str(folder / "pytorch_lora_weights.safetensors"), **parts}
    path = args.output_dir / "demo.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return path


def main(args: argparse.Namespace) -> None:
    seconds = {method: train(args, method) for method in RUNS.values()}
    seconds["generating"] = generate(args)
    sheet, losses, figures = draw_sheet(args), draw_losses(args), write_figures(args, seconds)
    weights = " and ".join(str(args.output_dir / method) for method in RUNS.values())
    print(f"\n{sheet}: {instance_prompt(args)!r} by the base, LoRA and ResLoRA, generated by plain diffusers")
    print(f"{losses}: the loss of both runs, on the same images, noise and timesteps")
    print(f"{figures}: every setting and figure; the LoRA files are in {weights}")


if __name__ == "__main__":
    main(parse_args())
