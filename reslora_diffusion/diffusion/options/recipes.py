"""`--preset`: settings that others have published for a kind of subject, by family of models.

A recipe sets options that are not given. Each has its source; none was measured here, and methods with a shortcut may
want other rates (`reslora tune` searches them). docs/recipes.md lists them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .model import FLUX, FLUX_2, KLEIN, QWEN, SD3, XL, Z_IMAGE

SD = "StableDiffusionPipeline"
LENGTH = {"max_train_steps", "num_train_epochs"}  # who gives one of them has decided on the other


@dataclass(frozen=True)
class Recipe:
    """Options by name, and where they were published."""

    values: Mapping[str, Any]
    source: str


EXAMPLE = {"train_batch_size": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": 500}
FOUR = EXAMPLE | {"gradient_accumulation_steps": 4}
WARMED_UP = FOUR | {"lr_warmup_steps": 100, "learning_rate": 1e-4, "optimizer": "adamw8bit", "resolution": 1024}
TOOLKIT = {
    "rank": 16,
    "lora_alpha": 16.0,
    "learning_rate": 1e-4,
    "train_batch_size": 1,
    "max_train_steps": 2000,
    "caption_dropout_rate": 0.05,
    "optimizer": "adamw8bit",
    "use_ema": True,
    "ema_decay": 0.99,
    "aspect_ratio_buckets": "auto",
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
}
ICONS = {
    "rank": 8,
    "optimizer": "prodigy",
    "learning_rate": 1.0,
    "gradient_accumulation_steps": 1,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "resolution": 1024,
}
RECIPES: dict[str, dict[str, Recipe]] = {
    "object": {
        SD: Recipe(
            EXAMPLE | {"gradient_accumulation_steps": 1, "learning_rate": 1e-4, "resolution": 512},
            "diffusers, examples/dreambooth/README.md",
        ),
        XL: Recipe(FOUR | {"learning_rate": 1e-4, "resolution": 1024}, "diffusers, examples/dreambooth/README_sdxl.md"),
        SD3: Recipe(FOUR | {"learning_rate": 4e-4, "resolution": 512}, "diffusers, examples/dreambooth/README_sd3.md"),
        FLUX: Recipe(
            FOUR | {"learning_rate": 1.0, "optimizer": "prodigy", "training_guidance_scale": 1.0, "resolution": 512},
            "diffusers, examples/dreambooth/README_flux.md",
        ),
        QWEN: Recipe(
            FOUR | {"learning_rate": 2e-4, "optimizer": "adamw8bit", "resolution": 1024},
            "diffusers, examples/dreambooth/README_qwen.md",
        ),
        Z_IMAGE: Recipe(WARMED_UP, "diffusers, examples/dreambooth/README_z_image.md"),
        FLUX_2: Recipe(
            WARMED_UP | {"training_guidance_scale": 1.0}, "diffusers, examples/dreambooth/README_flux2.md for dev"
        ),
        KLEIN: Recipe(WARMED_UP, "diffusers, examples/dreambooth/README_flux2.md for klein"),
    },
    "person": {
        SD: Recipe(
            {
                "rank": 64,
                "lora_alpha": 64.0,
                "learning_rate": 1e-4,
                "train_text_encoder": True,
                "text_encoder_lr": 5e-5,
                "train_batch_size": 3,
                "noise_offset": 0.05,
                "skip_clip_layers": 1,
                "optimizer": "adamw8bit",
                "lr_scheduler": "constant",
                "lr_warmup_steps": 0,
            },
            "kohya_ss, presets/lora/sd15 - EDG_LoraOptiSettings.json",
        ),
        XL: Recipe(
            {
                "rank": 32,
                "lora_alpha": 32.0,
                "learning_rate": 3e-5,
                "train_text_encoder": True,
                "text_encoder_lr": 3e-5,
                "train_batch_size": 3,
                "repeats": 3,
                "num_train_epochs": 50,
                "snr_gamma": 5.0,
                "caption_dropout_rate": 0.05,
                "resolution": 1024,
                "aspect_ratio_buckets": "auto",
                "lr_scheduler": "constant",
                "lr_warmup_steps": 0,
            },
            "kohya_ss, presets/lora/SDXL - LoRA AI_characters standard v1.1.json",
        ),
        SD3: Recipe(
            TOOLKIT | {"resolution": 1024, "weighting_scheme": "none", "precondition_outputs": 0},
            "ai-toolkit, config/examples/train_lora_sd35_large_24gb.yaml",
        ),
        FLUX: Recipe(TOOLKIT, "ai-toolkit, config/examples/train_lora_flux_24gb.yaml, at one resolution"),
    },
    "style": {
        XL: Recipe(
            ICONS | {"train_batch_size": 3, "snr_gamma": 5.0, "max_train_steps": 1000},
            "diffusers, examples/advanced_diffusion_training/README.md, without the learnt tokens",
        ),
        FLUX: Recipe(
            ICONS | {"train_batch_size": 1, "max_train_steps": 700},
            "diffusers, examples/advanced_diffusion_training/README_flux.md, without the learnt tokens",
        ),
    },
}


def not_given(recipe: Recipe, given: set[str]) -> dict[str, Any]:
    """The settings of a recipe that nothing else decides."""
    decided = given | (LENGTH if given & LENGTH else set())
    return {name: value for name, value in recipe.values.items() if name not in decided}
