"""What a run learns, shown before its first step: how long examples are, and the first as the model sees it.

tokens in an example: 12 least, 38 median, 96 in 95 of 100, 120 most, of 1024; 5,102 in all, 1,930 of them learned
first example, learned parts in [[ ]]:
| <s>user: 2 + 2<end>assistant: [[4<end>]]
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ..utils.problems import printable_lines
from .encoder import IGNORED, Encoded
from .encoding import learned

SHOWN = 400  # tokens of an example


def statistics(examples: Sequence[Encoded], max_length: int) -> Iterator[str]:
    """Lengths of the examples in tokens, and how much of them is learned."""
    lengths = sorted(len(example["input_ids"]) for example in examples)
    median, most = lengths[len(lengths) // 2], lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)]
    yield (
        f"tokens in an example: {lengths[0]} least, {median} median, {most} in 95 of 100, {lengths[-1]} most, of "
        f"{max_length}; {sum(lengths):,} in all, {sum(map(learned, examples)):,} of them learned"
    )


def first_example(example: Encoded, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """An example as text, special tokens and all; what is learned stands in double brackets."""
    pairs = list(zip(example["input_ids"][:SHOWN], example["labels"][:SHOWN], strict=True))
    text = ""
    for is_learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        part = str(tokenizer.decode([i for i, _ in group], skip_special_tokens=False))
        text += f"[[{part}]]" if is_learned else part
    rest = len(example["input_ids"]) - SHOWN
    yield "first example, learned parts in [[ ]]:"
    yield from (f"| {line}" for line in printable_lines(text).split("\n"))
    if rest > 0:
        yield f"| ... and {rest} more tokens"
