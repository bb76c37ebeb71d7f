"""The cost of a packed step beside the same examples unpacked, by attention and by length of the packs.

    python -m benchmarks.packing [--rounds N] [--output FILE]

A Llama of 4 layers of width 256 learns 2,048 tokens in examples of 64. Packs of T tokens hold T / 64 examples. `mask`
is one call of attention over the pack, `parts` a call for each example (`reslora_diffusion.llm.packed_attention`).
What is compared takes turns in one process, and is timed by the processor time of one thread (`benchmarks.timing`).
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reslora_diffusion.llm.encoding import Collator, Encoded
from reslora_diffusion.llm.packed_attention import attend_in_parts

from .results import FOLDER, write_results
from .timing import compare, cpu_time, table

TOKENS, EXAMPLE, VOCABULARY = 2048, 64, 1000
PACKS = (256, 512, 1024, 2048)


def examples() -> list[Encoded]:
    rows = torch.randint(1, VOCABULARY, (TOKENS // EXAMPLE, EXAMPLE), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows.tolist()]


def make_model(attention: str, parts: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    if parts and not attend_in_parts(model, EXAMPLE):
        raise RuntimeError(f"{attention} attention is not computed in parts")
    return model


def step(model: LlamaForCausalLM, batch: dict[str, Any]) -> None:
    model(**batch).loss.backward()
    model.zero_grad()


def steps_of(attention: str) -> dict[str, Callable[[], Any]]:
    """One forward and backward of each."""
    rows = examples()
    whole, in_parts = make_model(attention, False), make_model(attention, True)
    steps: dict[str, Callable[[], Any]] = {"unpacked": partial(step, whole, Collator(0)(rows))}
    for tokens in PACKS:
        count = tokens // EXAMPLE
        packs = [rows[first : first + count] for first in range(0, len(rows), count)]
        for name, model in (("mask", whole), ("parts", in_parts)):
            collate = Collator(0, lengths=False, parts=model is in_parts)
            steps[f"{name}, {tokens} tokens"] = partial(step, model, collate(packs))
    return steps


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=FOLDER / "packing.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {}
    for attention in ("sdpa", "eager"):
        results[attention] = compare(steps_of(attention), cpu_time, args.rounds, yardstick="unpacked")
        print(f"\n{attention}\n{table(results[attention], 'unpacked')}", flush=True)
    write_results(args.output, "packing", results, tokens=TOKENS, example=EXAMPLE, clock="thread time")


if __name__ == "__main__":
    main()
