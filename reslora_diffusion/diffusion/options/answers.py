"""Answers to options of diffusers' and kohya's scripts that are not options here.

What is an option here under another name stands in the field of that option (`kohya=`). The rest is below: what is done
by default, and what is not here, because of what.
"""

from collections.abc import Iterable

from ...utils.options import facts_of
from .dreambooth import DreamBoothOptions

# Options of diffusers' scripts.
NOT_SUPPORTED = {
    "do_edm_style_training": "the noise levels are those of the model's own schedule",
    "enable_npu_flash_attention": "no such device was ever tested",
    "text_encoder_use_attention_mask": "only DeepFloyd's T5 uses one; Stable Diffusion's pipelines never pass it",
    "class_labels_conditioning": "only DeepFloyd's upscaler has class labels",
    "train_transformer_frac": "the UNet or transformer is trained in every step",
    "validation_images": "it serves DeepFloyd's upscaler; Stable Diffusion is validated by --validation_prompt",
}
# What diffusers' scripts for newer families have, and what to do or know instead.
INSTEAD = {
    "caption_dropout": "--caption_dropout_rate, which drops the captions of class images too",
    "offload": "not needed: text encoders and autoencoder are freed once they have encoded",
    "fsdp_text_encoder": "not needed: text encoders are freed once they have encoded",
    "remote_text_encoder": "not here: prompts are encoded on this machine, once, and kept by --encoding_cache_dir",
    "skip_final_inference": "not needed: images are generated for a --validation_prompt alone",
    "final_validation_prompt": "--validation_prompt with --validation_steps of the whole run",
    "bnb_quantization_config_path": "--quantization nf4 or --quantization int8",
    "do_fp8_training": "not here; --quantization float8wo holds the frozen denoiser in 8 bits",
    "text_encoder_out_layers": "not here: prompts are encoded as the pipeline encodes them",
    "system_prompt": "not here: prompts are encoded as the pipeline encodes them",
    "complex_human_instruction": "not here: prompts are encoded as the pipeline encodes them",
    "enable_vae_tiling": "not here: images are encoded one by one, once",
    **dict.fromkeys(
        ("pretrained_tokenizer_4_name_or_path", "pretrained_text_encoder_4_name_or_path"),
        "not needed: it belongs to HiDream, which is not trained here",
    ),
}
CLIP_SKIP = (
    "--clip_skip counts from 0 in diffusers and from 1 in kohya's scripts and A1111, so it is called "
    "--skip_clip_layers here: --skip_clip_layers 1 is diffusers' clip_skip=1 and kohya's --clip_skip 2"
)

FROM_MODEL = "the model's own files say it"
BY_LAUNCHER = "it belongs to accelerate launch and its configuration"
MODEL_FILES = "a model is one folder or hub name in diffusers' format, with all of its parts"
OTHER_PRECISION = "adapters are float32 and the frozen base is in --mixed_precision"

ON_DEVICE = (
    "no part of the model moves to the CPU, since backward would find its weights gone; --quantization, "
    "--gradient_checkpointing and FSDP save memory"
)
FP8 = (
    "--quantization float8wo (with the package torchao) stores linear layers in fp8 with a scale for each row, "
    "nearer to the base than fp8 without one"
)

# Options of kohya's scripts (train_network.py and its variants for SDXL, SD3 and FLUX.1).
DEFAULT_HERE = {
    "v2": FROM_MODEL,
    "model_type": FROM_MODEL,
    "sdpa": "attention is PyTorch's scaled_dot_product_attention",
    "use_flash_attn": "attention is PyTorch's scaled_dot_product_attention",
    "mem_eff_attn": "attention is PyTorch's scaled_dot_product_attention",
    "cache_text_encoder_outputs": "prompts are encoded once unless --train_text_encoder is given; on disk by "
    "--encoding_cache_dir",
    "cache_info": "images are read once, when they are encoded",
    "skip_cache_check": "entries of --encoding_cache_dir are found by their content",
    "persistent_data_loader_workers": "nothing is read from files after images were encoded once",
    "lowram": "text encoders and autoencoder are freed once they have encoded",
    "random_crop": "images are cropped at random unless --center_crop is given",
    "network_train_unet_only": "text encoders are trained only with --train_text_encoder",
    "network_module": "adapters are LoRA; --target_modules kohya chooses the layers of networks.lora, --conv_rank adds "
    "convolutions",
    "no_half_vae": "SDXL's autoencoder overflows in fp16: give --pretrained_vae_model_name_or_path with one that does "
    "not, or train in bf16",
    "save_state": "every checkpoint holds the state of the training",
    "save_state_on_train_end": "a run that is stopped saves the state of the training; a finished one needs none",
    "save_model_as": "files are safetensors, for diffusers and for kohya's programs",
    "use_safetensors": "files are safetensors, for diffusers and for kohya's programs",
    "sample_at_first": "--validation_prompt is rendered before the first step too",
    "log_config": "run.json and the tracker hold all options",
    "output_config": "run.json holds all options and can be given to --config",
    "skip_until_initial_step": "--resume_from_checkpoint continues with the images, noise and dropout that come next",
    "training_comment": "the headers of the exported files name base, prompt and settings",
    "dynamo_backend": "--compile uses inductor",
    "apply_t5_attn_mask": "text encoders are used as diffusers' pipelines use them",
    "apply_lg_attn_mask": "text encoders are used as diffusers' pipelines use them",
    "deepspeed": "launch with train_scripts/configs/accelerate/deepspeed_zero2.yaml",
    "zero_stage": BY_LAUNCHER,
    "ddp_timeout": BY_LAUNCHER,
    "ddp_gradient_as_bucket_view": "processes exchange the gradients of the adapters alone, without DDP",
    "ddp_static_graph": "processes exchange the gradients of the adapters alone, without DDP",
    "console_log_simple": "the program prints plain lines",
}
NOT_HERE = {
    "tokenizer_cache_dir": "tokenizers come with the model; HF_HOME says where downloads are stored",
    "use_lion_optimizer": "Lion is not among the optimizers; see --optimizer",
    "lr_scheduler_type": "schedules are those of --lr_scheduler",
    "lr_scheduler_args": "schedules are those of --lr_scheduler, with --lr_num_cycles and --lr_power",
    "lr_decay_steps": "schedules end with the run",
    "lr_scheduler_timescale": "schedules are those of --lr_scheduler",
    "lr_scheduler_min_lr_ratio": "schedules are those of --lr_scheduler",
    "fused_backward_pass": "the optimizer's state is that of the adapters, a few megabytes",
    "huggingface_repo_type": "--push_to_hub uploads to a model repository",
    "huggingface_path_in_repo": "--push_to_hub uploads to the top of the repository",
    "huggingface_repo_visibility": "create the repository with the visibility that it is to have, then --push_to_hub",
    "save_state_to_huggingface": "checkpoints stay on this machine",
    "resume_from_huggingface": "download the checkpoint, then --resume_from_checkpoint",
    "async_upload": "files are uploaded once, at the end",
    "save_n_epoch_ratio": "--checkpointing_steps counts steps",
    "full_fp16": OTHER_PRECISION,
    "full_bf16": OTHER_PRECISION,
    "fp8_base": FP8,
    "fp8_base_unet": FP8,
    "use_sage_attn": "attention is PyTorch's scaled_dot_product_attention, whose gradients are exact",
    "system_prompt": "Lumina 2 has the one of diffusers' pipeline before each prompt",
    "log_prefix": "--logging_dir names the folder",
    "log_tracker_name": "the project of a tracker is dreambooth-reslora",
    "wandb_run_name": "WANDB_NAME names the run",
    "log_tracker_config": "trackers read their own environment variables",
    "wandb_api_key": "log in by `wandb login`, or set WANDB_API_KEY",
    "highvram": "memory is freed as soon as encoding is over",
    "sample_sampler": "validation images are generated by the model's own scheduler",
    "text_encoder_batch_size": "prompts are encoded one by one, once",
    "disable_mmap_load_safetensors": "diffusers loads the model",
    "blocks_to_swap": ON_DEVICE,
    "split_mode": ON_DEVICE,
    "cpu_offload_checkpointing": "activations are recomputed (--gradient_checkpointing), not moved",
    "color_aug": "images are encoded once, before training",
    "face_crop_aug_range": "images are cropped at random or in their centre",
    "vae_batch_size": "images are encoded one by one, once",
    "dataset_class": "data are folders (--instance_data_dir, --concepts) or datasets (--dataset_name)",
    "in_json": "captions stand in metadata.jsonl or beside the images",
    "no_metadata": "a file without its base and settings cannot be traced",
    "network_args": "ranks of single layers are --rank_pattern, learning rates --lr_pattern, conv_dim is --conv_rank",
    "network_train_text_encoder_only": "the UNet or transformer is always trained",
    "dim_from_weights": "`reslora inspect FILE` prints the rank for --rank",
    "base_weights": "merge first: `reslora merge FILE --base MODEL OUT`, then train on OUT",
    "base_weights_multiplier": "merge first: `reslora merge FILE --base MODEL OUT`, then train on OUT",
    "initial_epoch": "--resume_from_checkpoint knows where a checkpoint ends",
    "initial_step": "--resume_from_checkpoint knows where a checkpoint ends",
    "validation_seed": "--validation_split holds out the same images for every seed",
    "max_validation_steps": "validation uses all held-out images",
    "gemma2": MODEL_FILES,
    "clip_l": MODEL_FILES,
    "clip_g": MODEL_FILES,
    "t5xxl": MODEL_FILES,
    "ae": MODEL_FILES,
    "controlnet_model_name_or_path": "there is no ControlNet in the training",
    "model_prediction_type": "the loss compares velocities or images, see --precondition_outputs",
    "save_clip": "only the adapters are saved",
    "save_t5xxl": "only the adapters are saved",
    "t5xxl_device": "text encoders are on the device of the training until they have encoded",
    "t5xxl_dtype": OTHER_PRECISION,
    "clip_l_dropout_rate": "--caption_dropout_rate drops captions for all text encoders",
    "clip_g_dropout_rate": "--caption_dropout_rate drops captions for all text encoders",
    "t5_dropout_rate": "--caption_dropout_rate drops captions for all text encoders",
    "pos_emb_random_crop_rate": "position embeddings are used as diffusers uses them",
    "enable_scaled_pos_embed": "position embeddings are used as diffusers uses them",
    **dict.fromkeys(
        ("offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path"),
        BY_LAUNCHER,
    ),
    **dict.fromkeys(
        ("zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients"), "ZeRO-3 is not supported"
    ),
    **dict.fromkeys(("console_log_level", "console_log_file"), "the program prints plain lines; redirect them"),
    **{
        f"metadata_{name}": "the headers of the exported files are made from the options"
        for name in "title author description license tags usage_hint thumbnail merged_from trigger_phrase "
        "preprocessor is_negative_embedding".split()
    },
}


def renamed() -> dict[str, tuple[str, str]]:
    """Option here and remark, by the name in kohya's scripts."""
    return {
        old: (name, remark)
        for name, facts in facts_of(DreamBoothOptions).items()
        for old, remark in facts.kohya.items()
    }


def answer(name: str) -> str | None:
    """Return the answer to an option, without its dashes, that is not here; None if nothing is known of it."""
    if name == "clip_skip":
        return CLIP_SKIP
    if name in INSTEAD:
        what = INSTEAD[name]
        return f"--{name} of diffusers' scripts is {what}" + (" here" if what.startswith("--") else "")
    if name in NOT_SUPPORTED:
        return f"--{name} is not supported, because {NOT_SUPPORTED[name]}"
    if name in (others := renamed()):
        ours, remark = others[name]
        return f"--{name} of kohya's scripts is --{ours} here{', ' if remark else ''}{remark}"
    if name in DEFAULT_HERE:
        return f"--{name} of kohya's scripts is not needed: {DEFAULT_HERE[name]}"
    if name in NOT_HERE:
        return f"--{name} of kohya's scripts is not here: {NOT_HERE[name]}"
    return None


def unanswered(names: Iterable[str]) -> list[str]:
    """Return kohya's options that are neither here nor answered."""
    here = set(facts_of(DreamBoothOptions))
    return [name for name in names if name not in here and answer(name) is None]
