#!/usr/bin/env python
"""Generate images of prompts by a pipeline, with and without LoRA files: plain diffusers, nothing of ours.

    python train_scripts/generate.py --pretrained_model_name_or_path assets/sticker-sd \\
        --lora LoRA=demo/lora ResLoRA=demo/reslora --prompt "a sticker of sks animal on a blue background" \\
        --seed 0 1 --output_dir images

    images/base/0-0.png, images/LoRA/0-0.png, ...     <label>/<number of the prompt>-<seed>.png

One pipeline is loaded once; each file is loaded under its label, and switched on alone. Every column of a comparison
starts from the same noise. New tokens that a LoRA was trained with (`<name>_emb.safetensors` beside it) are read in its
own column: there TOK in a prompt stands for them, and in all others it stays a word.
"""

import argparse
import json
import re
import warnings
from pathlib import Path
from typing import Any

BASE = "base"
OF_DIFFUSERS = "pytorch_lora_weights.safetensors"
EMBEDDINGS = "_emb.safetensors"
OLD_END = 2  # eos_token_id of CLIP in old configurations, with which a prompt's pooled vector ends at a new token


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


def embeddings_beside(lora: Path) -> Path | None:
    """The embeddings of new tokens that a LoRA was trained with: the only ones in its folder, or those of its name."""
    folder = lora.parent if lora.name == OF_DIFFUSERS else lora
    if folder.is_dir():
        found = [*folder.glob(f"*{EMBEDDINGS}")]
        return found[0] if len(found) == 1 else None
    beside = (lora.parent / f"{lora.stem}{EMBEDDINGS}", lora.parent.parent / f"{lora.stem}{EMBEDDINGS}")
    return next((path for path in beside if path.is_file()), None)


def load_new_tokens(pipe: Any, path: Path | None, number: int) -> dict[str, str]:
    """Teach a pipeline the tokens of LoRA `number`, whose names no other LoRA has; return them by what stands for them
    in a prompt."""
    if path is None:
        return {}
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    rows = load_file(path)
    count = len(next(iter(rows.values())))
    words = json.loads(header.get("reslora.tokens") or json.dumps({"TOK": [f"<s{n}>" for n in range(count)]}))
    own = {token: f"<{number}-{n}>" for n, token in enumerate(t for tokens in words.values() for t in tokens)}
    for end, clip in (("", "clip_l"), ("_2", "clip_g"), ("_3", "")):
        encoder, tokenizer = getattr(pipe, f"text_encoder{end}", None), getattr(pipe, f"tokenizer{end}", None)
        key = "t5" if type(encoder).__name__.startswith("T5") else clip
        if encoder is None or tokenizer is None or key not in rows:
            continue
        pipe.load_textual_inversion(rows[key], token=[*own.values()], text_encoder=encoder, tokenizer=tokenizer)
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == OLD_END:
                module.eos_token_id = tokenizer.eos_token_id
    return own | {word: "".join(own[token] for token in tokens) for word, tokens in words.items()}


def in_words(prompt: str, words: dict[str, str]) -> str:
    """A prompt with new tokens in place of what stands for them; of TOK and TOK2 the longer one is meant."""
    pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return re.sub(pattern, lambda found: words[found[0]], prompt) if words else prompt


def main(args: argparse.Namespace) -> None:
    import diffusers  # here, so that `--help` answers at once
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.loaders import TextualInversionLoaderMixin
    from tqdm import tqdm

    diffusers.utils.logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
    if not isinstance(pipe, TextualInversionLoaderMixin):  # that of Stable Diffusion 3 is none
        pipe = type(type(pipe).__name__, (type(pipe), TextualInversionLoaderMixin), {})(**pipe.components)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    # PEFT warns of a second adapter, which is what is wanted here.
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    guidance = {"guidance_scale": args.guidance_scale}
    if type(pipe).__name__ == "QwenImagePipeline":  # its guidance_scale is for models that take it as an input
        guidance = {"true_cfg_scale": args.guidance_scale, "negative_prompt": " "}
    words = {BASE: dict[str, str]()}
    for number, (label, path) in enumerate(args.lora.items()):
        pipe.load_lora_weights(path, adapter_name=label)
        words[label] = load_new_tokens(pipe, embeddings_beside(Path(path)), number)

    cells = [(label, n, seed) for label in (BASE, *args.lora) for n in range(len(args.prompt)) for seed in args.seed]
    for label, n, seed in tqdm(cells, desc="generating", unit="image"):
        if label == BASE and args.lora:
            pipe.disable_lora()
        elif label != BASE:
            pipe.enable_lora()
            pipe.set_adapters([label])
        image = pipe(
            prompt=in_words(args.prompt[n], words[label]),
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
