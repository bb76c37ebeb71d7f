"""Keys of axolotl and LLaMA-Factory that one option of ours does not say: each has a function that answers it.

answer(found, value, given)     adds to `found`; `given` are all keys of the file
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.documents import parse_json
from ..utils.problems import listing

FORMATS = ("alpaca", "chat_template", "sharegpt", "completion", "alpaca_chat.load_qa")  # of axolotl, as recognised here


@dataclass
class Translation:
    """Our options, and what there is to say about the others."""

    program: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


Answer = Callable[[Translation, Any, Mapping[str, Any]], None]


def only(allowed: Iterable[Any], name: str, why: str) -> Answer:
    """A key that has one meaning here."""
    allowed = tuple(allowed)

    def answer(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
        if value not in allowed:
            found.problems.append(f"{found.program}'s {name}: got {value!r}, wanted {listing(allowed)}; {why}")

    return answer


def precision(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values["dtype"] = "bfloat16"
    found.notes.append(f"{found.program}'s bf16: the frozen model is held in bfloat16, the adapter in float32")


def half(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values |= {"dtype": "float16", "fp16": True}


def flash(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    kinds = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager", True: "flash_attention_2"}
    if value != "auto":
        found.values["attn_implementation"] = kinds.get(value, value)


def validation(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    if not 0 < value < 1:
        found.problems.append(f"{found.program}'s share of validation: got {value}, wanted more than 0 and less than 1")
    found.values["validation_fraction"] = value


def per_epoch(kind: str) -> Answer:
    def answer(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
        found.values[f"{kind}_steps"] = 1 / (value * given.get("num_epochs", 1))
        found.values[f"{kind}_strategy"] = "steps"

    return answer


def adapter(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    if value == "qlora":
        found.values["load_in_4bit"] = True
    elif value != "lora":
        found.problems.append(f"{found.program}'s adapter: got {value!r}, wanted lora or qlora")


def all_linear(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values["target_modules"] = ["all-linear"]


def factory_targets(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    found.values["target_modules"] = ["all-linear"] if names == ["all"] else names


def quantisation_bit(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    if value in (4, 8):
        found.values[f"load_in_{value}bit"] = True
    else:
        found.problems.append(f"{found.program}'s quantization_bit: got {value}, wanted 4 or 8")


def wandb_project(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values["report_to"] = ["wandb"]
    found.notes.append(f"{found.program}'s wandb_project: wanted in the environment, WANDB_PROJECT={value}")


def pushed(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values |= {"hub_model_id": value, "push_to_hub": True}


def plugins(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    for name in value:
        if "liger" in name.lower():
            found.values["use_liger_kernel"] = True
        else:
            found.problems.append(f"{found.program}'s plugins: {name} has no counterpart; wanted it removed")


def special_tokens(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    if others := [name for name in value if name != "pad_token"]:
        found.problems.append(f"{found.program}'s special_tokens: {listing(others)}: tokens are the tokenizer's own")
    else:
        found.notes.append(f"{found.program}'s special_tokens: padding is never attended to, any token serves")


def too_long(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values |= {"drop_long": value == "drop", "cut_long": value == "truncate"}


def axolotl_datasets(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    """The one data set, its columns, and whether its type is recognised by its columns here."""
    if len(value) != 1:
        found.problems.append(f"axolotl's datasets: got {len(value)}, wanted one; put their rows into one file")
        return
    source = dict(value[0])
    files = source.pop("data_files", None)
    path, kind = source.pop("path", None), str(source.pop("type", "alpaca"))
    found.values["dataset_name"] = (files if isinstance(files, str) else files[0]) if files else path
    if isinstance(files, list) and len(files) > 1:
        found.problems.append("axolotl's datasets: got several data_files, wanted one")
    if source.pop("split", "train") != "train":
        found.problems.append("axolotl's datasets: rows to train on are those of split 'train'")
    if kind.split(".")[0] not in {name.split(".")[0] for name in FORMATS}:
        found.problems.append(f"axolotl's datasets: got type {kind}, wanted {listing(FORMATS)}")
    if subset := source.pop("name", None):
        found.values["dataset_config"] = subset
    columns = {"field_messages": "messages", "field_system": "system", "field_tools": "tools", "field": "text"}
    columns |= {"field_instruction": "instruction", "field_input": "input", "field_output": "response"}
    named = {ours: source.pop(theirs) for theirs, ours in columns.items() if theirs in source}
    if named:
        found.values["columns"] = named
    mapping = source.pop("message_property_mappings", {})
    if tuple(mapping.get(name) for name in ("role", "content")) not in (
        (None, None),
        ("role", "content"),
        ("from", "value"),
    ):
        found.problems.append("axolotl's message_property_mappings: wanted role and content, or from and value")
    for name in ("ds_type", "roles", "roles_to_train", "train_on_eos", "chat_template"):
        answer = source.pop(name, None)
        if name in ("roles_to_train", "train_on_eos") and answer not in (None, ["assistant"], "turn", "all", "last"):
            found.problems.append(f"axolotl's datasets: {name}: the assistant's turns are learned, with their ends")
    if source:
        found.problems.append(f"axolotl's datasets: {listing(source)}: not understood; wanted it removed")


def factory_dataset(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    """The data set that `dataset_info.json` describes."""
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    folder = Path(given.get("dataset_dir", "data"))
    if len(names) != 1:
        found.problems.append(f"LLaMA-Factory's dataset: got {len(names)}, wanted one; put their rows into one file")
        return
    index = folder / "dataset_info.json"
    try:
        entry = parse_json(index.read_text(encoding="utf-8"))[names[0]]
        source = entry.get("hf_hub_url") or str(folder / entry["file_name"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        found.problems.append(f"LLaMA-Factory's dataset {names[0]}: {index} does not describe it: {error}")
        return
    found.values["dataset_name"] = source
    if entry.get("subset"):
        found.values["dataset_config"] = entry["subset"]
    if entry.get("ranking"):
        found.problems.append(f"LLaMA-Factory's dataset {names[0]}: holds preferences; wanted reslora dpo")
    ours = {"prompt": "instruction", "query": "input", "response": "response", "system": "system", "tools": "tools"}
    ours |= {"history": "history", "messages": "messages"}
    columns = {ours.get(theirs, theirs): column for theirs, column in (entry.get("columns") or {}).items()}
    if entry.get("formatting") != "sharegpt" and columns:
        columns = {("prompt" if name == "instruction" else name): column for name, column in columns.items()}
    if columns:
        found.values["columns"] = columns
    tags = entry.get("tags") or {}
    if tags.get("role_tag", "from") not in ("from", "role") or tags.get("content_tag", "value") not in (
        "value",
        "content",
    ):
        found.problems.append(f"LLaMA-Factory's dataset {names[0]}: tags: wanted from and value, or role and content")


def template(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.notes.append(f"{found.program}'s template {value!r}: the tokenizer's own chat template is used")


OF_AXOLOTL: dict[str, Answer] = {
    "adapter": adapter,
    "datasets": axolotl_datasets,
    "val_set_size": validation,
    "lora_target_linear": all_linear,
    "bf16": precision,
    "fp16": half,
    "flash_attention": flash,
    "evals_per_epoch": per_epoch("eval"),
    "saves_per_epoch": per_epoch("save"),
    "wandb_project": wandb_project,
    "plugins": plugins,
    "special_tokens": special_tokens,
    "hub_model_id": pushed,
    "excess_length_strategy": too_long,
    "chat_template": only(("tokenizer_default",), "chat_template", "the tokenizer's own is used"),
}
OF_FACTORY: dict[str, Answer] = {
    "stage": only(("sft",), "stage", "preferences and rewards are learned by reslora dpo and reslora grpo"),
    "finetuning_type": only(("lora",), "finetuning_type", "adapters are trained here"),
    "lora_target": factory_targets,
    "dataset": factory_dataset,
    "template": template,
    "val_size": validation,
    "bf16": precision,
    "pure_bf16": precision,
    "fp16": half,
    "flash_attn": flash,
    "quantization_bit": quantisation_bit,
    "hub_model_id": pushed,
    "push_to_hub": lambda found, value, given: found.values.update(push_to_hub=True),
}
