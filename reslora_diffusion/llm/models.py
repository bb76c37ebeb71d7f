"""Models, tokenizers and adapters: checked on configurations and on the meta device before any weight is read."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from reslora_diffusion import ResLoraConfig

from ..utils.hub import looking_up
from ..utils.problems import BadInput, listing, refuse
from ..weights import broken_model
from .checks import adapter_settings
from .model_checks import layer_problems, leaves_of
from .options import PRECISIONS, ModelOptions
from .quantising import quantisation

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
    known: Container[type] = cast(Any, AUTO[task_type])._model_mapping.keys()  # of those classes, always set
    if type(config) not in known or (task_type == TaskType.CAUSAL_LM and config.is_encoder_decoder):
        what = "an encoder-decoder" if config.is_encoder_decoder else f"of type {config.model_type}"
        raise BadInput([f"--model_name_or_path {options.model_name_or_path}: is {what}, wanted {PURPOSE[task_type]}"])
    return config


def embedding_rows(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that the model has an embedding for."""
    return getattr(config.get_text_config(), "vocab_size", None)


def load_tokenizer(options: ModelOptions, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with something to pad with that the model has an embedding for. Padding is never attended to, so
    any token serves."""
    name = str(options.tokenizer_name or options.model_name_or_path)
    revision = None if options.tokenizer_name else options.model_revision
    with looking_up("--tokenizer_name", name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    rows = embedding_rows(config) or len(tokenizer)
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def target_problems(config: PreTrainedConfig, options: ModelOptions, task_type: TaskType) -> list[str]:
    """Target modules that match nothing, and layers narrower than the rank."""
    targets, problems = options.target_modules, unmergeable(options)
    if targets is None:
        if config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            return problems
        targets = []
    with torch.device("meta"):
        model = AUTO[task_type].from_config(config)
    layers = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if not targets:
        has = listing(leaves_of(layers), 12)
        return [*problems, f"--target_modules: PEFT knows no default for {config.model_type}; it has {has}"]
    targets = [target for target in targets if target != "all-linear"]
    problems += layer_problems(layers, targets, options.rank)
    if getattr(options, "save_merged_model", False):
        from ..export.fusing import tied_paths, tied_problem

        adapted = [name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets)]
        if tied := tied_paths(model, adapted):
            problems.append(f"--save_merged_model: {tied_problem(tied)}")
    return problems


def unmergeable(options: ModelOptions) -> list[str]:
    """Return why no LoRA can be merged into the files of a base in a folder: they are quantised, or no safetensors."""
    folder = Path(str(options.model_name_or_path))
    if not getattr(options, "save_merged_model", False) or not folder.is_dir():
        return []
    from ..export.fusing import weight_files

    try:
        weight_files(folder, None)
    except ValueError as error:
        return [f"--save_merged_model: {error}"]
    return []


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens the model has positions for, if it is bounded."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(options: ModelOptions, config: PreTrainedConfig, task_type: TaskType) -> PreTrainedModel:
    """The frozen model with its weights."""
    name = str(options.model_name_or_path)
    with looking_up("--model_name_or_path", name), held_in(options.dtype):
        model = AUTO[task_type].from_pretrained(
            name,
            config=config,
            revision=options.model_revision,
            dtype=DTYPES[options.dtype],
            attn_implementation=options.attn_implementation,
            quantization_config=quantisation(options, task_type == TaskType.SEQ_CLS),
        )
    refuse(f"--model_name_or_path {name}: {problem}" for problem in broken_model(model, "model"))
    return model


@contextmanager
def held_in(dtype: str) -> Iterator[None]:
    """Inside, DeepSpeed ZeRO-3 creates weights in a precision of ours.

    `deepspeed.zero.Init` takes the precision from DeepSpeed's configuration, whatever `from_pretrained` is given: in
    float32 without a section "bf16" or "fp16". The section is gone again when DeepSpeed wraps the model, since it would
    make an engine of half precision, and the adapters are trained in float32.
    """
    config = deepspeed_config() if is_deepspeed_zero3_enabled() else None
    section = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    if config is None or section is None:
        yield
        return
    before = {name: config.pop(name) for name in ("bf16", "fp16") if name in config}
    config[section] = {"enabled": True}
    try:
        yield
    finally:
        del config[section]
        config.update(before)


def stops_of(generation: GenerationConfig | None) -> list[int]:
    """Tokens that generation stops at."""
    found = generation.eos_token_id if generation is not None else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def stored_stops(options: ModelOptions, config: PreTrainedConfig) -> list[int]:
    """Tokens that the model's generation stops at as its files say, before its weights are read."""
    try:
        name, revision = str(options.model_name_or_path), options.model_revision or "main"
        return stops_of(GenerationConfig.from_pretrained(name, revision=revision))
    except (OSError, ValueError):  # there is no such file: transformers derives one from the configuration
        return stops_of(GenerationConfig.from_model_config(config))


def stop_at(model: PreTrainedModel, ends: Sequence[int]) -> None:
    """Let the model's generation stop at more tokens."""
    generation = model.generation_config
    stops = [*stops_of(generation), *(end for end in ends if end not in stops_of(generation))]
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops


def end_notes(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], stops: Sequence[int]) -> list[str]:
    """The tokens that answers end with in training, and what to do where the base's generation does not stop there."""
    names = listing(f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends)
    notes = [f"answers end with {names}"]
    if [end for end in ends if end not in stops]:
        notes.append(
            "the base's generation does not stop there: give the exported LoRA's generation_config.json to whoever "
            "generates with it, as GenerationConfig.from_pretrained(output_dir) does, or vllm serve --generation-config"
        )
    return notes


def save_generation(model: PreTrainedModel, folder: Path) -> None:
    """Write `generation_config.json`; without the base's other settings if they contradict each other."""
    generation = model.generation_config
    try:
        generation.save_pretrained(folder)
    except ValueError:
        kept = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**kept).save_pretrained(folder)


def add_adapter(model: PreTrainedModel, options: ModelOptions, task_type: TaskType) -> PeftModel:
    """The model with a fresh adapter in float32 on it.

    Raises:
        BadInput: the configuration does not fit the model.
    """
    try:
        return get_peft_model(model, adapter_config(options, task_type))
    except ValueError as error:
        raise BadInput([str(error)]) from error


def save_merged(options: ModelOptions, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The base with an exported LoRA merged into it, as `reslora merge` writes it, and the tokenizer: <adapter>/merged.

    Raises:
        ValueError: the base's files cannot be merged into.
        CheckFailed: a ValueError too; the result overflows, or was not written as computed.
    """
    from ..export.fusing import fuse, snapshot

    base = snapshot(str(options.model_name_or_path), None, options.model_revision)
    report = fuse(adapter, str(base), adapter / "merged", overwrite=True)
    print(report)
    tokenizer.save_pretrained(report.path)
    return report.path
