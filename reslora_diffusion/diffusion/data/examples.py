"""Makes the examples of a plan: missing class images are generated, and everything is encoded once."""

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
from ..models.families.long_prompts import pieces_of
from ..models.families.weighted_prompts import without_weights
from ..models.load import DTYPES, load_pipeline
from ..options import DreamBoothOptions
from ..options.plan import Plan
from .buckets import Buckets
from .class_images import generate_class_images, missing_numbers
from .concepts import Concept, options_of
from .crops import Views
from .disk_cache import DiskCache, identity
from .encode import Example, Text, Warmup, encode_images
from .scan import INTERPOLATIONS, scan
from .wordings import growing, wordings

ABANDONED = 3600  # seconds: a file that has been half-written for so long belongs to no run any more


def complete_class_images(
    concepts: list[Concept], options: DreamBoothOptions, accelerator: Accelerator
) -> list[Concept]:
    """Concepts with the class images that they want, after making those that are missing; each process makes its
    share. Concepts that name one folder share its images."""
    complete = []
    for concept in concepts:
        classes = concept.classes
        if classes is not None:
            if len(classes.images) < concept.num_class_images:
                make_missing(concept, options, accelerator)
                classes = scan(classes.folder, classes.caption_extension)
                refuse(classes.problems)
            classes = replace(classes, images=classes.images[: concept.num_class_images])
        complete.append(replace(concept, classes=classes))
    return complete


def make_missing(concept: Concept, options: DreamBoothOptions, accelerator: Accelerator) -> None:
    assert concept.classes is not None, "asked only of concepts with class images"
    folder = concept.classes.folder
    sweep(folder, older_than=ABANDONED)
    numbers = missing_numbers(scan(folder, may_be_empty=True), concept.num_class_images)  # others may share the folder
    accelerator.wait_for_everyone()
    if numbers:
        assert concept.class_prompt is not None, "class images have a prompt"
        assert options.seed is not None, "`resolve_seed` has set it"
        assert options.validation_guidance_scale is not None, "the script has set it to the family's"
        precision = options.prior_generation_precision or (
            "fp16" if accelerator.device.type in ("cuda", "xpu") else "fp32"
        )
        generate_class_images(
            load_pipeline(options, DTYPES[precision]).to(accelerator.device),
            folder,
            without_weights(concept.class_prompt) if options.weighted_captions else concept.class_prompt,
            numbers,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            seed=options.seed,
            resolution=options.resolution,
            batch_size=options.sample_batch_size,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.validation_guidance_scale,
            progress=accelerator.is_local_main_process,
        )
    accelerator.wait_for_everyone()


@torch.no_grad()
def prepare_texts(
    pipeline: DiffusionPipeline, family: Family, prompts: list[str], options: DreamBoothOptions
) -> dict[str, Text]:
    """Return each prompt as a training step needs it: tokens if the text encoders are trained, else texts."""
    tokens = family.read(pipeline, prompts, options)
    found: Text = tokens
    if not options.trains_text:
        found = family.encode(family.text_encoders_of(pipeline), tokens)
    rows = ([None] * len(prompts) if part is None else part for part in found)
    each = {prompt: type(found)(*parts) for prompt, *parts in zip(prompts, *rows, strict=True)}
    return {prompt: without_padding(text) for prompt, text in each.items()}


def without_padding(text: Text) -> Text:
    """A prompt that was encoded beside longer ones, by itself."""
    if text.mask is None or not isinstance(text, Texts):
        return text
    return text._replace(hidden=text.hidden[text.mask], mask=None)


def cached_texts(
    pipeline: DiffusionPipeline, family: Family, prompts: list[str], options: DreamBoothOptions, cache: DiskCache | None
) -> dict[str, Text]:
    """`prepare_texts`, by way of the cache. Tokens for encoders that are trained are not cached."""
    prompts = list(dict.fromkeys(prompts))
    if cache is None or options.trains_text:
        return prepare_texts(pipeline, family, prompts, options)
    fixed = filter(None, (family.fixed_encoder, family.fixed_tokenizer))
    parts = [getattr(pipeline, name) for name in (*family.text_encoders, *family.tokenizers, *fixed)]
    common: dict[str, Any] = {
        "kind": "text",
        "family": family.title,
        "encoders": identity(*(part for part in parts if part is None or isinstance(part, nn.Module))),
        "lengths": (options.tokenizer_max_length, family.t5_length(options)),
    }
    if (pieces := pieces_of(options)) > 1:  # entries of earlier versions are of one
        common["pieces"] = pieces
    if options.weighted_captions:
        common["weighted"] = True
    tokenizers = [part for part in parts if part is not None and not isinstance(part, nn.Module)]
    keys = {
        prompt: {**common, "prompt": prompt, "tokens": [tokenizer(text=prompt).input_ids for tokenizer in tokenizers]}
        for prompt in prompts
    }
    device = family.denoiser_of(pipeline).device
    found = {prompt: cache.load(key) for prompt, key in keys.items()}
    texts: dict[str, Text] = {
        prompt: Texts(**{name: value.to(device) for name, value in tensors.items()})
        for prompt, tensors in found.items()
        if tensors is not None
    }
    if missing := [prompt for prompt in prompts if prompt not in texts]:
        texts |= prepare_texts(pipeline, family, missing, options)
        for prompt in missing:
            cache.store(keys[prompt], {name: v for name, v in texts[prompt]._asdict().items() if v is not None})
    return texts


class Encoded(NamedTuple):
    """Instance examples, as often as a pass shows them; class examples by concept; those that are held out to validate
    on; the empty prompt."""

    instances: list[Example]
    classes: dict[int, list[Example]]
    held_out: list[Example]
    empty: Text


def encode_examples(
    pipeline: DiffusionPipeline, plan: Plan, concepts: list[Concept], options: DreamBoothOptions, progress: bool
) -> Encoded:
    """Every image and prompt of a run; the autoencoder encodes in float32."""
    cache = DiskCache(Path(options.encoding_cache_dir)) if options.encoding_cache_dir else None
    settings = [options_of(concept.own, options) for concept in concepts]
    worded = [wordings_of(concept, own) for concept, own in zip(concepts, settings, strict=True)]
    grown = [growing_of(concept, own) for concept, own in zip(concepts, settings, strict=True)]
    every = ["", *(one for of_concept in (*worded, *grown) for several in of_concept.values() for one in several)]
    texts = cached_texts(pipeline, plan.base.family, every, options, cache)
    common: dict[str, Any] = {
        "moments": plan.base.family.moments,
        "batch_size": options.sample_batch_size,
        "threads": options.dataloader_num_workers,
        "cache": cache,
    }
    dtype = pipeline.vae.dtype
    if dtype != torch.float32:
        pipeline.vae.float()
    common["vae_identity"] = identity(pipeline.vae) if cache else ""
    instances, classes, held_out, encoded = [], {}, [], {}
    for number, concept in enumerate(concepts):
        named = f" of {Path(concept.instance.folder).name}" if len(concepts) > 1 else ""
        views = views_of(concept, settings[number], plan)
        common["texts"] = {p: [(one, texts[one]) for one in several] for p, several in worded[number].items()}
        steps = warmup_steps(settings[number], plan.max_train_steps)
        common["warmups"] = {
            p: Warmup(steps, [(one, texts[one]) for one in several])
            for p, several in grown[number].items()
            if several and steps
        }
        apart = concept.validation.images if concept.validation else []
        examples = encode_images(
            pipeline.vae,
            [*concept.instance.images, *apart],
            views,
            prompt=concept.instance_prompt,
            concept=number,
            progress=f"instance latents{named}" if progress else None,
            **common,
        )
        measured_on = {image.digest for image in concept.validated}
        placed = list(zip([*concept.instance.images, *apart], examples, strict=True))
        instances += [example for image, example in placed if image.digest not in measured_on] * concept.repeats
        held_out += [example for image, example in placed if image.digest in measured_on]
        if concept.classes is not None:
            source = (concept.classes.folder, concept.class_prompt, len(concept.classes.images), views)
            if source not in encoded:
                encoded[source] = encode_images(
                    pipeline.vae,
                    concept.classes.images,
                    replace(views, alpha_mask=False),
                    prompt=concept.class_prompt,
                    loss_weight=options.prior_loss_weight,
                    progress=f"class latents{named}" if progress else None,
                    **common,
                )
            classes[number] = encoded[source]
    if dtype != torch.float32:
        pipeline.vae.to(dtype)
    if cache and progress:
        print(f"{options.encoding_cache_dir}: {cache.added} images and prompts were added, the others were there")
    return Encoded(instances, classes, held_out, texts[""])


def wordings_of(concept: Concept, options: DreamBoothOptions) -> dict[str, list[str]]:
    """Every prompt of a concept, and its wordings."""
    return {prompt: wordings(prompt, options) for prompt in prompts_of([concept])}


def growing_of(concept: Concept, options: DreamBoothOptions) -> dict[str, list[str]]:
    """Every prompt of a concept, and its wordings with some of the first tags."""
    return {prompt: growing(prompt, options) for prompt in prompts_of([concept])}


def warmup_steps(options: DreamBoothOptions, steps: int) -> int:
    """Steps before a prompt has all of its tags."""
    given = options.token_warmup_step
    return int(given if given >= 1 else given * steps)


def views_of(concept: Concept, options: DreamBoothOptions, plan: Plan) -> Views:
    """Return the views of a concept's images that are trained; `options` are the options as the concept has them."""
    return Views(
        buckets=concept.buckets or Buckets(tuple(plan.buckets)),
        interpolation=INTERPOLATIONS[options.image_interpolation_mode],
        center_crop=options.center_crop,
        crops=options.crops_per_image,
        flip=options.random_flip,
        vae_scale_factor=plan.base.vae_scale_factor,
        alpha_mask=options.alpha_mask,
    )


def prompts_of(concepts: list[Concept]) -> list[str]:
    return [
        str(image.caption or prompt)  # images without captions are refused where there is no prompt
        for concept in concepts
        for found, prompt in (
            (concept.instance, concept.instance_prompt),
            (concept.validation, concept.instance_prompt),
            (concept.classes, concept.class_prompt),
        )
        if found is not None
        for image in found.images
    ]
