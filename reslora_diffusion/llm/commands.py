"""Commands for language models: `reslora chat` and `reslora evaluate`. Input is looked at before torch is imported."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..utils.environment import unwritable
from ..utils.files import write_text
from ..utils.problems import BadInput

BaseModel = Annotated[str, typer.Argument(metavar="BASE", help="folder or hub name of the model that was tuned")]
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="folder of an export, of PEFT, or a checkpoint")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the base's own)")]


def chat(
    base: BaseModel,
    adapter: Adapter,
    message: Annotated[
        list[str] | None, typer.Option(help="a turn; several make a conversation (default: what you type)")
    ] = None,
    system: Annotated[str | None, typer.Option(help="text of the system's turn")] = None,
    prompt_template: Annotated[
        str | None, typer.Option("--prompt_template", help="as in training, for models without a template")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", min=1, help="most tokens of an answer")] = 256,
    dtype: Dtype = None,
) -> None:
    """Ask a base and an adapter the same, and see both answers side by side.

    \b
    Example:
      reslora chat Qwen/Qwen3-0.6B my-lora
      reslora chat assets/tiny-llm tiny-lora --message "Tom has 3 pens and gets 4 more. How many has he?"
    """
    from .adapters import Pair
    from .chat import chat

    for _ in chat(Pair(base, adapter, dtype), message or (), system, prompt_template, max_new_tokens):
        pass


def evaluate(
    base: BaseModel,
    adapter: Adapter,
    tasks: Annotated[str, typer.Option(help="of lm-eval, as hellaswag,arc_easy")],
    include_path: Annotated[
        Path | None, typer.Option("--include_path", help="folder with task files of your own")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num_fewshot", min=0, help="examples in the prompt (default: the task's)")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="rows of each task (default: all)")] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="rows in a batch")] = 8,
    chat_template: Annotated[bool, typer.Option("--chat_template", help="ask through the chat template")] = False,
    dtype: Dtype = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON with all metrics of both, base and adapter")
    ] = None,
) -> None:
    """Measure a base and an adapter by tasks of lm-eval (pip install lm-eval).

    \b
    Example:
      reslora evaluate Qwen/Qwen3-0.6B my-lora --tasks hellaswag,arc_easy --output scores.json
    """
    from .adapters import Pair
    from .harness import measure

    if output is not None and (output.is_dir() or not output.parent.is_dir() or unwritable(output.parent)):
        raise BadInput([f"--output {output}: cannot be written, wanted a file in a folder that is there"])
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    settings = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
    settings |= {"apply_chat_template": chat_template}
    found = measure(Pair(base, adapter, dtype), names, include_path, **settings)
    for task, metrics in found.items():
        for metric, values in metrics.items():
            typer.echo(f"{task} {metric}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    if output is not None:
        write_text(output, json.dumps(found, indent=2, default=str) + "\n")
