"""Flags and defaults of other trainers, taken from their sources by machine; nothing here is written by hand.

DIFFUSERS  examples/dreambooth/train_dreambooth_lora{,_sdxl,_sd3,_flux,_flux2,_flux2_klein,_qwen_image,_z_image,_sana,
           _lumina2}.py of diffusers 0.40 (58eb52c)
KOHYA      options of train_network.py, its variants for SDXL, SD3, FLUX.1, Lumina 2 and their libraries, of sd-scripts
           (48d368f)
DATASETS   keys that library/config_util.py of sd-scripts takes in a file of datasets
NETWORKS   network_args that networks/lora.py, lora_fa.py, lora_flux.py and lora_sd3.py of sd-scripts read
"""

EVERYWHERE = {
    "pretrained_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "instance_data_dir": None,
    "class_data_dir": None,
    "instance_prompt": None,
    "class_prompt": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "seed": None,
    "center_crop": False,
    "train_text_encoder": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-08,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "prior_generation_precision": None,
    "local_rank": -1,
    "rank": 4,
    "lora_dropout": 0.0,
}
OF_FAMILY = {
    "StableDiffusionPipeline": {
        "tokenizer_name": None,
        "output_dir": "lora-dreambooth-model",
        "resolution": 512,
        "learning_rate": 0.0005,
        "adam_weight_decay": 0.01,
        "enable_xformers_memory_efficient_attention": False,
        "pre_compute_text_embeddings": False,
        "tokenizer_max_length": None,
        "text_encoder_use_attention_mask": False,
        "validation_images": None,
        "class_labels_conditioning": None,
        "image_interpolation_mode": "lanczos",
    },
    "StableDiffusionXLPipeline": {
        "pretrained_vae_model_name_or_path": None,
        "dataset_name": None,
        "dataset_config_name": None,
        "cache_dir": None,
        "image_column": "image",
        "caption_column": None,
        "repeats": 1,
        "do_edm_style_training": False,
        "output_dir": "lora-dreambooth-model",
        "output_kohya_format": False,
        "resolution": 1024,
        "random_flip": False,
        "learning_rate": 0.0001,
        "text_encoder_lr": 5e-06,
        "snr_gamma": None,
        "optimizer": "AdamW",
        "prodigy_beta3": None,
        "prodigy_decouple": True,
        "adam_weight_decay": 0.0001,
        "adam_weight_decay_text_encoder": 0.001,
        "prodigy_use_bias_correction": True,
        "prodigy_safeguard_warmup": True,
        "enable_xformers_memory_efficient_attention": False,
        "use_dora": False,
        "image_interpolation_mode": "lanczos",
    },
    "StableDiffusion3Pipeline": {
        "dataset_name": None,
        "dataset_config_name": None,
        "cache_dir": None,
        "image_column": "image",
        "caption_column": None,
        "repeats": 1,
        "max_sequence_length": 77,
        "output_dir": "sd3-dreambooth",
        "resolution": 512,
        "random_flip": False,
        "learning_rate": 0.0001,
        "text_encoder_lr": 5e-06,
        "weighting_scheme": "logit_normal",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mode_scale": 1.29,
        "precondition_outputs": 1,
        "optimizer": "AdamW",
        "prodigy_beta3": None,
        "prodigy_decouple": True,
        "adam_weight_decay": 0.0001,
        "adam_weight_decay_text_encoder": 0.001,
        "lora_layers": None,
        "lora_blocks": None,
        "prodigy_use_bias_correction": True,
        "prodigy_safeguard_warmup": True,
        "cache_latents": False,
        "upcast_before_saving": False,
    },
    "FluxPipeline": {
        "dataset_name": None,
        "dataset_config_name": None,
        "cache_dir": None,
        "image_column": "image",
        "caption_column": None,
        "repeats": 1,
        "max_sequence_length": 512,
        "lora_alpha": 4,
        "output_dir": "flux-dreambooth-lora",
        "resolution": 512,
        "random_flip": False,
        "learning_rate": 0.0001,
        "guidance_scale": 3.5,
        "text_encoder_lr": 5e-06,
        "weighting_scheme": "none",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mode_scale": 1.29,
        "optimizer": "AdamW",
        "prodigy_beta3": None,
        "prodigy_decouple": True,
        "adam_weight_decay": 0.0001,
        "adam_weight_decay_text_encoder": 0.001,
        "lora_layers": None,
        "prodigy_use_bias_correction": True,
        "prodigy_safeguard_warmup": True,
        "cache_latents": False,
        "upcast_before_saving": False,
        "enable_npu_flash_attention": False,
    },
}
FROZEN_TEXT = {
    "dataset_name": None,
    "dataset_config_name": None,
    "cache_dir": None,
    "image_column": "image",
    "caption_column": None,
    "repeats": 1,
    "resolution": 512,
    "random_flip": False,
    "learning_rate": 0.0001,
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "optimizer": "AdamW",
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 0.0001,
    "lora_layers": None,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "cache_latents": False,
    "upcast_before_saving": False,
    "offload": False,
}
WITH_BUCKETS = FROZEN_TEXT | {
    "bnb_quantization_config_path": None,
    "max_sequence_length": 512,
    "skip_final_inference": False,
    "final_validation_prompt": None,
    "lora_alpha": 4,
    "aspect_ratio_buckets": None,
    "use_aspect_ratio_buckets": False,
}
WITH_FP8 = WITH_BUCKETS | {
    "do_fp8_training": False,
    "guidance_scale": 3.5,
    "text_encoder_lr": 5e-06,
    "adam_weight_decay_text_encoder": 0.001,
    "enable_npu_flash_attention": False,
    "fsdp_text_encoder": False,
}
OF_FAMILY["QwenImagePipeline"] = WITH_BUCKETS | {
    "pretrained_tokenizer_4_name_or_path": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "pretrained_text_encoder_4_name_or_path": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "output_dir": "hidream-dreambooth-lora",
    "caption_dropout": 0.0,
}
OF_FAMILY["ZImagePipeline"] = WITH_FP8 | {"output_dir": "z-image-dreambooth-lora"}
OF_FAMILY["Flux2Pipeline"] = WITH_FP8 | {
    "text_encoder_out_layers": [10, 20, 30],
    "output_dir": "flux-dreambooth-lora",
    "remote_text_encoder": False,
}
OF_FAMILY["Flux2KleinPipeline"] = WITH_FP8 | {
    "text_encoder_out_layers": [10, 20, 30],
    "output_dir": "flux-dreambooth-lora",
    "caption_dropout": 0.0,
}
OF_FAMILY["SanaPipeline"] = FROZEN_TEXT | {
    "max_sequence_length": 300,
    "complex_human_instruction": None,
    "lora_alpha": 4,
    "output_dir": "sana-dreambooth-lora",
    "adam_weight_decay_text_encoder": 0.001,
    "enable_vae_tiling": False,
    "enable_npu_flash_attention": False,
}
OF_FAMILY["Lumina2Pipeline"] = FROZEN_TEXT | {
    "max_sequence_length": 256,
    "system_prompt": None,
    "final_validation_prompt": None,
    "output_dir": "lumina2-dreambooth-lora",
    "image_interpolation_mode": "lanczos",
}
ABSENT = {
    "QwenImagePipeline": ["train_text_encoder", "prior_generation_precision"],
    "ZImagePipeline": ["train_text_encoder"],
    "Flux2Pipeline": ["train_text_encoder"],
    "Flux2KleinPipeline": ["train_text_encoder"],
    "SanaPipeline": ["train_text_encoder", "prior_generation_precision"],
    "Lumina2Pipeline": ["train_text_encoder", "prior_generation_precision"],
}  # that all others have
DIFFUSERS = {
    family: {name: value for name, value in (EVERYWHERE | own).items() if name not in ABSENT.get(family, ())}
    for family, own in OF_FAMILY.items()
}
KOHYA = """
adaptive_noise_scale ae alpha_mask apply_lg_attn_mask apply_t5_attn_mask async_upload base_weights
base_weights_multiplier blocks_to_swap bucket_no_upscale bucket_reso_steps cache_info cache_latents
cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk
caption_dropout_every_n_epochs caption_dropout_rate caption_extension caption_extention caption_prefix
caption_separator caption_suffix caption_tag_dropout_rate clip_g clip_g_dropout_rate clip_l
clip_l_dropout_rate clip_skip color_aug conditioning_data_dir config_file console_log_file
console_log_level console_log_simple controlnet_model_name_or_path cpu_offload_checkpointing dataset_class
dataset_config dataset_repeats ddp_gradient_as_bucket_view ddp_static_graph ddp_timeout
debiased_estimation_loss debug_dataset deepspeed dim_from_weights disable_mmap_load_safetensors
discrete_flow_shift dynamo_backend enable_bucket enable_scaled_pos_embed enable_wildcard
face_crop_aug_range flip_aug fp16_master_weights_and_gradients fp8_base fp8_base_unet full_bf16 full_fp16
fused_backward_pass gemma2 gemma2_max_token_length gradient_accumulation_steps gradient_checkpointing
guidance_scale highvram huber_c huber_scale huber_schedule huggingface_path_in_repo huggingface_repo_id
huggingface_repo_type huggingface_repo_visibility huggingface_token in_json initial_epoch initial_step
ip_noise_gamma ip_noise_gamma_random_strength keep_tokens keep_tokens_separator learning_rate log_config
log_prefix log_tracker_config log_tracker_name log_with logging_dir logit_mean logit_std loss_type lowram
lr_decay_steps lr_scheduler lr_scheduler_args lr_scheduler_min_lr_ratio lr_scheduler_num_cycles
lr_scheduler_power lr_scheduler_timescale lr_scheduler_type lr_warmup_steps masked_loss max_bucket_reso
max_data_loader_n_workers max_grad_norm max_timestep max_token_length max_train_epochs max_train_steps
max_validation_steps mem_eff_attn metadata_author metadata_description metadata_is_negative_embedding
metadata_license metadata_merged_from metadata_preprocessor metadata_tags metadata_thumbnail
metadata_title metadata_trigger_phrase metadata_usage_hint min_bucket_reso min_snr_gamma min_timestep
mixed_precision mode_scale model_prediction_type model_type multires_noise_discount
multires_noise_iterations network_alpha network_args network_dim network_dropout network_module
network_train_text_encoder_only network_train_unet_only network_weights no_half_vae no_metadata
noise_offset noise_offset_random_strength offload_optimizer_device offload_optimizer_nvme_path
offload_param_device offload_param_nvme_path optimizer_args optimizer_type output_config output_dir
output_name persistent_data_loader_workers pos_emb_random_crop_rate pretrained_model_name_or_path
prior_loss_weight random_crop reg_data_dir resize_interpolation resolution resume resume_from_huggingface
sample_at_first sample_batch_size sample_every_n_epochs sample_every_n_steps sample_prompts sample_sampler
save_clip save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state
save_last_n_steps save_last_n_steps_state save_model_as save_n_epoch_ratio save_precision save_state
save_state_on_train_end save_state_to_huggingface save_t5xxl scale_v_pred_loss_like_noise_pred
scale_weight_norms sdpa secondary_separator seed shuffle_caption sigmoid_scale skip_cache_check
skip_until_initial_step split_mode system_prompt t5_dropout_rate t5xxl t5xxl_device t5xxl_dtype
t5xxl_max_token_length text_encoder_batch_size text_encoder_lr timestep_sampling token_warmup_min
token_warmup_step tokenizer_cache_dir torch_compile train_batch_size train_data_dir training_comment
training_shift unet_lr use_8bit_adam use_flash_attn use_lion_optimizer use_safetensors use_sage_attn v2
v_parameterization v_pred_like_loss vae vae_batch_size validate_every_n_epochs validate_every_n_steps
validation_seed validation_split wandb_api_key wandb_run_name weighted_captions weighting_scheme xformers
zero3_init_flag zero3_save_16bit_model zero_stage zero_terminal_snr
""".split()
DATASETS = """
alpha_mask batch_size bucket_no_upscale bucket_reso_steps cache_info caption_dropout_every_n_epochs
caption_dropout_rate caption_extension caption_prefix caption_separator caption_suffix
caption_tag_dropout_rate class_tokens color_aug conditioning_data_dir custom_attributes enable_bucket
enable_wildcard face_crop_aug_range flip_aug image_dir is_reg keep_tokens keep_tokens_separator
max_bucket_reso metadata_file min_bucket_reso network_multiplier num_repeats random_crop
resize_interpolation resolution secondary_separator shuffle_caption subsets token_warmup_min
token_warmup_step validation_seed validation_split
""".split()
NETWORKS = """
block_alphas block_dims block_lr_zero_threshold context_attn_dim context_mlp_dim context_mod_dim
conv_alpha conv_block_alphas conv_block_dims conv_dim down_lr_weight emb_dims ggpo_beta ggpo_sigma
img_attn_dim img_mlp_dim img_mod_dim in_dims loraplus_lr_ratio loraplus_text_encoder_lr_ratio
loraplus_unet_lr_ratio mid_lr_weight module_dropout network_reg_dims network_reg_lrs rank_dropout
single_dim single_mod_dim split_qkv train_block_indices train_blocks train_double_block_indices
train_single_block_indices train_t5xxl txt_attn_dim txt_mlp_dim txt_mod_dim up_lr_weight verbose
x_attn_dim x_mlp_dim x_mod_dim
""".split()
