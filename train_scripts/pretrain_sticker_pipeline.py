"""Train the sticker pipeline from nothing: the recipe behind the weights in `assets/sticker-sd/`.

    python train_scripts/pretrain_sticker_pipeline.py --work_dir runs/sticker-sd --output_dir assets/sticker-sd

Five stages, each resumable and each skipped when its result is there; `--until STAGE` stops after one:

    tokenizer   a byte-pair vocabulary in CLIP's format, from Unicode's emoji names and our captions
    vae         AutoencoderKL, 64 x 64 x 3 -> 8 x 8 x 32, on scenes of every emoji but the held-out ones
    latents     every subject on every background, drawn at random places and sizes, encoded once
    unet        UNet2DConditionModel and CLIPTextModel together: v-prediction, zero terminal SNR, EMA
    evaluate    the pipeline generates 96 subjects x 2 backgrounds; a judge that knows no network counts

A smoke run of everything on a CPU, in about a minute:

    python train_scripts/pretrain_sticker_pipeline.py --work_dir /tmp/stickers --output_dir /tmp/sticker-sd \
        --vae_steps 20 --unet_steps 20 --placements 1

`--start_from FOLDER` goes on from a finished pipeline: its tokenizer and autoencoder are used as they are, and UNet and
text encoder begin with its weights. With `--new_vae` the autoencoder is trained all the same, and the layers of the
UNet that read and write latents start anew. On a GPU the whole recipe runs there, and with `--start_from` some minutes
suffice:

    python train_scripts/pretrain_sticker_pipeline.py --start_from assets/sticker-sd --work_dir runs/more \
        --output_dir runs/more/sticker-sd --unet_steps 4000 --unet_batch_size 256 --unet_learning_rate 3e-4
"""

import argparse
import json
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTokenizer

from sticker_autoencoder import train_vae
from sticker_data import (
    BACKGROUNDS,
    LAYOUTS,
    SENTENCES,
    TEMPLATES,
    all_emoji,
    caption,
    draw_at_random,
    phrase,
    subjects,
    to_array,
)
from sticker_evaluation import evaluate, save_sheet
from sticker_models import StickerModel, make_pipeline, make_scheduler, make_tokenizer
from sticker_training import train

STAGES = ("tokenizer", "vae", "latents", "unet", "evaluate")
EMPTY_CAPTION_SHARE = 0.1  # what classifier-free guidance needs
CATEGORY_SHARE = 0.2  # "a sticker of an animal": what class prompts of prior preservation need; 0.1 gave 8 of 12
LAYOUT_SHARE = 0.25  # stickers with a size, a place or a second figure in their caption


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/sticker-sd"), help="checkpoints and caches")
    parser.add_argument("--output_dir", type=Path, default=Path("assets/sticker-sd"), help="the finished pipeline")
    parser.add_argument("--start_from", type=Path, help="a finished pipeline, whose UNet and text encoder train on")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument("--new_vae", action="store_true", help="with --start_from: train a new autoencoder")
    parser.add_argument("--vae_steps", type=int, default=2800, help="optimizer steps of the autoencoder")
    parser.add_argument("--vae_batch_size", type=int, default=16)
    parser.add_argument("--vae_learning_rate", type=float, default=3e-3, help="of Muon")
    parser.add_argument("--placements", type=int, default=40, help="drawings per subject and background colour")
    parser.add_argument("--unet_steps", type=int, default=16000, help="optimizer steps of UNet and text encoder")
    parser.add_argument("--unet_batch_size", type=int, default=64)
    parser.add_argument("--unet_learning_rate", type=float, default=7e-4)
    parser.add_argument("--checkpointing_minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.start_from and not (args.start_from / "model_index.json").is_file():
        parser.error(f"--start_from: {args.start_from} is no folder of a diffusers pipeline (model_index.json)")
    if args.new_vae and not args.start_from:
        parser.error("--new_vae: needs --start_from; without it the autoencoder is trained anyway")
    if args.start_from and args.start_from.resolve() == args.output_dir.resolve():
        parser.error(f"--output_dir: got the folder of --start_from, {args.output_dir}; wanted another one")
    return args


# ---------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(folder: Path) -> None:
    """A byte-pair vocabulary of Unicode's emoji names and our captions."""
    corpus = [unicodedata.name(emoji).lower() for emoji in all_emoji()]
    corpus += [caption(s.name, c, t) for s in subjects() for c in BACKGROUNDS for t in TEMPLATES]
    corpus += [caption(s.category, c, t) for s in subjects() for c in BACKGROUNDS for t in TEMPLATES[:1]]
    corpus += [caption(phrase(layout, s.name), "red") for s in subjects() for layout in LAYOUTS if layout != "pair"]
    make_tokenizer(folder, corpus)


# ---------------------------------------------------------------------------------------------- latents


def random_layout(rng: random.Random) -> str:
    return rng.choice([name for name in LAYOUTS if name != "plain"]) if rng.random() < LAYOUT_SHARE else "plain"


@torch.no_grad()
def cache_latents(args: argparse.Namespace, vae_folder: Path, file: Path) -> None:
    """Draw and encode the training set once: latents [N, C, 8, 8] in fp16; labels [N, 4], the numbers of subject,
    colour, layout and the other subject (-1 if there is none)."""
    vae = AutoencoderKL.from_pretrained(vae_folder).to(args.device).eval()
    every, colours, layouts = subjects(), list(BACKGROUNDS.values()), list(LAYOUTS)
    latents, labels = [], []
    for number, subject in enumerate(tqdm(every, desc="latents")):
        rng = random.Random(f"latents {args.seed} {number}")
        images = []
        for colour in range(len(colours)):
            for _ in range(args.placements):
                layout = random_layout(rng)
                other = rng.randrange(len(every)) if layout == "pair" else -1
                second = every[other].emoji if other >= 0 else ""
                images.append(to_array(draw_at_random(subject.emoji, colours[colour], rng, layout, second)))
                labels.append((number, colour, layouts.index(layout), other))
        for part in torch.from_numpy(np.stack(images)).split(64):
            pixels = part.float().to(args.device) / 127.5 - 1
            latents.append(vae.encode(pixels).latent_dist.mean.mul(vae.config.scaling_factor).half().cpu())
    save_file({"latents": torch.cat(latents).contiguous(), "labels": torch.tensor(labels)}, file)


# ---------------------------------------------------------------------------------------------- UNet and text encoder


def make_caption(rng: random.Random, subject: int, colour: int, layout: int, other: int) -> str:
    """A caption at random for a row of the labels."""
    if rng.random() < EMPTY_CAPTION_SHARE:
        return ""
    who, name = subjects()[subject], list(LAYOUTS)[layout]
    noun = who.category if rng.random() < CATEGORY_SHARE else who.name
    plain = name == "plain"
    what = noun if plain else phrase(name, noun, subjects()[other].name if other >= 0 else "")
    template = TEMPLATES[0] if rng.random() < 0.5 else rng.choice(TEMPLATES[1:] if plain else SENTENCES[1:])
    return caption(what, list(BACKGROUNDS)[colour], template)


def copy_finished_parts(pipeline: Path, work_dir: Path, names: tuple[str, ...] = ("tokenizer", "vae")) -> None:
    """Use parts of a finished pipeline, instead of training them."""
    for name in names:
        if not (work_dir / name).exists():
            shutil.copytree(pipeline / name, work_dir / name)


def train_unet(args: argparse.Namespace, tokenizer: CLIPTokenizer, vae_folder: Path, latents_file: Path) -> float:
    """Train and save the pipeline. Returns the seconds of a step."""
    vae = AutoencoderKL.from_pretrained(vae_folder).to(args.device).eval()
    model = StickerModel(tokenizer, vae.config.latent_channels)
    if args.start_from:
        print("starting anew:", *(model.load_weights(args.start_from) or ["nothing"]))
    model.to(args.device)
    scheduler = make_scheduler()
    cache = load_file(latents_file)
    latents, labels = cache["latents"], cache["labels"].tolist()
    captions: dict[str, list[int]] = {}

    def token_ids(text: str) -> list[int]:
        if text not in captions:
            captions[text] = tokenizer(text, padding="max_length", truncation=True).input_ids
        return captions[text]

    def step(index: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(f"unet {args.seed} {index}")
        rows = [rng.randrange(len(labels)) for _ in range(args.unet_batch_size)]
        texts = [make_caption(rng, *labels[row]) for row in rows]
        input_ids = torch.tensor([token_ids(text) for text in texts], device=args.device)
        clean = latents[rows].to(args.device, torch.float32)
        noise = torch.randn(clean.shape, generator=generator, device=args.device)
        timesteps = torch.randint(0, 1000, (len(rows),), generator=generator, device=args.device)
        target = scheduler.get_velocity(clean, noise, timesteps)
        return F.mse_loss(model(scheduler.add_noise(clean, noise, timesteps), timesteps, input_ids), target)

    def look(file: Path) -> None:
        save_sheet(make_pipeline(model, vae, tokenizer), file, rows=4)

    rate = args.unet_learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2)
    seconds = train(args, "unet", model, step, steps=args.unet_steps, optimizer=optimizer, look=look)
    make_pipeline(model.half(), vae.half(), tokenizer).save_pretrained(args.output_dir)
    # transformers loads in the dtype its configuration names, diffusers in fp32: half the disk, one dtype in memory.
    config = args.output_dir / "text_encoder" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}, indent=2) + "\n",
        encoding="utf-8",
    )
    return seconds


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer_folder, vae, latents = (args.work_dir / name for name in ("tokenizer", "vae", "latents.safetensors"))
    stages = STAGES[: STAGES.index(args.until) + 1]
    if args.start_from:
        copy_finished_parts(args.start_from, args.work_dir, ("tokenizer",) if args.new_vae else ("tokenizer", "vae"))
    if not tokenizer_folder.exists():
        train_tokenizer(tokenizer_folder)
    if "vae" in stages and not vae.exists():
        train_vae(args, vae)
    if "latents" in stages and not latents.exists():
        cache_latents(args, vae, latents)
    if "unet" in stages and not (args.output_dir / "model_index.json").exists():
        train_unet(args, CLIPTokenizer.from_pretrained(tokenizer_folder), vae, latents)
    if "evaluate" in stages:
        print(json.dumps(evaluate(args.output_dir, args.device), indent=2))


if __name__ == "__main__":
    main()
