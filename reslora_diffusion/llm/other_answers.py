"""Keys of axolotl and LLaMA-Factory that one option of ours does not say: each has a function that answers it.

answer(found, value, given)     adds to `found`; `given` are all keys of the file
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ..utils.model_files import Files, Unknown
from ..utils.problems import listing
from .other_data import axolotl_datasets, factory_dataset
from .other_translation import Answer, Translation


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
    if value == 0:
        return
    if not 0 < value < 1:
        found.problems.append(f"{found.program}'s share of validation: got {value}, wanted more than 0 and less than 1")
    found.values["validation_fraction"] = value


def per_epoch(kind: str) -> Answer:
    """So many evaluations or checkpoints in each epoch, as a share of all steps; 1 of them would be every step."""

    def answer(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
        if not value:
            found.values[f"{kind}_strategy"] = "no"
        elif (share := 1 / (value * given.get("num_epochs", 1))) < 1:
            found.values |= {f"{kind}_steps": share, f"{kind}_strategy": "steps"}
        else:
            found.values[f"{kind}_strategy"] = "epoch"

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
    liger = any("liger" in str(name).lower() for name in value)
    for name in map(str, value):
        if "liger" in name.lower():
            found.values["use_liger_kernel"] = True
        elif "cut_cross_entropy" in name:
            found.notes.append(f"{found.program}'s plugins: {name}: --chunked_loss computes that loss in parts")
            found.values |= {} if liger else {"chunked_loss": True}
        elif name.endswith(".KernelsPlugin"):
            found.notes.append(f"{found.program}'s plugins: {name}: changes nothing here")
        else:
            found.problems.append(f"{found.program}'s plugins: {name} has no counterpart; wanted it removed")


def special_tokens(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    if others := [name for name in value if name != "pad_token"]:
        found.problems.append(f"{found.program}'s special_tokens: {listing(others)}: tokens are the tokenizer's own")
    else:
        found.notes.append(f"{found.program}'s special_tokens: padding is never attended to, any token serves")


def too_long(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values |= {"drop_long": value == "drop", "cut_long": value == "truncate"}


def template(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    """A chat template by name: instruction-tuned models bring the one of that name, others have none."""
    key = "template" if "template" in given else "chat_template"
    model = given.get("tokenizer_config") or given.get("base_model") or given.get("model_name_or_path")
    if value == "tokenizer_default":
        return
    if value == "jinja" or has_chat_template(str(model)) is False:
        found.problems.append(
            f"{found.program}'s {key}: got {value!r}, and only the tokenizer's own is used, of which {model} has none; "
            "wanted it in chat_template.jinja beside the tokenizer"
        )
    else:
        found.notes.append(f"{found.program}'s {key} {value!r}: the chat template of {model}'s tokenizer is used")


def has_chat_template(model: str) -> bool | None:
    """Return whether a tokenizer brings a chat template; None where the files on this machine do not say."""
    files = Files(model, None)
    try:
        if files.path("chat_template.jinja"):
            return True
        return bool(files.json("tokenizer_config.json").get("chat_template"))
    except (Unknown, OSError, ValueError):
        return None


def longest(model: str, default: int) -> int:
    """Return a program's default length, or the model's context where the files on this machine say a shorter one."""
    try:
        config = Files(model, None).json("config.json")
        return min(default, int(config.get("max_position_embeddings") or config.get("n_positions") or default))
    except (Unknown, OSError, ValueError, TypeError):
        return default


def checkpointing(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values["gradient_checkpointing"] = True
    if value is not True:
        found.notes.append(
            f"{found.program}'s gradient_checkpointing {value!r}: activations are computed again, not moved"
        )


def grouped(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values["train_sampling_strategy"] = "group_by_length"


def tensorboard(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    found.values["report_to"] = ["tensorboard"]


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
    "chat_template": template,
    "gradient_checkpointing": checkpointing,
    "group_by_length": grouped,
    "use_tensorboard": tensorboard,
    "bfloat16": precision,
    "float16": half,
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
    "group_by_length": grouped,
    "hub_model_id": pushed,
    "push_to_hub": lambda found, value, given: found.values.update(push_to_hub=True),
}
