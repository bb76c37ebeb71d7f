#!/usr/bin/env python
"""Generate images of prompts by a pipeline, with and without LoRA files: plain diffusers, nothing of ours.

    python train_scripts/generate.py --pretrained_model_name_or_path assets/sticker-sd \\
        --lora LoRA=demo/lora ResLoRA=demo/reslora --prompt "a sticker of sks animal on a blue background" \\
        --seed 0 1 --output_dir images

    images/base/0-0.png, images/LoRA/0-0.png, ...     <label>/<number of the prompt>-<seed>.png

One pipeline is loaded once; each file is loaded under its label, and switched on alone. Every column of a comparison
starts from the same noise.
"""

import argparse
import warnings
from pathlib import Path

BASE = "base"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--lora", nargs="*", default=[], metavar="LABEL=PATH", help="LoRA files, or folders of one")
    parser.add_argument("--prompt", nargs="+", required=True)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--resolution", type=int, help="height and width (default: the pipeline's own)")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    args.lora = dict(word.split("=", 1) for word in args.lora)
    return args


def main(args: argparse.Namespace) -> None:
    import diffusers  # here, so that `--help` answers at once
    import torch
    from diffusers import DiffusionPipeline
    from tqdm import tqdm

    diffusers.utils.logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    # PEFT warns of a second adapter, which is what is wanted here.
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    guidance = {"guidance_scale": args.guidance_scale}
    if type(pipe).__name__ == "QwenImagePipeline":  # its guidance_scale is for models that take it as an input
        guidance = {"true_cfg_scale": args.guidance_scale, "negative_prompt": " "}
    for label, path in args.lora.items():
        pipe.load_lora_weights(path, adapter_name=label)

    cells = [(label, n, seed) for label in (BASE, *args.lora) for n in range(len(args.prompt)) for seed in args.seed]
    for label, n, seed in tqdm(cells, desc="generating", unit="image"):
        if label == BASE and args.lora:
            pipe.disable_lora()
        elif label != BASE:
            pipe.enable_lora()
            pipe.set_adapters([label])
        image = pipe(
            prompt=args.prompt[n],
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.num_inference_steps,
            **guidance,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        path = args.output_dir / label / f"{n}-{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


if __name__ == "__main__":
    main(parse_args())
