"""Train the sticker pipeline from nothing: the recipe behind the weights in `assets/sticker-sd/`.

    python train_scripts/pretrain_sticker_pipeline.py --work_dir runs/sticker-sd --output_dir assets/sticker-sd

Five stages, each resumable and each skipped when its result is there; `--until STAGE` stops after one:

    tokenizer   a byte-pair vocabulary in CLIP's format, from Unicode's emoji names and our captions
    vae         AutoencoderKL, 64 x 64 x 3 -> 8 x 8 x 16, on every emoji of the font but the held-out ones
    latents     every subject on every background, drawn at random places and sizes, encoded once
    unet        UNet2DConditionModel and CLIPTextModel together: v-prediction, zero terminal SNR, EMA
    evaluate    the shipped pipeline generates 96 subjects x 2 backgrounds; a judge that knows no network counts

A smoke run of everything on a CPU, in about a minute:

    python train_scripts/pretrain_sticker_pipeline.py --work_dir /tmp/stickers --output_dir /tmp/sticker-sd \
        --vae_steps 20 --unet_steps 20 --placements 1

`--start_from FOLDER` goes on from a finished pipeline: its tokenizer and autoencoder are used as they are, and UNet and
text encoder begin with its weights. On a GPU the whole recipe runs there, and with `--start_from` some minutes suffice:

    python train_scripts/pretrain_sticker_pipeline.py --start_from assets/sticker-sd --work_dir runs/more \
        --output_dir runs/more/sticker-sd --unet_steps 4000 --unet_batch_size 256 --unet_learning_rate 3e-4
"""

import argparse
import json
import random
import shutil
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer, get_cosine_schedule_with_warmup

from reslora_diffusion.diffusion.train.training_state import load_training_state, save_training_state
from sticker_data import (
    BACKGROUNDS,
    TEMPLATES,
    all_emoji,
    caption,
    draw_at_random,
    subjects,
    to_array,
)
from sticker_evaluation import evaluate, save_sheet
from sticker_models import StickerModel, make_pipeline, make_scheduler, make_tokenizer, make_vae

STAGES = ("tokenizer", "vae", "latents", "unet", "evaluate")
EMPTY_CAPTION_SHARE = 0.1  # what classifier-free guidance needs
CATEGORY_SHARE = 0.1  # "a sticker of an animal": what prior preservation's class prompts need


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/sticker-sd"), help="checkpoints and caches")
    parser.add_argument("--output_dir", type=Path, default=Path("assets/sticker-sd"), help="the finished pipeline")
    parser.add_argument("--start_from", type=Path, help="a finished pipeline, whose UNet and text encoder train on")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument("--vae_steps", type=int, default=4500, help="optimizer steps of the autoencoder")
    parser.add_argument("--vae_batch_size", type=int, default=16)
    parser.add_argument("--vae_learning_rate", type=float, default=1e-3)
    parser.add_argument("--placements", type=int, default=40, help="drawings per subject and background colour")
    parser.add_argument("--unet_steps", type=int, default=8000, help="optimizer steps of UNet and text encoder")
    parser.add_argument("--unet_batch_size", type=int, default=64)
    parser.add_argument("--unet_learning_rate", type=float, default=7e-4)
    parser.add_argument("--checkpointing_minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.start_from and not (args.start_from / "model_index.json").is_file():
        parser.error(f"--start_from: {args.start_from} is no folder of a diffusers pipeline (model_index.json)")
    if args.start_from and args.start_from.resolve() == args.output_dir.resolve():
        parser.error(f"--output_dir: got the folder of --start_from, {args.output_dir}; wanted another one")
    return args


# ---------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(folder: Path) -> None:
    """A byte-pair vocabulary of Unicode's emoji names and our captions."""
    corpus = [unicodedata.name(emoji).lower() for emoji in all_emoji()]
    corpus += [caption(s.name, c, t) for s in subjects() for c in BACKGROUNDS for t in TEMPLATES]
    corpus += [caption(s.category, c, t) for s in subjects() for c in BACKGROUNDS for t in TEMPLATES[:1]]
    make_tokenizer(folder, corpus)


# ---------------------------------------------------------------------------------------------- autoencoder


def vae_loss(vae: AutoencoderKL, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """|x - x'| on pixels and on their differences (keeps edges sharp), and a KL term just strong enough to keep the
    latents smooth. `pixels`: [B, 3, H, W] in [-1, 1]."""
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample.float()

    def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.diff(dim=-1), x.diff(dim=-2)

    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pixels), strict=True))
    return F.l1_loss(decoded, pixels) + edge + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()


def random_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def draw_batch(emoji: list[str], size: int, rng: random.Random) -> torch.Tensor:
    """Random emoji on random colours, most of them the captions' eight: [B, 3, 64, 64] in [-1, 1]."""
    images = []
    for _ in range(size):
        known = rng.random() < 0.7
        colour = rng.choice(list(BACKGROUNDS.values())) if known else random_colour(rng)
        images.append(to_array(draw_at_random(rng.choice(emoji), colour, rng)))
    return torch.from_numpy(np.stack(images)).float() / 127.5 - 1


def train_vae(args: argparse.Namespace, folder: Path) -> None:
    vae = make_vae().to(args.device, memory_format=torch.channels_last)
    seen_in_captions = [s.emoji for s in subjects()]
    emoji = all_emoji() + seen_in_captions * 4  # what the UNet will generate deserves the sharper image

    def step(index: int, generator: torch.Generator) -> torch.Tensor:
        pixels = draw_batch(emoji, args.vae_batch_size, random.Random(f"vae {args.seed} {index}"))
        pixels = pixels.to(args.device, memory_format=torch.channels_last)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            return vae_loss(vae, pixels, generator)

    train(args, "vae", vae, step, steps=args.vae_steps, learning_rate=args.vae_learning_rate)
    vae.eval()
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(draw_batch(emoji, 64, random.Random(i)).to(args.device)).latent_dist.mean for i in range(8)]
        )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- latents


@torch.no_grad()
def cache_latents(args: argparse.Namespace, vae_folder: Path, file: Path) -> None:
    """Draw and encode the training set once: latents [N, 16, 8, 8] in fp16, with subject and colour numbers [N]."""
    vae = AutoencoderKL.from_pretrained(vae_folder).to(args.device).eval()
    colours = list(BACKGROUNDS.values())
    latents, labels = [], []
    for number, subject in enumerate(tqdm(subjects(), desc="latents")):
        rng = random.Random(f"latents {args.seed} {number}")
        for colour in range(len(colours)):
            images = [to_array(draw_at_random(subject.emoji, colours[colour], rng)) for _ in range(args.placements)]
            pixels = torch.from_numpy(np.stack(images)).float().to(args.device) / 127.5 - 1
            latents.append(vae.encode(pixels).latent_dist.mean.mul(vae.config.scaling_factor).half().cpu())
            labels += [(number, colour)] * args.placements
    save_file({"latents": torch.cat(latents).contiguous(), "labels": torch.tensor(labels)}, file)


# ---------------------------------------------------------------------------------------------- UNet and text encoder


def make_caption(subject: int, colour: int, rng: random.Random) -> str:
    if rng.random() < EMPTY_CAPTION_SHARE:
        return ""
    who = subjects()[subject]
    noun = who.category if rng.random() < CATEGORY_SHARE else who.name
    template = TEMPLATES[0] if rng.random() < 0.5 else rng.choice(TEMPLATES[1:])
    return caption(noun, list(BACKGROUNDS)[colour], template)


def copy_finished_parts(pipeline: Path, work_dir: Path) -> None:
    """Use tokenizer and autoencoder of a finished pipeline, instead of training them."""
    for name in ("tokenizer", "vae"):
        if not (work_dir / name).exists():
            shutil.copytree(pipeline / name, work_dir / name)


def train_unet(args: argparse.Namespace, tokenizer: CLIPTokenizer, vae_folder: Path, latents_file: Path) -> float:
    """Train and save the pipeline. Returns the seconds of a step."""
    model = StickerModel(tokenizer)
    if args.start_from:
        model.load_weights(args.start_from)
    model.to(args.device)
    vae = AutoencoderKL.from_pretrained(vae_folder).to(args.device).eval()
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
        texts = [make_caption(subject, colour, rng) for subject, colour in (labels[row] for row in rows)]
        input_ids = torch.tensor([token_ids(text) for text in texts], device=args.device)
        clean = latents[rows].to(args.device, torch.float32)
        noise = torch.randn(clean.shape, generator=generator, device=args.device)
        timesteps = torch.randint(0, 1000, (len(rows),), generator=generator, device=args.device)
        target = scheduler.get_velocity(clean, noise, timesteps)
        return F.mse_loss(model(scheduler.add_noise(clean, noise, timesteps), timesteps, input_ids), target)

    def look(file: Path) -> None:
        save_sheet(make_pipeline(model, vae, tokenizer), file, rows=4)

    options = {"steps": args.unet_steps, "learning_rate": args.unet_learning_rate}
    seconds = train(args, "unet", model, step, **options, look=look)
    make_pipeline(model.half(), vae.half(), tokenizer).save_pretrained(args.output_dir)
    # transformers loads in the dtype its configuration names, diffusers in fp32: half the disk, one dtype in memory.
    config = args.output_dir / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    return seconds


# ---------------------------------------------------------------------------------------------- the one loop


def train(
    args: argparse.Namespace,
    name: str,
    model: nn.Module,
    step: Callable[[int, torch.Generator], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    look: Callable[[Path], None] | None = None,
) -> float:
    """AdamW, warm-up and cosine decay, gradient clipping, EMA; `step(index, generator)` returns the loss and
    `look(file)` saves images by the EMA weights, at every checkpoint.

    Ends with the EMA weights in `model`. Every batch is a function of (seed, index), so a resumed run goes on
    exactly where it was.

    Returns:
        The seconds of a step, on average over the second half of the steps.
    """
    state = args.work_dir / f"{name}-state"
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(300, steps // 10), steps)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    done = 0
    if state.exists():
        tensors, facts = load_training_state(state, model=model, optimizer=optimizer)
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        ema.shadow_params = [tensors[f"ema.{i}"].to(args.device) for i in range(len(ema.shadow_params))]
        ema.optimization_step = done = facts["step"]
        schedule.load_state_dict(facts["schedule"])
    saved_at = began = ended = time.monotonic()
    half = (done + steps) // 2
    bar = tqdm(range(done, steps), initial=done, total=steps, desc=name, mininterval=5)
    smooth = None
    for index in bar:
        if index == half:
            began = time.monotonic()
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + index)
        loss = step(index, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        ended = time.monotonic()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        last = index + 1 == steps
        if last or time.monotonic() - saved_at > 60 * args.checkpointing_minutes:
            tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
            tensors |= {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
            facts = {"step": index + 1, "loss": smooth, "schedule": schedule.state_dict()}
            save_training_state(state, tensors, model=model, optimizer=optimizer, facts=facts)
            if look is not None:
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                look(args.work_dir / "looks" / f"{name}-{index + 1:06d}.png")
                ema.restore(model.parameters())
            saved_at = time.monotonic()
    ema.copy_to(model.parameters())
    return (ended - began) / max(1, steps - half)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer_folder, vae, latents = (args.work_dir / name for name in ("tokenizer", "vae", "latents.safetensors"))
    stages = STAGES[: STAGES.index(args.until) + 1]
    if args.start_from:
        copy_finished_parts(args.start_from, args.work_dir)
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
