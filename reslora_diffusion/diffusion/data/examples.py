"""From a plan to encoded examples: class pictures made where they are missing, everything encoded once."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from ...utils.files import sweep
from ...utils.problems import refuse
from ..models.families import Family, Texts
from ..models.load import DTYPES, load_pipeline
from ..options import DreamBoothOptions
from ..options.checks import Plan
from .class_images import generate_class_pictures, missing_numbers
from .concepts import Concept
from .disk_cache import DiskCache, identity
from .encode import Example, Text, Views, encode_pictures
from .scan import INTERPOLATIONS, scan
from .tag_orders import tag_orders

ABANDONED = 3600  # seconds: a file that has been half-written for so long belongs to no run any more


def complete_class_pictures(
    concepts: list[Concept], args: DreamBoothOptions, accelerator: Accelerator
) -> list[Concept]:
    """Concepts with the class pictures that they want, after making those that are missing; each process makes its
    share. Concepts that name one folder share its pictures."""
    complete = []
    for concept in concepts:
        classes = concept.classes
        if classes is not None:
            if len(classes.pictures) < concept.num_class_images:
                make_missing(concept, args, accelerator)
                classes = scan(classes.folder, classes.caption_extension)
                refuse(classes.problems)
            classes = replace(classes, pictures=classes.pictures[: concept.num_class_images])
        complete.append(replace(concept, classes=classes))
    return complete


def make_missing(concept: Concept, args: DreamBoothOptions, accelerator: Accelerator) -> None:
    assert concept.classes is not None, "asked only of concepts with class pictures"
    folder = concept.classes.folder
    sweep(folder, older_than=ABANDONED)
    numbers = missing_numbers(scan(folder, may_be_empty=True), concept.num_class_images)  # others may share the folder
    accelerator.wait_for_everyone()
    if numbers:
        assert concept.class_prompt is not None, "class images have a prompt"
        assert args.seed is not None, "`resolve_seed` has set it"
        assert args.validation_guidance_scale is not None, "the script has set it to the family's"
        precision = args.prior_generation_precision or (
            "fp16" if accelerator.device.type in ("cuda", "xpu") else "fp32"
        )
        generate_class_pictures(
            load_pipeline(args, DTYPES[precision]).to(accelerator.device),
            folder,
            concept.class_prompt,
            numbers,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            seed=args.seed,
            resolution=args.resolution,
            batch_size=args.sample_batch_size,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            progress=accelerator.is_local_main_process,
        )
    accelerator.wait_for_everyone()


@torch.no_grad()
def prepare_texts(
    pipeline: DiffusionPipeline, family: Family, prompts: list[str], args: DreamBoothOptions
) -> dict[str, Text]:
    """What a training step needs of each prompt: tokens if the text encoders are trained, else texts."""
    tokens = family.read(pipeline, prompts, args)
    found: Text = tokens
    if not args.train_text_encoder:
        found = family.encode(family.text_encoders_of(pipeline), tokens)
    rows = ([None] * len(prompts) if part is None else part for part in found)
    return {prompt: type(found)(*parts) for prompt, *parts in zip(prompts, *rows, strict=True)}


def kept_texts(
    pipeline: DiffusionPipeline, family: Family, prompts: list[str], args: DreamBoothOptions, kept: DiskCache | None
) -> dict[str, Text]:
    """`prepare_texts`, of those prompts that are not kept already. Tokens of encoders that are trained are not."""
    prompts = list(dict.fromkeys(prompts))
    if kept is None or args.train_text_encoder:
        return prepare_texts(pipeline, family, prompts, args)
    fixed = filter(None, (family.fixed_encoder, family.fixed_tokenizer))
    parts = [getattr(pipeline, name) for name in (*family.text_encoders, *family.tokenizers, *fixed)]
    common = {
        "kind": "text",
        "family": family.title,
        "encoders": identity(*(part for part in parts if part is None or isinstance(part, nn.Module))),
        "lengths": (args.tokenizer_max_length, family.t5_length(args)),
    }
    tokenizers = [part for part in parts if part is not None and not isinstance(part, nn.Module)]
    keys = {
        prompt: {**common, "prompt": prompt, "tokens": [tokenizer(prompt).input_ids for tokenizer in tokenizers]}
        for prompt in prompts
    }
    device = family.denoiser_of(pipeline).device
    found = {prompt: kept.load(key) for prompt, key in keys.items()}
    texts: dict[str, Text] = {
        prompt: Texts(**{name: value.to(device) for name, value in tensors.items()})
        for prompt, tensors in found.items()
        if tensors is not None
    }
    if missing := [prompt for prompt in prompts if prompt not in texts]:
        texts |= prepare_texts(pipeline, family, missing, args)
        for prompt in missing:
            kept.store(keys[prompt], {name: v for name, v in texts[prompt]._asdict().items() if v is not None})
    return texts


class Encoded(NamedTuple):
    """Instance examples, as often as a pass shows them; class examples by concept; those that are held out to validate
    on; the empty prompt."""

    instances: list[Example]
    classes: dict[int, list[Example]]
    held_out: list[Example]
    empty: Text


def encode_examples(
    pipeline: DiffusionPipeline, plan: Plan, concepts: list[Concept], args: DreamBoothOptions, progress: bool
) -> Encoded:
    """Every picture and prompt of a run; the autoencoder encodes in float32."""
    kept = DiskCache(Path(args.encoding_cache_dir)) if args.encoding_cache_dir else None
    worded = {
        prompt: tag_orders(prompt, args.keep_tokens) if args.shuffle_caption else [prompt]
        for prompt in prompts_of(concepts)
    }
    every = ["", *(wording for several in worded.values() for wording in several)]
    texts = kept_texts(pipeline, plan.skeleton.family, every, args, kept)
    views = Views(
        buckets=plan.buckets,
        interpolation=INTERPOLATIONS[args.image_interpolation_mode],
        center_crop=args.center_crop,
        crops=args.crops_per_image,
        flip=args.random_flip,
        vae_scale_factor=plan.skeleton.vae_scale_factor,
        alpha_mask=args.alpha_mask,
    )
    common: dict[str, Any] = {
        "texts": {prompt: {one: texts[one] for one in several} for prompt, several in worded.items()},
        "batch_size": args.sample_batch_size,
        "threads": args.dataloader_num_workers,
        "kept": kept,
    }
    dtype = pipeline.vae.dtype
    if dtype != torch.float32:
        pipeline.vae.float()
    common["vae_identity"] = identity(pipeline.vae) if kept else ""
    instances, classes, held_out, encoded = [], {}, [], {}
    for number, concept in enumerate(concepts):
        named = f" of {Path(concept.instance.folder).name}" if len(concepts) > 1 else ""
        examples = encode_pictures(
            pipeline.vae,
            concept.instance.pictures,
            views,
            prompt=concept.instance_prompt,
            concept=number,
            progress=f"instance latents{named}" if progress else None,
            **common,
        )
        placed = list(zip(concept.instance.pictures, examples, strict=True))
        instances += [
            example for picture, example in placed if picture.digest not in concept.held_out
        ] * concept.repeats
        held_out += [example for picture, example in placed if picture.digest in concept.held_out]
        if concept.classes is not None:
            source = (concept.classes.folder, concept.class_prompt, len(concept.classes.pictures))
            if source not in encoded:
                encoded[source] = encode_pictures(
                    pipeline.vae,
                    concept.classes.pictures,
                    replace(views, alpha_mask=False),
                    prompt=concept.class_prompt,
                    loss_weight=args.prior_loss_weight,
                    progress=f"class latents{named}" if progress else None,
                    **common,
                )
            classes[number] = encoded[source]
    if dtype != torch.float32:
        pipeline.vae.to(dtype)
    if kept and progress:
        print(f"{args.encoding_cache_dir}: {kept.added} pictures and prompts were added, the others were there")
    return Encoded(instances, classes, held_out, texts[""])


def prompts_of(concepts: list[Concept]) -> list[str]:
    return [
        str(picture.caption or prompt)  # pictures without captions are refused where there is no prompt
        for concept in concepts
        for found, prompt in ((concept.instance, concept.instance_prompt), (concept.classes, concept.class_prompt))
        if found is not None
        for picture in found.pictures
    ]
