"""The whole job in one command: teach the embedded pipeline a subject by LoRA and by ResLoRA, and look at both.

    python train_scripts/demo.py                      # four to five minutes on two CPU cores
    python train_scripts/demo.py --max_train_steps 20 # the same road in one minute, too short to learn anything

Three processes that share nothing but files:

    train_dreambooth_reslora.py --method lora      ->  demo/lora/pytorch_lora_weights.safetensors
    train_dreambooth_reslora.py --method reslora   ->  demo/reslora/pytorch_lora_weights.safetensors
    this one, with plain diffusers                 ->  demo/contact_sheet.png, demo/loss.png, demo/demo.json

Both runs see the same pictures, noise and timesteps in the same order and start from the same seed. One subject, one
seed and one learning rate show that the machinery works; they do not show that one method is better than the other.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKGROUNDS = ("blue", "yellow", "pink")
PLACEHOLDER = "sks"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", type=Path, default=ROOT / "assets" / "sticker-sd")
    parser.add_argument("--instance_data_dir", type=Path, default=ROOT / "assets" / "subjects" / "octopus")
    parser.add_argument("--class_noun", default="animal", help="what the subject is a kind of")
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--max_train_steps", type=int, default=400, help="optimizer steps of each run")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--shortcut", default="input", choices=("input", "block", "middle"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(args: argparse.Namespace, method: str) -> Path:
    """One DreamBooth run in a process of its own; returns its output folder."""
    folder = args.output_dir / method
    command = [sys.executable, ROOT / "train_scripts" / "train_dreambooth_reslora.py", f"--method={method}"]
    command += [f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}"]
    command += [f"--instance_data_dir={args.instance_data_dir}"]
    command += [f"--instance_prompt=a sticker of {PLACEHOLDER} {args.class_noun}"]
    command += ["--with_prior_preservation", f"--class_prompt=a sticker of {args.class_noun}"]
    command += [f"--class_data_dir={args.output_dir / 'class_images'}", "--num_class_images=40"]
    command += [f"--output_dir={folder}", f"--rank={args.rank}", f"--learning_rate={args.learning_rate}"]
    command += ["--train_text_encoder", "--train_batch_size=4", f"--max_train_steps={args.max_train_steps}"]
    command += [f"--resolution={64}", f"--seed={args.seed}", "--report_to=none"]
    command += [f"--shortcut={args.shortcut}"] if method == "reslora" else []
    print(f"\n--- {method}: {args.max_train_steps} steps", flush=True)
    subprocess.run([str(part) for part in command], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return folder


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    runs = {method: train(args, method) for method in ("lora", "reslora")}
    print(runs, time.monotonic() - started)


if __name__ == "__main__":
    main()
