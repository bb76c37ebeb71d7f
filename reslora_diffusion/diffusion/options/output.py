"""Options on what a run writes: checkpoints, validation images, logs and the exported files."""

from dataclasses import dataclass
from pathlib import Path

from ...utils.options import option
from .model import FLUX, FLUX_2, KLEIN, LUMINA_2, SANA, SD3, Z_IMAGE


@dataclass
class OutputOptions:
    """Output."""

    output_dir: str = option(
        "lora-dreambooth-model",
        "Folder for everything that is written.",
        families={
            SD3: "sd3-dreambooth",
            **dict.fromkeys((FLUX, FLUX_2, KLEIN), "flux-dreambooth-lora"),
            Z_IMAGE: "z-image-dreambooth-lora",
            SANA: "sana-dreambooth-lora",
            LUMINA_2: "lumina2-dreambooth-lora",
        },
    )
    checkpointing_steps: int = option(
        500,
        "Steps from one checkpoint to the next.",
        at_least=1,
        kohya={"save_every_n_steps": ""},
    )
    checkpointing_epochs: int | None = option(
        None,
        "Passes over the data from one checkpoint to the next; overrides --checkpointing_steps. Files for ComfyUI and "
        "A1111 are then numbered by passes.",
        at_least=1,
        kohya={"save_every_n_epochs": ""},
    )
    checkpoints_total_limit: int | None = option(
        None,
        "Number of checkpoints to keep; older ones are removed.",
        at_least=1,
        kohya=dict.fromkeys(
            ("save_last_n_epochs", "save_last_n_epochs_state", "save_last_n_steps", "save_last_n_steps_state"),
            "which counts checkpoints",
        ),
    )
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint to continue from: a folder, or latest.", kohya={"resume": ""}
    )
    validation_prompt: list[str] | None = option(
        None,
        "One or more prompts; images of them are generated at the start, on schedule and at the end.",
    )
    sample_prompts: str | None = option(
        None,
        "File of further prompts (or its text), one a line, each with its own --w --h --d --s --l --n (width, height, "
        "seed, steps, guidance, negative prompt), as kohya's scripts read it; one image of each.",
    )
    num_validation_images: int = option(4, "Images of each validation prompt.", at_least=0)
    validation_epochs: int = option(
        50,
        "Passes over the data from one validation to the next.",
        at_least=1,
        kohya={"sample_every_n_epochs": "", "validate_every_n_epochs": ""},
    )
    validation_steps: int | None = option(
        None,
        "Steps from one validation to the next; overrides --validation_epochs.",
        at_least=1,
        kohya={"sample_every_n_steps": "", "validate_every_n_steps": ""},
    )
    keep_best: bool = option(
        False,
        "Export the validated step with the least loss on held-out images, instead of the last step; wants "
        "--validation_split or --validation_data_dir.",
    )
    num_inference_steps: int = option(25, "Denoising steps of validation and class images.", at_least=1)
    validation_guidance_scale: float | None = option(
        None, "Guidance of validation and class images (default: FLUX.1 3.5, others 7.5).", at_least=0
    )
    guidance_scale: float | None = option(
        None,
        "FLUX.1: --training_guidance_scale, as in diffusers' Flux script; other models: --validation_guidance_scale.",
        at_least=0,
        recorded=False,
    )
    save_precision: str = option("fp16", "Precision of the exported files.", choices=("fp32", "fp16", "bf16"))
    upcast_before_saving: bool = option(False, "The same as --save_precision fp32.", recorded=False)
    output_kohya_format: bool = option(
        False, "Files for kohya's programs are always written; this is diffusers' name for it."
    )
    export_name: str | None = option(
        None,
        "Name of the file for ComfyUI and A1111 (default: the name of --output_dir).",
        kohya={"output_name": ""},
    )
    report_to: str = option(
        "tensorboard",
        "Tracker of the run.",
        choices=("tensorboard", "wandb", "comet_ml", "all", "none"),
        kohya={"log_with": ""},
    )
    logging_dir: str = option("logs", "Folder of the tracker's files, inside --output_dir.")
    push_to_hub: bool = option(False, "Upload the exported files at the end.")
    hub_token: str | None = option(
        None,
        "Token of the hub; it is better to log in by `hf auth login`.",
        recorded=False,
        kohya={"huggingface_token": ""},
    )
    hub_model_id: str | None = option(
        None,
        "Repository on the hub (default: the name of --output_dir).",
        kohya={"huggingface_repo_id": "together with --push_to_hub"},
    )
    config: Path | None = option(
        None,
        "YAML, JSON or TOML file with options by name, or the run.json of an earlier run; the command line wins.",
        recorded=False,
        kohya={"config_file": ""},
    )
    dry_run: bool = option(
        False,
        "Print what would be trained on, and stop.",
        recorded=False,
        kohya={"debug_dataset": "which prints and shows no images"},
    )
