"""Models, tokenizers and adapters: checked on configurations and on the meta device before any weight is read."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from reslora_diffusion import ResLoraConfig

from ..hub import looking_up
from ..problems import BadInput, listing
from ..utils.files import replace_folder
from .checks import PRECISIONS, adapter_settings
from .model_checks import layer_problems, leaves_of
from .options import ModelOptions

AUTO = {TaskType.CAUSAL_LM: AutoModelForCausalLM, TaskType.SEQ_CLS: AutoModelForSequenceClassification}
PURPOSE = {TaskType.CAUSAL_LM: "a causal language model", TaskType.SEQ_CLS: "a sequence classifier"}
DTYPES = {name: getattr(torch, name) for name in PRECISIONS}


def adapter_config(options: ModelOptions, task_type: TaskType) -> LoraConfig:
    """PEFT's configuration of either method."""
    kind = LoraConfig if options.method == "lora" else ResLoraConfig
    return kind(task_type=task_type, **adapter_settings(options))


def load_config(options: ModelOptions, task_type: TaskType, **kwargs: Any) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        BadInput: there is no such model, or it does not serve the task.
    """
    name = str(options.model_name_or_path)
    with looking_up("--model_name_or_path", name):
        config = AutoConfig.from_pretrained(name, revision=options.model_revision, **kwargs)
    known = AUTO[task_type]._model_mapping.keys()
    if type(config) not in known or (task_type == TaskType.CAUSAL_LM and config.is_encoder_decoder):
        what = "an encoder-decoder" if config.is_encoder_decoder else f"of type {config.model_type}"
        raise BadInput([f"--model_name_or_path {options.model_name_or_path}: is {what}, wanted {PURPOSE[task_type]}"])
    return config


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer, with something to pad with."""
    name = str(options.tokenizer_name or options.model_name_or_path)
    revision = None if options.tokenizer_name else options.model_revision
    with looking_up("--tokenizer_name", name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def target_problems(config: PreTrainedConfig, options: ModelOptions, task_type: TaskType) -> list[str]:
    """Target modules that match nothing, and layers narrower than the rank."""
    targets = options.target_modules
    if targets is None:
        if config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            return []
        targets = []
    with torch.device("meta"):
        model = AUTO[task_type].from_config(config)
    layers = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if not targets:
        has = listing(leaves_of(layers), 12)
        return [f"--target_modules: PEFT knows no default for {config.model_type}; it has {has}"]
    targets = [target for target in targets if target != "all-linear"]
    return [*layer_problems(layers, targets, options.rank)]


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens the model has positions for, if it is bounded."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(options: ModelOptions, config: PreTrainedConfig, task_type: TaskType) -> nn.Module:
    """The frozen model with its weights."""
    name = str(options.model_name_or_path)
    with looking_up("--model_name_or_path", name):
        return AUTO[task_type].from_pretrained(
            name,
            config=config,
            revision=options.model_revision,
            dtype=DTYPES[options.dtype],
            attn_implementation=options.attn_implementation,
        )


def add_adapter(model: nn.Module, options: ModelOptions, task_type: TaskType) -> PeftModel:
    """The model with a fresh adapter in float32 on it.

    Raises:
        BadInput: the configuration does not fit the model.
    """
    try:
        return get_peft_model(model, adapter_config(options, task_type))
    except ValueError as error:
        raise BadInput([str(error)]) from error


def save_merged(options: ModelOptions, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The base with an exported LoRA merged into it, as `AutoModelForCausalLM` loads it: <adapter>/merged."""
    base = AUTO[TaskType.CAUSAL_LM].from_pretrained(
        options.model_name_or_path, revision=options.model_revision, dtype=DTYPES[options.dtype]
    )
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    fresh, target = adapter / ".merged", adapter / "merged"
    shutil.rmtree(fresh, ignore_errors=True)
    merged.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    replace_folder(fresh, target)
