"""The command lines of both language-model scripts: our options, then those of `transformers.TrainingArguments`.

Order of authority: command line, `--config` file (YAML or JSON), the defaults of the script, those of the dataclasses.
The defaults of the method live in `ResLoraConfig`; `None` here means "not given". Nothing here imports torch, so that
`--help` and a bad command line answer at once: `parse` gives the training arguments as plain values, of which
`training_arguments` makes the real ones.
"""

import difflib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..problems import BadInput, refuse
from .tasks import TASKS
from .training_options import TrainingOptions, option

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class ModelOptions:
    """Which model, and what is put on it."""

    model_name_or_path: str | None = option(None, "Folder or hub name of the model.")
    model_revision: str | None = option(None, "Of the model on the hub.")
    tokenizer_name: str | None = option(None, "Folder or hub name, if the tokenizer is not the model's.")
    dtype: str = option("float32", "Precision of the frozen model: float32, bfloat16 or float16.")
    attn_implementation: str | None = option(None, "eager, sdpa, flash_attention_2, ...")
    method: str = option("reslora", "reslora, or lora: PEFT's own LoRA through the same script.")
    shortcut: str | None = option(None, "input, block, middle or none.")
    num_previous: str | None = option(None, "Earlier layers that a shortcut reaches back to, or all.")
    merge_method: str | None = option(None, "least_squares, paper_input, paper_weight or drop.")
    calibration_examples: int = option(128, "Training examples that a merge is fitted on.")
    distillation_steps: int | None = option(None, "Steps in which the merged model learns what the unmerged one says.")
    handover_at: float | None = option(None, "Fold input or middle into plain LoRA after this share of the steps.")
    rank: int = option(4, "Rank of the adapter.")
    lora_alpha: float | None = option(None, "Scaling is lora_alpha / rank (default: 2 x rank).")
    lora_dropout: float = option(0.0, "Dropout on the input of the adapters while training.")
    use_rslora: bool = option(False, "Scaling is lora_alpha / sqrt(rank).")
    export_dtype: str = option("float16", "Precision of the exported LoRA: float32, bfloat16 or float16.")
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of adapted layers, or all-linear (default: PEFT's for the model, mostly q and v)."},
    )


@dataclass
class LlmOptions(ModelOptions):
    """What a causal language model is tuned on, and how it is judged."""

    dataset_name: str | None = option(None, "A .jsonl file, a folder with train.jsonl, or a `datasets` name.")
    dataset_config: str | None = option(None, "Configuration of the data set, as in `datasets`.")
    task: str | None = option(None, f"Judge by exact match of generated answers: {', '.join(TASKS)}.")
    prompt_column: str | None = option(None, "Column of the prompt (default: prompt).")
    response_column: str | None = option(None, "Column of the response (default: response or completion).")
    prompt_template: str | None = option(None, "Text around {prompt}; overrides the tokenizer's chat template.")
    validation_fraction: float = option(0.1, "Share of train that chooses the best step, if no split is for that.")
    max_train_examples: int | None = option(None, "Train on a random choice of so many rows.")
    max_eval_examples: int | None = option(None, "Validate and test on a random choice of so many rows.")
    max_length: int | None = option(None, "Most tokens of an example or a packed sequence (default: 1024 or context).")
    drop_long: bool = option(False, "Train without the examples that are longer, instead of stopping.")
    packing: bool = option(False, "Several examples in one sequence, none of which sees another.")
    max_new_tokens: int = option(256, "Most tokens of a generated answer.")
    num_beams: int = option(1, "Beams of generation.")
    eval_base: bool = option(True, "Also test the model without adapter.")
    save_merged_model: bool = option(False, "Also write the whole merged model, to <output_dir>/merged.")


@dataclass
class GlueOptions(ModelOptions):
    """Which GLUE task a sequence classifier is tuned on."""

    task_name: str | None = option(None, "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.")
    dataset_name: str = option("nyu-mll/glue", "A folder with train.jsonl and validation.jsonl, or a `datasets` name.")
    validation_fraction: float = option(0.1, "Share of train that chooses the best step.")
    max_validation_examples: int = option(1000, "But at most so many rows.")
    max_train_examples: int | None = option(None, "Train on a random choice of so many rows.")
    max_length: int = option(512, "Most tokens of an input; longer ones are cut.")


class Parser(HfArgumentParser):
    """Reports its findings as `BadInput`, so that they leave by the same door as the others."""

    def error(self, message: str) -> NoReturn:
        raise BadInput([message])


def as_words(config: dict[str, Any]) -> list[str]:
    """The command line that says the same as a configuration file."""
    words: list[str] = []
    for name, value in config.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise BadInput([f"--config {path}: {error.strerror}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput([f"--config {path} does not parse: {error}"]) from error
    if not isinstance(config, dict):
        raise BadInput([f"--config {path}: got {type(config).__name__}, wanted options by name"])
    return config


def build_parser(kind: type, defaults: dict[str, Any]) -> Parser:
    """With the options of a script and those of training."""
    parser = Parser([kind, TrainingOptions], allow_abbrev=False, description=kind.__doc__)
    parser.add_argument("--config", type=Path, help="YAML or JSON file of these options by name; the command line wins")
    parser.set_defaults(**defaults)
    return parser


def parse(kind: type, argv: Sequence[str] | None, defaults: dict[str, Any]) -> tuple[Any, Namespace]:
    """`(options, values of the training arguments)`.

    Args:
        kind: `LlmOptions` or `GlueOptions`.
        defaults: of training options, where the script's differ from those of `TrainingOptions`.

    Raises:
        BadInput: unknown options or values that do not parse.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(kind, defaults)
    file = parser.parse_known_args(argv)[0].config
    given, unknown = parser.parse_known_args([*(as_words(read_config(file)) if file else []), *argv])
    if unknown:
        raise BadInput([unknown_option(word, parser) for word in unknown if word.startswith("--")] or [str(unknown)])
    values = vars(given)
    own = {item.name for item in fields(kind)}
    options = kind(**{name: value for name, value in values.items() if name in own})
    return options, Namespace(**{name: value for name, value in values.items() if name not in own | {"config"}})


def training_arguments(values: Namespace) -> "TrainingArguments":
    """Raises `BadInput` with what `TrainingArguments` finds wrong with them."""
    from transformers import TrainingArguments

    offered = {item.name: item.default for item in fields(TrainingOptions)}
    known = {item.name for item in fields(TrainingArguments)}
    refuse(
        f"--{name}: the installed version of transformers has no such training argument"
        for name, default in offered.items()
        if name not in known and getattr(values, name) != default
    )
    given = {name: value for name, value in vars(values).items() if name in known}
    try:
        return TrainingArguments(**given, remove_unused_columns=False)  # examples hold ids and labels, nothing else
    except ValueError as error:
        raise BadInput([str(error)]) from error


def unknown_option(word: str, parser: Parser) -> str:
    name = word.split("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(name, known, n=2)
    return f"unknown option {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")
