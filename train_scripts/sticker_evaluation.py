"""Evaluates the sticker pipeline by a sheet to look at, and by figures of a judge that knows no network.

generate      one image per prompt, each from its own seed, 25 steps, guidance 4
save_sheet    images of subjects in rows, one background per column
judge_layouts how often a size, a place or a pair is what the caption says
evaluate      96 subjects x 2 backgrounds, judged by `sticker_judge`; writes `evaluation.json` beside the pipeline
"""

import json
import platform
import random
import time
from pathlib import Path

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from sticker_autoencoder import reconstruction_figures
from sticker_data import BACKGROUNDS, LAYOUTS, RESOLUTION, caption, draw_at_random, phrase, subjects
from sticker_judge import ceiling, judge_background, judge_layout, judge_subject, sharpness

INFERENCE_STEPS = 25
GUIDANCE = 4.0


def generate(pipeline: StableDiffusionPipeline, prompts: list[str], seeds: list[int], batch_size: int = 32) -> list:
    """One image per prompt, each from its own seed, 25 steps, guidance 4."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        images += pipeline(
            prompts[part], num_inference_steps=INFERENCE_STEPS, guidance_scale=GUIDANCE, generator=generators
        ).images
    return images


def save_sheet(pipeline: StableDiffusionPipeline, file: Path, rows: int) -> None:
    """A look at what the pipeline knows: every eighth subject (or as many as fit), one background per column."""
    colours = list(BACKGROUNDS)
    chosen = [subjects()[i * len(subjects()) // (rows * len(colours))] for i in range(rows * len(colours))]
    prompts = [caption(s.name, colours[i % len(colours)]) for i, s in enumerate(chosen)]
    images = generate(pipeline, prompts, list(range(len(prompts))))
    cell = RESOLUTION + 2
    sheet = Image.new("RGB", (len(colours) * cell, rows * cell), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % len(colours) * cell, i // len(colours) * cell))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def judge_layouts(pipeline: StableDiffusionPipeline) -> dict[str, float]:
    """Share of right layouts: each on every sixth subject. In a pair both subjects have to be right as well."""
    right = {}
    for layout in LAYOUTS:
        chosen = subjects()[::6]
        others = [s.name if layout == "pair" else "" for s in reversed(chosen)]
        wanted = list(zip([s.name for s in chosen], others, strict=True))
        colours = [list(BACKGROUNDS)[i % len(BACKGROUNDS)] for i in range(len(wanted))]
        prompts = [caption(phrase(layout, *names), colour) for names, colour in zip(wanted, colours, strict=True)]
        images = generate(pipeline, prompts, list(range(len(prompts))))
        judged = [judge_layout(image, layout, names) for image, names in zip(images, wanted, strict=True)]
        right[layout] = sum(judged) / len(judged)
    return right


def evaluate(folder: Path, device: str) -> dict:
    """Generate every subject on two backgrounds, and judge the images; write figures and contact sheet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(device)
    colours = list(BACKGROUNDS)
    wanted = [(s.name, colours[(i + k) % len(colours)]) for i, s in enumerate(subjects()) for k in (0, 3)]
    started = time.monotonic()
    images = generate(pipeline, [caption(name, colour) for name, colour in wanted], list(range(len(wanted))))
    seconds = time.monotonic() - started
    judged = [(judge_subject(image), judge_background(image)) for image in images]
    pairs = list(zip(wanted, judged, strict=True))
    rng, emoji = random.Random(0), {s.name: s.emoji for s in subjects()}
    drawn = [draw_at_random(emoji[name], BACKGROUNDS[colour], rng) for name, colour in wanted]
    reconstruction, sheet = reconstruction_figures(pipeline.vae, device)
    sheet.save(folder / "reconstructions.png")
    figures = {
        "images": len(wanted),
        "right_subject": sum(want[0] == got[0] for want, got in pairs) / len(wanted),
        "right_background": sum(want[1] == got[1] for want, got in pairs) / len(wanted),
        "sharpness": round(sharpness(images) / sharpness(drawn), 3),
        "right_layout": judge_layouts(pipeline),
        "reconstruction_psnr": reconstruction,
        "judge_ceiling": ceiling(),
        "num_inference_steps": INFERENCE_STEPS,
        "guidance_scale": GUIDANCE,
        "scheduler": type(pipeline.scheduler).__name__,
        "seconds": round(seconds, 1),
        "misjudged": [f"{' on '.join(want)} -> {' on '.join(got)}" for want, got in pairs if want != got],
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    save_sheet(pipeline, folder / "contact_sheet.png", rows=12)
    return figures
