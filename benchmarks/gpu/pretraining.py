"""Stage g: more training of the embedded pipeline, as long as there is time (pretrain_sticker_pipeline.py).

A few steps tell how many fit. Then UNet and text encoder train on from the weights in `assets/sticker-sd`, and the
judge of the recipe says what became of them. `sticker-sd.tar`, beside the result file, holds whatever differs from the
embedded pipeline:

    tar -xf sticker-sd.tar -C assets/sticker-sd        # if the figures are better

Training images are drawn with the font Noto Color Emoji, from the system or from ~/.local/share/fonts.
"""

import argparse
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from ..results import write_results
from .stages import RESERVE, ROOT, stage_args

PIPELINE = ROOT / "assets" / "sticker-sd"
CHANGED = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "evaluation.json",
    "contact_sheet.png",
    "reconstructions.png",
)
PROBE = 20  # steps that tell how long a step takes
EVALUATION = 20  # seconds for generating and judging images
FIGURES = ("right_subject", "right_background")


def options(args: argparse.Namespace, work_dir: Path, steps: int) -> list[str]:
    """The command line of the recipe."""
    given = {
        "start_from": PIPELINE,
        "work_dir": work_dir,
        "output_dir": work_dir / "sticker-sd",
        "device": args.device,
        "placements": 1 if args.tiny else 12,
        "unet_batch_size": 4 if args.tiny else 256,
        "unet_learning_rate": 3e-4,
        "unet_steps": steps,
        "checkpointing_minutes": 1e6,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def train(args: argparse.Namespace, folder: Path, until: float) -> tuple[int, float, Path]:
    """Train as many steps as fit.

    Returns:
        Their number, 0 if none fit; the seconds of a step; the folder of the pipeline.
    """
    sys.path.insert(0, str(ROOT / "train_scripts"))
    from transformers import CLIPTokenizer

    import pretrain_sticker_pipeline as recipe

    recipe.main([*options(args, folder, 1), "--until", "latents"])
    parts = CLIPTokenizer.from_pretrained(folder / "tokenizer"), folder / "vae", folder / "latents.safetensors"

    def run(work_dir: Path, steps: int) -> float:
        return recipe.train_unet(recipe.parse_args(options(args, work_dir, steps)), *parts)

    steps = 2
    if not args.tiny:
        began = time.monotonic()
        seconds = run(folder / "probe", PROBE)
        besides = time.monotonic() - began - PROBE * seconds
        steps = int((until - EVALUATION - besides - time.monotonic()) / seconds)
        print(f"{steps} steps of {seconds:.3f} s fit", flush=True)
        if steps < PROBE:
            return 0, seconds, folder / "sticker-sd"
    seconds = run(folder, steps)
    if not args.tiny:
        recipe.evaluate(folder / "sticker-sd", args.device)
    return steps, seconds, folder / "sticker-sd"


def pack(pipeline: Path, file: Path) -> None:
    """Write an archive of what differs from the embedded pipeline."""
    with tarfile.open(file, "w") as archive:
        for name in CHANGED:
            if (pipeline / name).exists():
                archive.add(pipeline / name, name)


def main() -> None:
    args = stage_args(__doc__)
    until = time.monotonic() + args.seconds - RESERVE
    before = json.loads((PIPELINE / "evaluation.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        steps, seconds, pipeline = train(args, Path(folder), until)
        found = {"steps": steps, "seconds_per_step": seconds, "before": {name: before[name] for name in FIGURES}}
        summary = [f"{steps} steps of {1000 * seconds:.1f} ms" if steps else "no time was left to train"]
        if (pipeline / "evaluation.json").exists():
            after = json.loads((pipeline / "evaluation.json").read_text(encoding="utf-8"))
            found["after"] = {name: after[name] for name in FIGURES}
            summary += [f"{name}: {before[name]:.1%} before, {after[name]:.1%} after" for name in FIGURES]
        if steps:
            pack(pipeline, args.output.with_name("sticker-sd.tar"))
    write_results(args.output, "pretraining", found, summary=summary)


if __name__ == "__main__":
    main()
