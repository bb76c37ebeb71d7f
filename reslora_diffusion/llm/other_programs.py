"""`--config` takes the YAML of a plain fine-tuning by axolotl or LLaMA-Factory: every key is translated or answered.

    translate({"base_model": "Qwen/Qwen3-0.6B", "lora_r": 8, "sample_packing": True, "wandb_watch": None, ...})
    values    {"model_name_or_path": "Qwen/Qwen3-0.6B", "rank": 8, "packing": True, ...}
    notes     what has no counterpart here and changes no result, or is done otherwise
    problems  what would change what is trained and is not done here

Keys that are null, false or empty count as not given, as they do there; 0 is a value. The defaults of those programs
are taken over where they decide what is trained; the command line wins over the file.
"""

from collections.abc import Mapping
from typing import Any

from ..utils.problems import BAD_DATA, printable
from .other_answers import OF_AXOLOTL, OF_FACTORY, longest
from .other_translation import Translation

RENAMED = {  # of both
    "output_dir": "output_dir",
    "seed": "seed",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "max_steps": "max_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "auto_find_batch_size": "auto_find_batch_size",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "ddp_find_unused_parameters": "ddp_find_unused_parameters",
    "warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share here
    "logging_steps": "logging_steps",
    "save_total_limit": "save_total_limit",
    "save_only_model": "save_only_model",
    "save_strategy": "save_strategy",
    "save_steps": "save_steps",
    "eval_strategy": "eval_strategy",
    "eval_steps": "eval_steps",
    "load_best_model_at_end": "load_best_model_at_end",
    "resume_from_checkpoint": "resume_from_checkpoint",
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "tf32": "tf32",
    "torch_compile": "torch_compile",
    "deepspeed": "deepspeed",
    "ddp_timeout": "ddp_timeout",
    "hub_model_id": "hub_model_id",
    "dataloader_num_workers": "dataloader_num_workers",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "report_to": "report_to",
    "run_name": "run_name",
}
AXOLOTL = RENAMED | {
    "base_model": "model_name_or_path",
    "revision_of_base_model": "model_revision",
    "revision_of_model": "model_revision",
    "adam_eps": "adam_epsilon",
    "torch_compile_mode": "torch_compile_mode",
    "tokenizer_config": "tokenizer_name",
    "lora_r": "rank",
    "lora_target_modules": "target_modules",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "chunked_cross_entropy": "chunked_loss",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "attn_implementation": "attn_implementation",
    "wandb_name": "run_name",
    "wandb_run_id": "run_name",
}
FACTORY = RENAMED | {
    "model_name_or_path": "model_name_or_path",
    "model_revision": "model_revision",
    "lora_rank": "rank",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "cutoff_len": "max_length",
    "packing": "packing",
    "neat_packing": "packing",
    "max_samples": "max_train_examples",
    "per_device_train_batch_size": "per_device_train_batch_size",
    "per_device_eval_batch_size": "per_device_eval_batch_size",
    "num_train_epochs": "num_train_epochs",
    "optim": "optim",
    "lr_scheduler_type": "lr_scheduler_type",
    "enable_liger_kernel": "use_liger_kernel",
}
WITHOUT_EFFECT = {  # on what is trained; by program
    "axolotl": """model_type tokenizer_type is_llama_derived_model is_mistral_derived_model strict dataset_prepared_path
        pad_to_sequence_len eval_sample_packing debug wandb_entity wandb_watch wandb_log_model
        dataset_processes liger_rope liger_rms_norm liger_glu_activation liger_fused_linear_cross_entropy
        lora_qkv_kernel lora_o_kernel lora_mlp_kernel save_safetensors auto_resume_from_checkpoints trust_remote_code
        dataloader_prefetch_factor dataloader_pin_memory logging_dir eval_table_size shuffle_merged_datasets
        lora_fan_in_fan_out s2_attention early_stopping_patience local_rank ddp output_dir_prefix
        chunked_cross_entropy_num_chunks liger_layer_norm liger_rms_norm_gated loss_watchdog_threshold
        loss_watchdog_patience low_cpu_mem_usage tokenizer_use_fast tokenizer_legacy hf_use_auth_token gptq
        gptq_disable_exllama eval_max_new_tokens eval_causal_lm_metrics do_causal_lm_eval fused_attn_kernel use_kernels
        cut_cross_entropy use_otel_metrics otel_metrics_host otel_metrics_port eot_tokens""".split(),
    "LLaMA-Factory": """do_train do_eval overwrite_cache preprocessing_num_workers plot_loss trust_remote_code
        overwrite_output_dir dataset_dir media_dir cache_dir logging_dir quantization_method double_quantization
        disable_gradient_checkpointing dataloader_pin_memory use_fast_tokenizer include_num_input_tokens_seen
        ray_run_name save_safetensors upcast_layernorm flash_attn_version image_max_pixels video_max_pixels video_fps
        video_maxlen freeze_vision_tower freeze_multi_modal_projector""".split(),
}
REFUSED = {
    "rl": "preferences and rewards are learned by reslora dpo and reslora grpo",
    "lora_model_dir": "adapters are not trained on from a folder",
    "adapter_name_or_path": "adapters are not trained on from a folder",
    "lora_modules_to_save": "whole modules are not trained beside the adapter here",
    "additional_target": "whole modules are not trained beside the adapter here",
    "pissa_init": "PiSSA changes the base, which the export is for",
    "loraplus_lr_ratio": "both factors have one learning rate",
    "loraplus_lr_embedding": "both factors have one learning rate",
    "train_on_inputs": "only answers are learned; rows of 'text' are learned as a whole",
    "train_on_prompt": "only answers are learned; rows of 'text' are learned as a whole",
    "mask_history": "every answer of a conversation is learned; rows say by 'weight': 0 which is not",
    "fsdp": "wanted a file of accelerate's, such as train_scripts/configs/accelerate/fsdp2.yaml",
    "fsdp_config": "wanted a file of accelerate's, see fsdp",
    "fsdp_version": "wanted a file of accelerate's, see fsdp",
    "use_unsloth": "Unsloth's kernels pass shortcuts by",
    "unsloth_lora_mlp": "Unsloth's kernels pass shortcuts by",
    "tokens": "no tokens are added to the vocabulary",
    "add_tokens": "no tokens are added to the vocabulary",
    "resize_vocab": "no tokens are added to the vocabulary",
    "test_datasets": "validation rows are a share of train, or validation.jsonl beside it",
    "eval_dataset": "validation rows are a share of train, or validation.jsonl beside it",
    "streaming": "rows are read as a whole",
    "pretraining_dataset": "rows are read as a whole",
}


DEFAULTS: dict[str, dict[str, Any]] = {  # of the programs, where ours differ
    "axolotl": {
        "drop_long": True,
        "max_length": 512,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "seed": 42,
    },
    "LLaMA-Factory": {
        "cut_long": True,
        "max_length": 2048,
        "rank": 8,
        "target_modules": ["all-linear"],
        "learning_rate": 5e-5,
        "warmup_steps": 0,
        "seed": 42,
    },
}
NOTHING_APART = 1e-9  # a share of the rows that is rounded up to one


def program_of(config: Mapping[str, Any]) -> str | None:
    """Whose YAML it is; None for our own."""
    if "base_model" in config:
        return "axolotl"
    return "LLaMA-Factory" if config.keys() & {"stage", "finetuning_type", "lora_rank", "cutoff_len"} else None


def translate(config: Mapping[str, Any]) -> Translation | None:
    """Options of ours from another program's; None if the options are ours already."""
    if (program := program_of(config)) is None:
        return None
    found = Translation(program)
    names, special = (AXOLOTL, OF_AXOLOTL) if program == "axolotl" else (FACTORY, OF_FACTORY)
    given = {name: value for name, value in config.items() if not is_unset(value)}
    model = str(given.get("base_model") or given.get("model_name_or_path"))
    found.values |= DEFAULTS[program] | {"max_length": longest(model, DEFAULTS[program]["max_length"])}
    for name, value in given.items():
        if name in special:
            try:
                special[name](found, value, given)
            except BAD_DATA:
                found.problems.append(f"{program}'s {name}: got {printable(value, 80)!r}, which is not understood")
        elif name in names:
            found.values[names[name]] = value
        elif name in REFUSED:
            found.problems.append(f"{program}'s {name}: {REFUSED[name]}; wanted it removed")
        elif name in WITHOUT_EFFECT[program]:
            found.notes.append(f"{program}'s {name}: changes nothing here")
        else:
            found.problems.append(f"{program}'s {name}: is not understood; wanted an option of ours, or it removed")
    if program == "axolotl" and not given.get("adapter"):
        found.problems.append("axolotl's adapter: got nothing, which trains the whole model; wanted lora or qlora")
    match_evaluations(found)
    return found


def is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def match_evaluations(found: Translation) -> None:
    """Say when to evaluate and to save. Without validation rows all but one are learned, and the last step is exported,
    as it is where only saving is asked for by steps. Otherwise every evaluation saves, and the best is exported."""
    values = found.values
    last: dict[str, Any] = {"eval_strategy": "no", "load_best_model_at_end": False}
    by_steps: dict[str, Any] = {"save_strategy": "steps"} if "save_steps" in values else {}
    if "validation_fraction" not in values:
        values.pop("eval_steps", None)
        values |= {"validation_fraction": NOTHING_APART} | last | by_steps
        found.notes.append(
            f"{found.program}'s share of validation: is 0, so all rows but one of a set are learned and the last step "
            "is exported; --validation_fraction sets rows apart, of which --eval_strategy epoch --keep_best picks one"
        )
    elif values.get("eval_strategy") == "no" or (by_steps and not values.keys() & {"eval_steps", "eval_strategy"}):
        values |= last | by_steps
    elif "eval_steps" in values:
        values |= {"eval_strategy": "steps", "save_strategy": "steps"}
        values["save_steps"] = values.get("save_steps", values["eval_steps"])
    elif values.get("eval_strategy") == "epoch":
        values["save_strategy"] = "epoch"
