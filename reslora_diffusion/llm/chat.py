"""`reslora chat BASE ADAPTER`: both answer what is asked, side by side, each in a conversation of its own.

    you      What is 2 + 2?
    ┌ base ──────────────┬ my-lora ──────────────┐
    │ The sum of 2 and … │ 4                     │

Answers are generated greedily and end with the tokens that the adapter was taught to end them with.
"""

import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.problems import BadInput, printable_lines
from .adapters import Pair

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from .records import Messages

AGAIN, END = "/again", "/exit"


@dataclass
class Chat:
    """A model with an adapter, and the two conversations: as the base alone, and with the adapter.

    `prompt_template` is that of the training, for models without a chat template.
    """

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    system: str | None = None
    prompt_template: str | None = None
    max_new_tokens: int = 256
    talks: "dict[str, Messages]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start_again()

    def start_again(self) -> None:
        before: Messages = [{"role": "system", "content": self.system}] if self.system else []
        self.talks = {"base": [*before], "adapter": [*before]}

    def ask(self, text: str) -> dict[str, str]:
        """The answers to the user's next turn, "base" and "adapter".

        Raises:
            BadInput: the chat template does not take the conversation.
        """
        answers = {}
        for name, talk in self.talks.items():
            talk.append({"role": "user", "content": text})
            if name == "base":
                with self.model.disable_adapter():
                    answers[name] = self.answer(talk)
            else:
                answers[name] = self.answer(talk)
            talk.append({"role": "assistant", "content": answers[name]})
        return answers

    def answer(self, talk: "Messages") -> str:
        from .encoder import Encoder
        from .generation import generate

        try:
            prompt = Encoder(self.tokenizer, self.prompt_template).encode_prompt(talk)
        except ValueError as error:
            raise BadInput([str(error)]) from error
        return generate(self.model, self.tokenizer, [prompt], max_new_tokens=self.max_new_tokens)[0]


def chat(
    pair: Pair,
    messages: Iterable[str] = (),
    system: str | None = None,
    prompt_template: str | None = None,
    max_new_tokens: int = 256,
) -> Iterator[dict[str, str]]:
    """Load both and show the answers to `messages`, or, without any, to what is typed until the end of the input."""
    if prompt_template is not None and "{prompt}" not in prompt_template:
        raise BadInput([f"--prompt_template: got {prompt_template!r}, wanted {{prompt}} in it", *pair.problems()])
    model, tokenizer = pair.load()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    talk = Chat(model, tokenizer, system, prompt_template, max_new_tokens)
    label = Path(pair.adapter).name
    for text in messages or typed():
        if text == AGAIN:
            talk.start_again()
            continue
        answers = talk.ask(text)
        show(answers, label)
        yield answers


def typed() -> Iterator[str]:
    """Lines that are typed, until /exit or the end of the input."""
    if sys.stdin.isatty():
        print(f"{AGAIN} starts a new conversation, {END} ends")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == END:
            return
        if text:
            yield text


def show(answers: dict[str, str], label: str) -> None:
    """Two columns, as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table: Any = Table(expand=True)
    for title in ("base", label):
        table.add_column(Text(title), ratio=1)
    table.add_row(*(Text(printable_lines(answers[name])) for name in ("base", "adapter")))
    Console(width=None if sys.stdout.isatty() else max(80, shutil.get_terminal_size().columns)).print(table)
