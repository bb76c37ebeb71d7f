"""The options of `transformers.TrainingArguments` that the language-model scripts offer, with the scripts' defaults.

Importing the class itself takes seconds, for torch; `--help` and a bad command line should not. The class still decides
what values mean and which of them go together: `options.training_arguments` makes one of what was given.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..utils.options import option

Interval = Literal["no", "steps", "epoch"]


@dataclass
class TrainingOptions:
    """Length, speed and place of a training; the documentation of `TrainingArguments` says more on each."""

    problems: list[str] = field(default_factory=list)  # with the words that gave the options
    output_dir: str | None = option(None, "Where checkpoints, records and the exported LoRA are written.")
    # How long
    num_train_epochs: float = option(3.0, "Passes over the training examples.")
    max_steps: int = option(-1, "Optimizer steps, in place of --num_train_epochs.")
    per_device_train_batch_size: int = option(8, "Examples, or packs, in a batch of each device.")
    gradient_accumulation_steps: int = option(1, "Batches whose gradients are summed up for one step.")
    auto_find_batch_size: bool = option(False, "Halve the batch size until the memory suffices.")
    # How fast
    learning_rate: float = option(5e-4, "Largest learning rate.")
    lr_scheduler_type: str = option("linear", "linear, cosine, constant, constant_with_warmup, ...")
    lr_scheduler_kwargs: str | None = option(None, "Further arguments of the schedule, as JSON.")
    warmup_steps: float = option(0.06, "Steps until the largest learning rate; below 1 a share of all steps.")
    optim: str = option("adamw_torch_fused", "adamw_torch, adamw_bnb_8bit, adafactor, sgd, ...")
    optim_args: str | None = option(None, "Further arguments of the optimizer.")
    optim_target_modules: list[str] | None = option(None, "Layers that GaLore and APOLLO project.")
    weight_decay: float = option(0.0, "Weight decay, but for biases and norms.")
    adam_beta1: float = option(0.9, "Decay of the mean of gradients.")
    adam_beta2: float = option(0.999, "Decay of the mean of squared gradients.")
    adam_epsilon: float = option(1e-8, "What is added to the root of squared gradients.")
    max_grad_norm: float = option(1.0, "Norm that gradients are clipped to; 0 for none.")
    label_smoothing_factor: float = option(0.0, "Share of a label that is spread over all classes.")
    neftune_noise_alpha: float | None = option(None, "Noise on embeddings while training (NEFTune).")
    average_tokens_across_devices: bool = option(True, "Weight every token alike, on whichever device it is.")
    # Precision, memory and speed
    bf16: bool = option(False, "Compute under autocast to bfloat16; better hold the frozen base in it by --dtype.")
    fp16: bool = option(False, "Compute under autocast to float16.")
    bf16_full_eval: bool = option(False, "Evaluate in bfloat16.")
    fp16_full_eval: bool = option(False, "Evaluate in float16.")
    tf32: bool | None = option(None, "Multiply float32 matrices in TF32, on Ampere and newer GPUs.")
    activation_checkpointing: bool | None = option(None, "Compute activations again in the backward pass: less memory.")
    activation_checkpointing_kwargs: str | None = option(None, "Arguments of that, as JSON.")
    gradient_checkpointing: bool | None = option(None, "Older name of --activation_checkpointing.")
    gradient_checkpointing_kwargs: str | None = option(None, "Older name of --activation_checkpointing_kwargs.")
    torch_compile: bool = option(False, "Compile the model.")
    torch_compile_backend: str | None = option(None, "Backend of torch.compile.")
    torch_compile_mode: str | None = option(None, "Mode of torch.compile.")
    use_liger_kernel: bool = option(False, "Use Liger's kernels.")
    torch_empty_cache_steps: int | None = option(None, "Empty the cache of the device's memory after so many steps.")
    use_cpu: bool = option(False, "Train on the CPU though there is something faster.")
    # Evaluation, and the best step
    eval_strategy: Interval = option("epoch", "When to evaluate.")
    eval_steps: float | None = option(
        None, "Steps between evaluations (default: logging_steps); below 1 a share of all."
    )
    eval_delay: float = option(0, "Epochs or steps before the first evaluation.")
    eval_on_start: bool = option(False, "Evaluate before the first step.")
    per_device_eval_batch_size: int = option(8, "Examples, or questions, in a batch of an evaluation.")
    eval_accumulation_steps: int | None = option(None, "Batches after which predictions are moved to the CPU.")
    load_best_model_at_end: bool = option(
        True, "Export the best step on validation rows rather than the last.", aliases=("keep_best",)
    )
    metric_for_best_model: str | None = option(
        None, "What chooses the best step (default: the task's metric, or loss)."
    )
    greater_is_better: bool | None = option(None, "Whether that should be large (default: unless it is a loss).")
    # Checkpoints
    save_strategy: Literal["no", "steps", "epoch", "best"] = option("epoch", "When to write a checkpoint.")
    save_steps: float = option(500, "Steps between checkpoints; below 1 a share of all.")
    save_total_limit: int | None = option(2, "Checkpoints that are kept; the best is always among them.")
    save_only_model: bool = option(False, "Write no optimizer state: such checkpoints cannot be continued from.")
    save_on_each_node: bool = option(False, "Write on every node rather than on the first.")
    enable_jit_checkpoint: bool = option(False, "Write a checkpoint on SIGTERM.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint's folder, or latest.")
    ignore_data_skip: bool = option(False, "Begin a continued run with the first examples again.")
    restore_callback_states_from_checkpoint: bool = option(False, "Take the state of callbacks from the checkpoint.")
    # Logs
    logging_strategy: Interval = option("steps", "When to log.")
    logging_steps: float = option(10, "Steps between logs; below 1 a share of all.")
    logging_first_step: bool = option(False, "Log the first step too.")
    logging_nan_inf_filter: bool = option(True, "Leave losses that are not finite out of logs.")
    log_level: str = option("passive", "debug, info, warning, error, critical or passive.")
    log_level_replica: str = option("warning", "The same of processes other than the first.")
    log_on_each_node: bool = option(True, "Log on every node rather than on the first.")
    disable_tqdm: bool | None = option(None, "Show no progress bars.")
    report_to: list[str] = option(["none"], "tensorboard, wandb, trackio, ..., all or none.")
    run_name: str | None = option(None, "Name of the run for trackers.")
    project: str = option("huggingface", "Name of the project for Trackio.")
    trackio_space_id: str | None = option(None, "Space that Trackio logs to.")
    trackio_bucket_id: str | None = option(None, "Bucket of that Space.")
    # The hub
    push_to_hub: bool = option(False, "Upload the exported LoRA at the end.")
    hub_model_id: str | None = option(None, "Repository (default: the name of --output_dir).")
    hub_private_repo: bool | None = option(None, "Make the repository private.")
    hub_token: str | None = option(None, "Better log in by `hf auth login`.")
    # Data
    seed: int = option(0, "Of splits, order, dropout and fresh factors.")
    data_seed: int | None = option(None, "Of the order alone (default: the seed).")
    full_determinism: bool = option(False, "Use deterministic kernels only.")
    train_sampling_strategy: str = option("random", "random, sequential, group_by_length or batch_rebalance.")
    dataloader_drop_last: bool = option(False, "Leave out the last batch if it is not full.")
    dataloader_num_workers: int = option(0, "Processes that make batches.")
    dataloader_pin_memory: bool = option(True, "Make batches in memory that a GPU copies from faster.")
    dataloader_persistent_workers: bool = option(False, "Keep those processes from pass to pass.")
    dataloader_prefetch_factor: int | None = option(None, "Batches that each of them makes in advance.")
    # Several devices
    ddp_backend: str | None = option(None, "nccl, gloo, mpi, xccl or hccl.")
    ddp_timeout: int = option(1800, "Seconds to wait for other processes.")
    ddp_find_unused_parameters: bool | None = option(None, "Of DistributedDataParallel.")
    ddp_bucket_cap_mb: int | None = option(None, "Of DistributedDataParallel.")
    ddp_broadcast_buffers: bool | None = option(None, "Of DistributedDataParallel.")
    ddp_static_graph: bool | None = option(None, "Of DistributedDataParallel.")
    fsdp: str | None = option(None, "Shard by FSDP; better by a file of accelerate's.")
    fsdp_config: str | None = option(None, "A JSON file, or JSON.")
    deepspeed: str | None = option(None, "A JSON file of DeepSpeed's; better by a file of accelerate's.")
    accelerator_config: str | None = option(None, "A JSON file, or JSON, for accelerate.")
    local_rank: int = option(-1, "Given by older launchers.")
    debug: str = option("", "underflow_overflow: name the layer that a number overflows in.")

    @property
    def output_folder(self) -> Path:
        assert self.output_dir is not None, "the scripts have a default"
        return Path(self.output_dir)
