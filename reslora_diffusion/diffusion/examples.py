"""From a plan to encoded examples: class pictures made where they are missing, everything encoded once."""

from argparse import Namespace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from .cache import Example, Views, encode_pictures
from .checks import Plan
from .data import Scan, scan
from .models import DTYPES, load_pipeline
from .prior import generate_class_pictures
from .problems import refuse
from .text import encode, tokenize


def complete_class_pictures(plan: Plan, args: Namespace, accelerator: Accelerator) -> Scan | None:
    """The class pictures to train on, after making those that are missing; each process makes its share."""
    if plan.class_pictures is None:
        return None
    folder, have = Path(args.class_data_dir), len(plan.class_pictures.pictures)
    if have < args.num_class_images:
        precision = args.prior_generation_precision or ("fp16" if accelerator.device.type in ("cuda", "xpu") else "fp32")
        pipeline = load_pipeline(args, DTYPES[precision]).to(accelerator.device)
        generate_class_pictures(
            pipeline,
            folder,
            args.class_prompt,
            range(have + accelerator.process_index, args.num_class_images, accelerator.num_processes),
            seed=args.seed,
            resolution=args.resolution,
            batch_size=args.sample_batch_size,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            progress=accelerator.is_local_main_process,
        )
        accelerator.wait_for_everyone()
    found = scan(folder)
    refuse(found.problems)
    found.pictures = found.pictures[: args.num_class_images]
    return found


@torch.no_grad()
def prepare_texts(pipeline: StableDiffusionPipeline, prompts: list[str], args: Namespace) -> dict[str, Tensor]:
    """What a training step needs of each prompt: token ids if the text encoder is trained, else hidden states."""
    prompts = list(dict.fromkeys(prompts))
    ids = tokenize(pipeline.tokenizer, prompts, args.tokenizer_max_length).to(pipeline.text_encoder.device)
    texts = ids if args.train_text_encoder else encode(pipeline.text_encoder, ids)
    return dict(zip(prompts, texts, strict=True))


def encode_examples(
    pipeline: StableDiffusionPipeline, instance: Scan, classes: Scan | None, args: Namespace, progress: bool
) -> tuple[list[Example], list[Example]]:
    """Instance and class examples, encoded by the autoencoder in float32."""
    sources = [(instance, args.instance_prompt, 1.0, "instance latents")]
    if classes:
        sources.append((classes, args.class_prompt, args.prior_loss_weight, "class latents"))
    prompts = [picture.caption or prompt for found, prompt, _, _ in sources for picture in found.pictures]
    texts = prepare_texts(pipeline, prompts, args)
    views = Views(
        resolution=args.resolution,
        interpolation=Image.Resampling[args.image_interpolation_mode.upper()],
        center_crop=args.center_crop,
        crops=args.crops_per_image,
        flip=args.random_flip,
        seed=args.seed,
    )
    dtype = pipeline.vae.dtype
    pipeline.vae.float()
    examples = [
        encode_pictures(
            pipeline.vae,
            found.pictures,
            views,
            prompt=prompt,
            texts=texts,
            loss_weight=weight,
            batch_size=args.sample_batch_size,
            threads=args.dataloader_num_workers,
            progress=title if progress else None,
        )
        for found, prompt, weight, title in sources
    ]
    pipeline.vae.to(dtype)
    return examples[0], examples[1] if classes else []
