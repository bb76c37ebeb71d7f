"""The data sets that a YAML of axolotl or LLaMA-Factory names, as options of ours.

    axolotl          datasets: [{path: teknium/GPT4-LLM-Cleaned, type: alpaca, split: "train[:10%]"}, ...]
    LLaMA-Factory    dataset: identity,alpaca_en_demo       described in <dataset_dir>/dataset_info.json

Several data sets are learned together. A row's format is recognised by its columns (`forms`), so what the file says of
it is compared with what is known here, and columns of other names become `--columns`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.documents import parse_json
from ..utils.problems import listing
from .other_translation import Translation

FORMATS = ("alpaca", "chat_template", "sharegpt", "completion", "alpaca_chat.load_qa")  # of axolotl, as recognised here
COLUMNS = {  # of axolotl
    "field_messages": "messages",
    "field_system": "system",
    "field_tools": "tools",
    "field": "text",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "response",
}
FACTORY_COLUMNS = {
    "prompt": "prompt",
    "query": "input",
    "response": "response",
    "system": "system",
    "tools": "tools",
    "history": "history",
    "messages": "messages",
}
TURNS = {("role", "content"), ("from", "value")}  # what a turn's speaker and text are called
ONE_FOR_ALL = ("dataset_config", "dataset_train_split")

Options = dict[str, Any]


def axolotl_datasets(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    """Answer `datasets`, a list of data sets."""
    if not isinstance(value, list) or not all(isinstance(source, Mapping) for source in value):
        found.problems.append(f"axolotl's datasets: got {str(value)[:80]!r}, wanted a list of mappings")
        return
    combine(found, "datasets", [axolotl_dataset(found, dict(source)) for source in value])


def axolotl_dataset(found: Translation, source: dict[str, Any]) -> Options:
    """Options for one data set."""
    files, path, kind = source.pop("data_files", None), source.pop("path", None), str(source.pop("type", "alpaca"))
    options: Options = {"dataset_name": (files if isinstance(files, str) else files[0]) if files else path}
    where = f"axolotl's datasets: {options['dataset_name']}"
    if isinstance(files, list) and len(files) > 1:
        found.problems.append(f"{where}: got several data_files, wanted a data set for each")
    if re.split(r"[.:]", kind)[0] not in {name.split(".")[0] for name in FORMATS}:
        found.problems.append(f"{where}: got type {kind}, wanted {listing(FORMATS)}")
    if kind.startswith("alpaca"):
        found.notes.append(
            f"{where}: prompts of type {kind} are written by the chat template here, or as they are where there is "
            "none, without axolotl's 'Below is an instruction that describes a task'; --prompt_template writes others"
        )
    options |= {
        ours: source.pop(theirs, None) for theirs, ours in (("name", ONE_FOR_ALL[0]), ("split", ONE_FOR_ALL[1]))
    }
    options["columns"] = {ours: source.pop(theirs) for theirs, ours in COLUMNS.items() if theirs in source}
    mapping = dict(source.pop("message_property_mappings", None) or {})
    for name in ("role", "content"):
        if older := source.pop(f"message_field_{name}", None):
            mapping[name] = older
    if mapping and (mapping.get("role", "role"), mapping.get("content", "content")) not in TURNS:
        found.problems.append(f"{where}: message_property_mappings: wanted role and content, or from and value")
    for name in (
        "ds_type",
        "roles",
        "roles_to_train",
        "train_on_eos",
        "chat_template",
        "revision",
        "trust_remote_code",
    ):
        answer = source.pop(name, None)
        if name in ("roles_to_train", "train_on_eos") and answer not in (None, ["assistant"], "turn", "all", "last"):
            found.problems.append(f"{where}: {name}: the assistant's turns are learned, with their ends")
        if name == "revision" and answer:
            found.problems.append(f"{where}: revision: the newest is read; wanted it removed, or a local copy")
    if source:
        found.problems.append(f"{where}: {listing(source)}: not understood; wanted it removed")
    return options


def factory_dataset(found: Translation, value: Any, given: Mapping[str, Any]) -> None:
    """Answer `dataset`, names of data sets that `dataset_info.json` describes."""
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",") if name.strip()]
    folder = Path(given.get("dataset_dir", "data"))
    index = folder / "dataset_info.json"
    try:
        entries = parse_json(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found.problems.append(f"LLaMA-Factory's dataset {', '.join(names)}: {index} cannot be read: {error}")
        return
    described = []
    for name in names:
        entry = entries.get(name) if isinstance(entries, Mapping) else None
        if isinstance(entry, Mapping) and (entry.get("hf_hub_url") or entry.get("file_name")):
            described.append(factory_entry(found, name, entry, folder))
        else:
            found.problems.append(f"LLaMA-Factory's dataset {name}: {index} does not describe it")
    if described:
        combine(found, "dataset", described)


def factory_entry(found: Translation, name: str, entry: Mapping[str, Any], folder: Path) -> Options:
    """Options for one data set."""
    where = f"LLaMA-Factory's dataset {name}"
    options: Options = {"dataset_name": entry.get("hf_hub_url") or str(folder / entry["file_name"])}
    options |= {"dataset_config": entry.get("subset"), "dataset_train_split": entry.get("split")}
    if entry.get("ranking"):
        found.problems.append(f"{where}: holds preferences; wanted reslora dpo")
    for key in ("folder", "num_samples"):
        if entry.get(key):
            found.problems.append(f"{where}: {key}: is not done here; wanted a file with those rows")
    columns = dict(entry.get("columns") or {})
    if media := [key for key in ("images", "videos", "audios", "kto_tag") if columns.pop(key, None)]:
        found.problems.append(f"{where}: {listing(media)}: only text is learned here")
    options["columns"] = {FACTORY_COLUMNS.get(theirs, theirs): column for theirs, column in columns.items()}
    tags = entry.get("tags") or {}
    if (tags.get("role_tag", "from"), tags.get("content_tag", "value")) not in TURNS:
        found.problems.append(f"{where}: tags: wanted from and value, or role and content")
    return options


def combine(found: Translation, key: str, sources: Sequence[Options]) -> None:
    """Options that say all data sets together."""
    names = [source["dataset_name"] for source in sources]
    if nameless := [number for number, name in enumerate(names, 1) if not isinstance(name, str)]:
        found.problems.append(f"{found.program}'s {key}: number {listing(nameless)} has no path")
        return
    found.values["dataset_name"] = names[0] if len(names) == 1 else names
    for option in ONE_FOR_ALL:
        values = list(dict.fromkeys(source.get(option) for source in sources))
        if len(values) > 1:
            found.problems.append(
                f"{found.program}'s {key}: got {listing(map(str, values))} as {option}, wanted one for all"
            )
        elif values[0]:
            found.values[option] = values[0]
    columns: dict[str, str] = {}
    for source in sources:
        for ours, theirs in source["columns"].items():
            if columns.setdefault(ours, theirs) != theirs:
                found.problems.append(
                    f"{found.program}'s {key}: {ours} is in column {columns[ours]!r} and {theirs!r}, wanted one name"
                )
    if columns:
        found.values["columns"] = columns
