"""The command lines of both language-model scripts: our options, then those of `transformers.TrainingArguments`.

Order of authority: command line, `--config` file (YAML or JSON), the defaults of the script, those of the dataclasses.
The defaults of the method live in `ResLoraConfig`; `None` here means "not given". Nothing here imports torch, so that
`--help` and a bad command line answer at once: `parse` gives the training arguments as plain values, of which
`training_arguments` makes the real ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..methods.schedules.settings import SCHEDULES
from ..rules import MergeMethod, Shortcut
from ..utils.option_parser import Given, Reader, parse_file
from ..utils.options import default_of, facts_of, option
from ..utils.problems import BadInput, refuse, say
from .other_programs import translate
from .tasks import TASKS
from .training_options import TrainingOptions

PRECISIONS = ("float32", "bfloat16", "float16")
BACKENDS = ("bitsandbytes", "torchao")  # of quantised models


@dataclass
class ModelOptions:
    """The model, and the adapter on it."""

    model_name_or_path: str | None = option(None, "Folder or hub name of the model.")
    model_revision: str | None = option(None, "Of the model on the hub.")
    tokenizer_name: str | None = option(None, "Folder or hub name, if the tokenizer is not the model's.")
    dtype: str = option("float32", "Precision of the frozen model.", choices=PRECISIONS)
    load_in_4bit: bool = option(False, "Hold the frozen model in 4 bits (QLoRA); it computes in --dtype.")
    load_in_8bit: bool = option(False, "Hold the frozen model in 8 bits.")
    quantized_by: str = option(
        "bitsandbytes", "What quantises it; bitsandbytes in NF4, doubly quantised.", choices=BACKENDS
    )
    attn_implementation: str | None = option(None, "eager, sdpa, flash_attention_2, ...")
    method: str = option("reslora", "What is trained; lora is PEFT's own LoRA.", choices=("lora", "reslora"))
    shortcut: str | None = option(
        None, "Residual path between the adapters of consecutive layers.", choices=tuple(map(str, Shortcut))
    )
    num_previous: str | None = option(None, "Earlier layers that a shortcut reaches back to, or all.")
    merge_method: str | None = option(
        None, "How input and middle become a plain LoRA.", choices=tuple(map(str, MergeMethod))
    )
    calibration_examples: int = option(128, "Training examples that a merge is fitted on.", at_least=1)
    distillation_steps: int | None = option(None, "Steps that refine the merge on the outputs of the unmerged model.")
    handover_at: float | None = option(
        None, "Fold input or middle into plain LoRA after this share of the steps.", above=0, below=1
    )
    schedule: str | None = option(
        None,
        f"What changes while training: {', '.join(SCHEDULES)}; with settings as in restart:stages=3 (docs/methods.md).",
    )
    optimizer: str | None = option(
        None, "rite, pro, scaled_adamw or reflora, which see both factors of a LoRA, in place of --optim."
    )
    optimizer_args: dict[str, str] = option({}, "Further settings of --optimizer, by its own names, as damping=1e-3.")
    rank: int = option(4, "Rank of the adapter.")
    lora_alpha: float | None = option(None, "Scaling is lora_alpha / rank (default: 2 x rank).", above=0)
    lora_dropout: float = option(0.0, "Dropout on the input of the adapters while training.")
    use_rslora: bool = option(False, "Scaling is lora_alpha / sqrt(rank).")
    use_dora: bool = option(False, "Train the length of each row of the weights apart (DoRA; shortcuts none, block).")
    export_dtype: str = option("float16", "Precision of the exported LoRA.", choices=PRECISIONS)
    target_modules: list[str] | None = option(
        None, "Names of adapted layers, or all-linear (default: PEFT's for the model, mostly q and v)."
    )


@dataclass
class LlmOptions(ModelOptions):
    """The data that a causal language model is tuned on, and how it is judged."""

    dataset_name: str | list[str] | None = option(
        None, "A .jsonl file, a folder with train.jsonl, or a `datasets` name; several are learned together."
    )
    dataset_config: str | None = option(None, "Configuration of the data set, as in `datasets`.")
    dataset_train_split: str = option("train", "Split to train on, as `datasets` writes it: train_sft, train[:10%].")
    task: str | None = option(None, f"Judge by exact match of generated answers: {', '.join(TASKS)}.")
    prompt_column: str | None = option(None, "Column of the prompt (default: prompt).")
    response_column: str | None = option(None, "Column of the response (default: response or completion).")
    columns: dict[str, str] | None = option(
        None, "Columns by their usual names: prompt=question system=persona messages=dialog ..."
    )
    prompt_template: str | None = option(None, "Text around {prompt}; overrides the tokenizer's chat template.")
    validation_fraction: float = option(0.1, "Share of train that chooses the best step, if no split is for that.")
    max_train_examples: int | None = option(None, "Train on a random choice of so many rows of each data set.")
    max_eval_examples: int | None = option(None, "Validate and test on a random choice of so many, likewise.")
    max_length: int | None = option(None, "Most tokens of an example or a packed sequence (default: 1024 or context).")
    drop_long: bool = option(False, "Train without the examples that are longer, instead of stopping.")
    cut_long: bool = option(False, "Train on the beginnings of the examples that are longer, instead of stopping.")
    training_template: bool = option(
        False, "Use TRL's training template for the tokenizer's chat template: one sequence for all turns."
    )
    packing: bool = option(False, "Several examples in one sequence, none of which sees another.")
    chunked_loss: bool = option(
        False, "Compute the loss a few hundred tokens at a time: less memory with a large vocabulary."
    )
    max_new_tokens: int = option(256, "Most tokens of a generated answer.")
    max_total_tokens: int | None = option(None, "Most tokens of a question and its generated answer together.")
    num_beams: int = option(1, "Beams of generation.")
    eval_base: bool = option(True, "Also test the model without adapter.")
    save_merged_model: bool = option(False, "Also write the whole merged model, to <output_dir>/merged.")


@dataclass
class GlueOptions(ModelOptions):
    """The GLUE task that a sequence classifier is tuned on."""

    task_name: str | None = option(None, "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.")
    dataset_name: str = option("nyu-mll/glue", "A folder with train.jsonl or GLUE's train.tsv, or a `datasets` name.")
    validation_fraction: float = option(0.1, "Share of train that chooses the best step.")
    max_validation_examples: int = option(1000, "But at most so many rows.")
    max_train_examples: int | None = option(None, "Train on a random choice of so many rows.")
    max_length: int = option(512, "Most tokens of an input; longer ones are cut.")


@dataclass
class TunedOptions(ModelOptions):
    """The data that a causal language model is tuned on by one of TRL's trainers."""

    dataset_name: str | None = option(None, "A .jsonl file, a folder with train.jsonl, or a `datasets` name.")
    dataset_config: str | None = option(None, "Configuration of the data set, as in `datasets`.")
    max_train_examples: int | None = option(None, "Train on a random choice of so many rows.", at_least=1)
    max_length: int | None = option(None, "Most tokens of a prompt and its answer; longer ones are cut.", at_least=1)


@dataclass
class PreferenceOptions(TunedOptions):
    """The preferences that a model learns, by DPO."""

    columns: dict[str, str] | None = option(None, "Columns by their usual names: prompt=question chosen=best ...")
    beta: float = option(0.1, "How close to the base the model stays; larger is closer.", above=0)
    loss_type: list[str] = option(["sigmoid"], "sigmoid (DPO), ipo, hinge, ..., as in TRL's DPOConfig.")


@dataclass
class RewardOptions(TunedOptions):
    """The task that a model is rewarded for, by GRPO."""

    task: str | None = option(None, f"Whose right answers are rewarded: {', '.join(TASKS)}.")
    num_generations: int = option(8, "Answers to each prompt, which are compared.", at_least=2)
    max_new_tokens: int = option(256, "Most tokens of a generated answer.", at_least=1)
    temperature: float = option(1.0, "Of the generation.", above=0)
    beta: float = option(0.0, "Weight of the divergence from the base.", at_least=0)


ScriptOptions = LlmOptions | GlueOptions | PreferenceOptions | RewardOptions


@dataclass
class ConfigFile:
    """Configuration file."""

    config: Path | None = option(None, "YAML, JSON or TOML file with options by name; the command line wins.")


PROGRAMS = {
    LlmOptions: "train_llm_reslora.py",
    GlueOptions: "train_glue_reslora.py",
    PreferenceOptions: "train_dpo_reslora.py",
    RewardOptions: "train_grpo_reslora.py",
}
Options = TypeVar("Options", bound=ModelOptions)


def reader(kind: type) -> Reader:
    """Reads the options of a script and those of training together."""
    everything: type = dataclass(type(kind.__name__, (kind, TrainingOptions, ConfigFile), {"__doc__": kind.__doc__}))
    return Reader(everything, PROGRAMS[kind])


def parse(kind: type[Options], argv: Sequence[str] | None, defaults: dict[str, Any]) -> tuple[Options, TrainingOptions]:
    """`(options, training options)`; whatever is wrong with their words stands in `problems` of the latter.

    Args:
        kind: `LlmOptions` or `GlueOptions`.
        defaults: of training options, where the script's differ from those of `TrainingOptions`.

    Raises:
        BadInput: the `--config` file cannot be read; said together with what is wrong with the command line.
    """
    read, file, notes = reader(kind), Given(), []
    given = read.command_line(argv)
    if path := given.values.get("config"):
        try:
            config = parse_file("--config", path)
            if not isinstance(config, dict):
                raise BadInput([f"--config {path}: got {type(config).__name__}, wanted options by name"])
            translation = translate(config) if kind is LlmOptions else None
            file = read.mapping(translation.values if translation else config)
            if translation:
                file.problems = [*translation.problems, *file.problems]
                notes = [f"{path} is a file of {translation.program}'s", *translation.notes]
        except BadInput as error:
            raise BadInput([*error.problems, *given.problems]) from error
    options, training = kind(), TrainingOptions()
    own = facts_of(kind)
    for name, value in (defaults | file.values | given.values).items():
        if name != "config":
            setattr(options if name in own else training, name, value)
    training.problems = [*file.problems, *given.problems]
    say(notes)
    return options, training


def training_arguments(training: TrainingOptions, kind: Any = None, **more: Any) -> Any:
    """`TrainingArguments`, or what TRL makes of them.

    Args:
        kind: such as `trl.DPOConfig`.
        more: arguments of its own.

    Raises:
        BadInput: it finds something wrong with them.
    """
    from transformers import TrainingArguments

    kind = kind or TrainingArguments
    offered = {item.name: default_of(item) for item in fields(TrainingOptions) if "facts" in item.metadata}
    known = {item.name for item in fields(kind)}
    refuse(
        f"--{name}: the installed version of transformers has no such training argument"
        for name, default in offered.items()
        if name not in known and getattr(training, name) != default
    )
    given = {name: getattr(training, name) for name in offered if name in known}
    try:
        return kind(**given, remove_unused_columns=False, **more)  # examples hold ids and labels, nothing else
    except ValueError as error:
        raise BadInput([str(error)]) from error
