"""The autoencoder's part of the recipe: its loss, its training, and how well it reconstructs what it has never seen.

vae_loss                 errors of pixels and of their differences, and a KL term
train_vae                on scenes (sticker_scenes.py); ends with latents whose mean is zero
reconstruction_figures   PSNR for each held-out subject
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from sticker_data import BACKGROUNDS, HELD_OUT, RESOLUTION, all_emoji, draw_at_random, subjects, to_array
from sticker_models import make_vae
from sticker_muon import make_muon
from sticker_scenes import draw_scenes
from sticker_training import train

KL_WEIGHT = 5e-4  # for each latent number: the posterior's deviation is about a tenth of the latents'


def vae_loss(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Errors of the pixels and of their differences to the right and below, absolute and squared, and a KL term.

    The absolute error sharpens edges, the squared one is what PSNR measures. `pixels`: [B, 3, H, W] in [-1, 1].
    """
    posterior = vae.encode(pixels).latent_dist
    error = vae.decode(posterior.sample(generator)).sample.float() - pixels
    parts = (error, error.diff(dim=-1), error.diff(dim=-2))
    distance = sum(part.abs().mean() + 3 * part.square().mean() for part in parts)
    return distance + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


def train_vae(args: argparse.Namespace, folder: Path) -> None:
    vae = make_vae().to(args.device, memory_format=torch.channels_last)
    emoji = all_emoji() + [s.emoji for s in subjects()] * 4  # what the UNet will generate deserves the sharper image

    def step(index: int, generator: torch.Generator) -> Tensor:
        pixels = draw_scenes(emoji, args.vae_batch_size, random.Random(f"vae {args.seed} {index}"))
        pixels = pixels.to(args.device, memory_format=torch.channels_last)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            return vae_loss(vae, pixels, generator)

    def look(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        figures, sheet = reconstruction_figures(vae, args.device)
        sheet.save(file)
        print(f"\n{file.name}: PSNR {figures}", flush=True)

    optimizer = make_muon(vae, args.vae_learning_rate, first_and_last=("encoder.conv_in", "decoder.conv_out"))
    train(args, "vae", vae, step, steps=args.vae_steps, optimizer=optimizer, look=look)
    centre(vae.eval(), latents_of(vae, emoji, args.device))
    vae.save_pretrained(folder)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, emoji: list[str], device: str) -> Tensor:
    """Latents of 512 scenes."""
    rng = random.Random(0)
    return torch.cat([vae.encode(draw_scenes(emoji, 64, rng).to(device)).latent_dist.mean for _ in range(8)])


@torch.no_grad()
def centre(vae: AutoencoderKL, latents: Tensor) -> None:
    """Make each channel's mean zero, by the biases of `quant_conv` and what undoes it in `post_quant_conv`, and write
    the scale into the configuration. `latents`: [N, C, h, w].

    The noisiest latents of a zero terminal SNR have mean zero, so those that the UNet generates should have it too.
    """
    mean = latents.mean(dim=(0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    deviation = (latents - mean[:, None, None]).std().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 4))


def held_out_drawings(count: int) -> dict[str, np.ndarray]:
    """`count` drawings of each held-out subject at random places and sizes: [count, 3, 64, 64] uint8."""
    drawings = {}
    for name, (emoji, _) in HELD_OUT.items():
        rng = random.Random(f"held out {name}")
        colours = list(BACKGROUNDS.values())
        images = [draw_at_random(emoji, colours[i % len(colours)], rng) for i in range(count)]
        drawings[name] = np.stack([to_array(image) for image in images])
    return drawings


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray, device: str) -> np.ndarray:
    """[N, 3, H, W] uint8 to the same: encoded to the posterior's mean, and decoded."""
    pixels = torch.from_numpy(images).float().to(device, vae.dtype) / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.float().clamp(-1, 1)
    return ((decoded + 1) * 127.5).round().byte().cpu().numpy()


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """In dB, of uint8 images."""
    return float(10 * np.log10(255**2 / max(1e-9, ((image.astype(float) - other) ** 2).mean())))


def reconstruction_figures(
    vae: AutoencoderKL, device: str = "cpu", count: int = 8
) -> tuple[dict[str, float], Image.Image]:
    """PSNR for each held-out subject and their mean, in dB; and a sheet: originals above, reconstructions below."""
    cell = RESOLUTION + 2
    sheet = Image.new("RGB", (len(HELD_OUT) * cell, 2 * cell), "white")
    figures = {}
    for column, (name, images) in enumerate(held_out_drawings(count).items()):
        again = reconstruct(vae, images, device)
        figures[name] = round(float(np.mean([psnr(a, b) for a, b in zip(images, again, strict=True)])), 2)
        for row, one in enumerate((images, again)):
            sheet.paste(Image.fromarray(one[column % count].transpose(1, 2, 0)), (column * cell, row * cell))
    figures["mean"] = round(float(np.mean(list(figures.values()))), 2)
    return figures, sheet
