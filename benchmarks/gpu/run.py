"""Stage e: a whole DreamBooth run of ours, launched kernel by kernel and as CUDA graphs, beside diffusers' script.

The pipeline has the shapes of Stable Diffusion 1.5 and random weights: what a step costs does not depend on them. Both
scripts run under `--mixed_precision bf16` (`benchmarks.run` says what is timed).
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..results import write_results
from ..run import OURS, THEIRS, ScriptFailed, figures, run_script
from .stages import RESERVE, ROOT, stage_args

SUBJECT = ROOT / "assets" / "subjects" / "octopus"
EMBEDDED = ROOT / "assets" / "sticker-sd"
STEPS, TINY_STEPS = 100, 4
ROUNDS = 3  # at most


def save_pipeline(folder: Path, device: torch.device) -> None:
    """A Stable Diffusion 1.5 with random weights in bf16; its tokenizer is the embedded one, of 77 tokens."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", model_max_length=77)
    kinds = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    with device:
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=kinds[0],
            up_block_types=kinds[1],
            layers_per_block=2,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)


def scripts(args: argparse.Namespace) -> dict[str, tuple[list[str], list[str]]]:
    """Each program by name, with the options that only it has; what matters most comes first."""
    ours = [sys.executable, "-m", "benchmarks.phases", str(OURS)]
    own = ["--shortcut", "block", "--report_to", "none"]
    found = {"reslora block": (ours, own)}
    if args.diffusers_script:
        found[THEIRS] = ([sys.executable, str(args.diffusers_script)], [])
    if args.device == "cuda":
        found["reslora block, CUDA graph"] = (ours, [*own, "--cuda_graph"])
    return found


def lines(found: dict[str, dict[str, Any]], left_out: dict[str, str]) -> list[str]:
    """One line for each script: the whole run, its steps by our own clock where there is one, and the ratio."""
    rows = []
    for name, values in found.items():
        ratio = f", {median(values['ratios']['seconds']):.2f} x diffusers" if "ratios" in values else ""
        steps = f", of these steps {values['phases']['steps']:.1f} s" if "phases" in values else ""
        rows.append(f"{name}: {values['seconds']:.1f} s{steps}{ratio}")
    return rows + [f"{name}: left out: {why}" for name, why in left_out.items()]


def compare(args: argparse.Namespace, options: argparse.Namespace, until: float) -> None:
    """Run the scripts in turn as long as a round fits, and write down after each run what is known."""
    rounds: list[dict[str, dict[str, Any]]] = []
    left_out: dict[str, str] = {}
    longest = 0.0
    while not rounds or (time.monotonic() + longest < until and len(rounds) < ROUNDS):
        began = time.monotonic()
        rounds.append({})
        for name, script in scripts(args).items():
            if name in left_out:
                continue
            try:
                rounds[-1][name] = run_script(*script, options, options.steps)
            except ScriptFailed as error:
                print(error, flush=True)
                left_out[name] = str(error).strip().splitlines()[-1]
                rounds = [{n: run for n, run in turn.items() if n != name} for turn in rounds]
            found = {n: figures(rounds, n) for n in rounds[0]}
            for values in found.values():
                if "phases" in values:
                    step = values["phases"]["steps"] / options.steps
                    values |= {"seconds_per_step": step, "seconds_besides": values["seconds"] - options.steps * step}
            facts = {name: getattr(options, name) for name in ("steps", "batch_size", "resolution")}
            facts |= {"turns": len(rounds), "left_out": left_out, "summary": lines(found, left_out)}
            write_results(args.output, "run", found, quiet=True, **facts)
            print(facts["summary"][-1], flush=True)
        longest = time.monotonic() - began
        if not rounds[0]:
            raise SystemExit("no script ran")
        if args.tiny:
            break


def main() -> None:
    args = stage_args(__doc__)
    warnings.filterwarnings("ignore")
    until = time.monotonic() + args.seconds - RESERVE
    with tempfile.TemporaryDirectory() as folder:
        model = EMBEDDED
        if not args.tiny:
            model = Path(folder) / "pipeline"
            save_pipeline(model, torch.device(args.device))
            torch.cuda.empty_cache()
        options = argparse.Namespace(
            model=str(model),
            data=str(SUBJECT),
            prompt="a photo of sks dog",
            resolution=64 if args.tiny else 512,
            batch_size=1,
            rank=16,
            steps=TINY_STEPS if args.tiny else STEPS,
            mixed_precision="bf16" if args.device == "cuda" else None,
        )
        compare(args, options, until)


if __name__ == "__main__":
    main()
