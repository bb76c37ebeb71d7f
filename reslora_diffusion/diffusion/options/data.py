"""Options on the images and prompts that are trained on."""

from dataclasses import dataclass
from pathlib import Path

from ...utils.options import option
from ..data.scan import INTERPOLATIONS
from .model import FLUX, FROZEN_TEXT, LUMINA_2, SD3, XL

# Options that read a caption as tags, and move or leave out some.
READ_AS_TAGS = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")


@dataclass
class DataOptions:
    """Images and prompts."""

    instance_data_dir: str | None = option(
        None,
        "Folder with images of the subject; captions in <image>.txt or metadata.jsonl beside them.",
        kohya={"train_data_dir": "folders named 10_sks dog are read as kohya reads them"},
    )
    instance_prompt: str | None = option(None, "Prompt of images without a caption of their own.", binds=True)
    class_data_dir: str | None = option(
        None,
        "Folder with images of the class; missing ones are generated into it.",
        kohya={"reg_data_dir": "together with --with_prior_preservation"},
    )
    class_prompt: str | None = option(
        None, "Prompt of class images without a caption, and of those that are generated.", binds=True
    )
    with_prior_preservation: bool = option(False, "Also train on images of the class.", binds=True)
    num_class_images: int = option(100, "Number of class images; missing ones are generated.", at_least=1)
    prior_loss_weight: float = option(1.0, "Weight of class images in the loss.", at_least=0, binds=True)
    prior_generation_precision: str | None = option(
        None,
        "Precision in which class images are generated (default: fp16 on a GPU, else fp32).",
        choices=("no", "fp32", "fp16", "bf16"),
    )
    sample_batch_size: int = option(4, "Class images that are generated at once.", at_least=1)
    concepts: Path | None = option(
        None,
        "YAML, JSON or TOML list of concepts, each with folders and prompts of its own.",
        kohya={"dataset_config": "each entry has instance_data_dir, instance_prompt, repeats, ..."},
    )
    dataset_name: str | None = option(None, "Hub name or folder of a dataset with images, as `datasets` reads it.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset, if it has several.")
    image_column: str | None = option(
        None, "Column of images in the dataset (default: image, else the first that holds images)."
    )
    caption_column: str | None = option(
        None, "Column of captions in the dataset (default: every image has --instance_prompt)."
    )
    cache_dir: str | None = option(None, "Folder for downloaded datasets (default: that of `datasets`).")
    resolution: int = option(
        512,
        "Side in pixels of the squares that images are resized and cropped to.",
        at_least=1,
        binds=True,
        in_header=True,
        families={XL: 1024},
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "auto, or 'height,width;height,width': train each image in the shape that is nearest to its own.",
        binds=True,
        kohya={"enable_bucket": "as --aspect_ratio_buckets auto"},
    )
    use_aspect_ratio_buckets: bool = option(
        False, "The same as --aspect_ratio_buckets auto, unless that option says more.", recorded=False
    )
    min_bucket_reso: int | None = option(
        None,
        "Least side of --aspect_ratio_buckets auto, as in kohya's scripts (default: sides between 2:5 and 5:2).",
        at_least=1,
        binds=True,
    )
    max_bucket_reso: int | None = option(
        None, "Largest side of --aspect_ratio_buckets auto (default: twice --resolution).", at_least=1, binds=True
    )
    bucket_reso_steps: int | None = option(
        None, "Step of the sides of --aspect_ratio_buckets auto.", at_least=1, binds=True
    )
    bucket_no_upscale: bool = option(
        False,
        "With --aspect_ratio_buckets auto, train an image that is smaller than its bucket at its own size.",
        binds=True,
    )
    center_crop: bool = option(False, "Crop images in their centre instead of at random.", binds=True)
    random_flip: bool = option(False, "Also train on every image mirrored.", binds=True, kohya={"flip_aug": ""})
    crops_per_image: int = option(
        4, "Random crops that are cached of each image that has room for them.", at_least=1, binds=True
    )
    image_interpolation_mode: str = option(
        "lanczos",
        "How images are resized.",
        choices=tuple(INTERPOLATIONS),
        binds=True,
        families=dict.fromkeys((SD3, FLUX, *FROZEN_TEXT), "bilinear") | {LUMINA_2: "lanczos"},
        kohya={"resize_interpolation": "kohya's area is box here"},
    )
    repeats: int = option(
        1,
        "Times that one pass over the data shows each image of the subject.",
        at_least=1,
        binds=True,
        kohya={"dataset_repeats": ""},
    )
    caption_extension: str = option(
        ".txt",
        "Extension of caption files; kohya's scripts have .caption by default.",
        binds=True,
        kohya={"caption_extention": ""},
    )
    caption_prefix: str | None = option(None, "Words put before every caption and prompt of the data.", binds=True)
    caption_suffix: str | None = option(None, "Words put after every caption and prompt of the data.", binds=True)
    shuffle_caption: bool = option(
        False, "Read captions as tags with commas between them, in up to 8 orders each.", binds=True
    )
    keep_tokens: int = option(0, "Number of first tags of a caption that stay in front.", at_least=0, binds=True)
    keep_tokens_separator: str | None = option(
        None,
        "Text in captions: tags before its first place and behind its second stay where they are.",
        binds=True,
    )
    caption_separator: str = option(",", "Text between the tags of a caption.", binds=True)
    secondary_separator: str | None = option(
        None, "Text between tags that stay together as one; it is read as --caption_separator.", binds=True
    )
    caption_tag_dropout_rate: float = option(
        0.0,
        "Share of the tags that is left out, of each caption in up to 16 wordings.",
        at_least=0,
        below=1,
        binds=True,
    )
    token_warmup_step: float = option(
        0.0,
        "Steps after which a caption has all of its tags, and before which it has the first ones; below 1 a share of "
        "all steps.",
        at_least=0,
        binds=True,
    )
    token_warmup_min: int = option(
        1, "Number of tags that a caption has at the first step of --token_warmup_step.", at_least=1, binds=True
    )
    enable_wildcard: bool = option(
        False,
        "Read captions with one of the words in {red|green|blue}, and one of their lines, in up to 16 wordings.",
        binds=True,
    )
    caption_dropout_rate: float = option(
        0.0, "Share of draws that train the empty prompt instead.", at_least=0, below=1, binds=True
    )
    caption_dropout_every_n_epochs: int = option(
        0, "Number of passes over the data of which the last one trains the empty prompt alone.", at_least=0, binds=True
    )
    weighted_captions: bool = option(
        False,
        "Read (words:1.2), (words) and [words] in prompts as words with a weight, by which their states are "
        "multiplied; backslashes make brackets of them again.",
        binds=True,
    )
    mask_data_dir: str | None = option(
        None,
        "Folder with grey masks, named as the images: the loss counts what is white.",
        binds=True,
        kohya={"conditioning_data_dir": "", "masked_loss": "or --alpha_mask"},
    )
    alpha_mask: bool = option(False, "The loss counts what is opaque in an image.", binds=True)
    masked_mean: str = option(
        "mask",
        "What the loss of an image with a mask is a mean over: mask, or image as in kohya's scripts, so that images "
        "count by how much of them is shown.",
        choices=("mask", "image"),
        binds=True,
    )
    validation_data_dir: str | None = option(
        None, "Folder with further images of the subject, to validate on and never to train on.", binds=True
    )
    validation_split: float = option(
        0.0, "Share of the images to hold out and to validate on.", at_least=0, below=1, binds=True
    )
    encoding_cache_dir: str | None = option(
        None,
        "Folder in which encoded images and prompts are stored, by content (default: in memory only).",
        kohya={"cache_latents_to_disk": "", "cache_text_encoder_outputs_to_disk": ""},
    )
    dataloader_num_workers: int = option(
        0,
        "Threads that read images while they are encoded.",
        at_least=0,
        kohya={"max_data_loader_n_workers": ""},
    )
    cache_latents: bool = option(False, "Images are always encoded once; this is diffusers' name for it.")
    pre_compute_text_embeddings: bool = option(
        False, "Prompts are encoded once whenever the text encoders are frozen; this is diffusers' name for it."
    )
