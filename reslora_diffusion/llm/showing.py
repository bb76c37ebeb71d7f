"""A run shows what it learns before weights are read: the lengths of examples, and the first as the model sees it.

tokens in an example: 12 least, 38 median, 96 in 95 of 100, 120 most, of 1024; 5,102 in all, 1,930 of them learned
first example, learned parts in [[ ]]:
| <s>user: 2 + 2<end>assistant: [[4<end>]]
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..utils.problems import BadInput, printable, printable_lines
from .encoder import IGNORED, Encoded, Encoder
from .encoding import beginning, cut_to_nothing, learned, row_problems
from .records import Number

SHOWN = 400  # tokens of an example


def statistics(examples: Sequence[Encoded], max_length: int) -> Iterator[str]:
    """Lengths of the examples in tokens, and how much of them is learned."""
    lengths = sorted(len(example["input_ids"]) for example in examples)
    median, most = lengths[len(lengths) // 2], lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)]
    yield (
        f"tokens in an example: {lengths[0]} least, {median} median, {most} in 95 of 100, {lengths[-1]} most, of "
        f"{max_length}; {sum(lengths):,} in all, {sum(map(learned, examples)):,} of them learned"
    )


def preferences(rows: Sequence[Mapping[str, Any]], encoder: Encoder, longest: int) -> Iterator[str]:
    """Lengths of both answers of each row behind their prompts, how many are cut, and the first row's.

    Args:
        rows: `{"prompt": [turns], "chosen": [turn], "rejected": [turn]}`.
        longest: most tokens of a prompt and its answer, which are cut behind them.

    Raises:
        BadInput: rows that the chat template does not take, or with an answer of which nothing is left.
    """
    examples: dict[str, list[Encoded]] = {"chosen": [], "rejected": []}
    faults: dict[str, list[Number]] = {}
    empty: dict[Number, int] = {}
    for number, row in enumerate(rows, 1):
        for name, found in examples.items():
            try:
                example = encoder.encode(encoder.sequences([*row["prompt"], *row[name]])[-1])
            except ValueError as error:
                faults.setdefault(str(error), []).append(number)
                continue
            found.append(example)
            if not learned(beginning(example, longest)):
                empty[number] = len(example["input_ids"])
    if problems := [*row_problems(faults, "train"), *cut_to_nothing(empty, "train", longest)]:
        raise BadInput(problems)
    both = examples["chosen"] + examples["rejected"]
    yield from statistics(both, longest)
    if cut := sum(len(example["input_ids"]) > longest for example in both):
        yield f"train: {cut} of {len(both)} answers are cut behind {longest} tokens of prompt and answer"
    for name, found in examples.items():
        yield from first_example(found[0], encoder.tokenizer, f"first row, the {name} answer in [[ ]]:")


def questions(rows: Sequence[Mapping[str, Any]], encoder: Encoder, longest: int) -> Iterator[str]:
    """The first question, and what is rewarded. `rows`: `{"prompt": [turns], "wanted": ...}`."""
    yield "first question:"
    yield from (f"| {line}" for line in printable_lines(encoder.prompt_text(rows[0]["prompt"])).split("\n"))
    yield f"rewarded: an answer equal to {printable(rows[0]['wanted'])}"


def first_example(
    example: Encoded, tokenizer: PreTrainedTokenizerBase, title: str = "first example, learned parts in [[ ]]:"
) -> Iterator[str]:
    """An example as text, special tokens and all; what is learned stands in double brackets."""
    pairs = list(zip(example["input_ids"][:SHOWN], example["labels"][:SHOWN], strict=True))
    text = ""
    for is_learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        part = str(tokenizer.decode([i for i, _ in group], skip_special_tokens=False))
        text += f"[[{part}]]" if is_learned else part
    rest = len(example["input_ids"]) - SHOWN
    yield title
    yield from (f"| {line}" for line in printable_lines(text).split("\n"))
    if rest > 0:
        yield f"| ... and {rest} more tokens"
