"""`--push_to_hub`: the exported LoRA is uploaded once, at the end.

`transformers.Trainer` would upload every checkpoint instead, which holds the unmerged ResLoRA that nobody can load
without this package, and would pickle the token into each checkpoint (`training_args.bin`). So both are taken from its
arguments before it is made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..utils.documents import parse_json
from ..utils.files import write_text
from ..utils.hub import create_repository, upload

SHOWN = (
    "task",
    "task_name",
    "dataset_name",
    "shortcut",
    "num_previous",
    "rank",
    "lora_alpha",
    "dtype",
    "target_modules",
)


@dataclass(frozen=True)
class Destination:
    """A repository that exists and can be written to."""

    name: str
    token: str | None

    def send(self, output: Path) -> str:
        """Upload an output folder with a model card; return the address of the commit."""
        write_text(output / "README.md", card(output))
        return upload(self.name, output, self.token)


def card(output: Path) -> str:
    """The model card of an exported folder: what it is, how it is loaded, how it was trained, what was measured."""
    from huggingface_hub import ModelCardData

    config, run = facts_in(output / "adapter_config.json"), facts_in(output / "run.json")
    results, options = facts_in(output / "results.json"), run.get("options", {})
    base, task = config.get("base_model_name_or_path"), config.get("task_type")
    tags = ["lora", *(["reslora"] if results.get("method") == "reslora" else [])]
    purpose = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}.get(str(task))
    hub_name = base if base and not Path(base).exists() else None
    data = ModelCardData(base_model=hub_name, library_name="peft", pipeline_tag=purpose, tags=tags)
    kind = "AutoModelForCausalLM" if task == "CAUSAL_LM" else "AutoModelForSequenceClassification"
    lines = ["---", data.to_yaml(), "---", "", f"# {output.name}", ""]
    lines += [
        f"A LoRA of rank {config.get('r')} for `{base}`, in PEFT's own format: nothing else is needed to load it.",
        "",
    ]
    lines += ["```python", "from peft import PeftModel", f"from transformers import {kind}", ""]
    lines += [f'model = PeftModel.from_pretrained({kind}.from_pretrained("{base}"), "<this repository>")', "```", ""]
    if results.get("shortcut"):
        lines += [f"It was trained with ResLoRA's shortcut `{results['shortcut']}`, which is merged into it.", ""]
    shown = {n: v for n, v in options.items() if n in SHOWN and v is not None}
    lines += ["| option | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items()), ""]
    measured = results.get("test") or results.get("as exported") or {}
    lines += ["| measured | |", "|---|---|", *(f"| {n} | {v} |" for n, v in measured.items()), ""] if measured else []
    return "\n".join(lines)


def facts_in(path: Path) -> dict[str, Any]:
    """A record of a run; empty where it is missing or damaged, since an upload does not depend on it."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def take_destination(training: TrainingArguments) -> Destination | None:
    """Return where the result goes, None if it stays here; afterwards the arguments neither push nor hold a token.

    Raises:
        BadInput: the repository cannot be written to.
    """
    token, wanted = training.hub_token, training.push_to_hub
    training.hub_token, training.push_to_hub = None, False
    if not wanted or training.process_index:
        return None
    assert training.output_dir is not None, "transformers fills it in"
    name = create_repository(training.hub_model_id, training.output_dir, token, training.hub_private_repo)
    return Destination(name, token)
