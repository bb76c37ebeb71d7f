"""Embeddings of new tokens (textual inversion): their files, and pipelines that read them.

    <name>_emb.safetensors     clip_l [n, D1], clip_g [n, D2], t5 [n, D3]: a row for each new token of that encoder
    header                     reslora.tokens: {"TOK": ["<s0>", "<s1>"]}, the tokens that a word of a prompt stands for

These are the files of diffusers' advanced scripts: `pipeline.load_textual_inversion` takes each tensor with the names
of the tokens. ComfyUI (`embedding:<name>_emb`) and A1111 (`<name>_emb`) read the same file; ComfyUI calls the third
tensor t5xxl, so it is there twice. Files of one word are read too: kohya's (`emb_params`) and diffusers' (the word).

A CLIP whose configuration says eos_token_id 2, as those of Stable Diffusion and FLUX.1 do, pools at the largest id of a
prompt. That is the end of the text until there are ids above it: then transformers pools at the last new token and sees
nothing of the prompt behind it, where ComfyUI and A1111 pool at the end. `pool_at_the_end` mends the model in memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..utils.files import atomic_write
from ..utils.problems import listing
from ..utils.wording import TokensByWord, all_of
from .embeddings_header import OF_COMFYUI, TOKENS, read_embeddings_header
from .header import reading

OLD_END = 2  # eos_token_id of CLIP in configurations older than transformers 4.31
CLIPS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True)
class Embeddings:
    """Rows [n, D] of n new tokens by encoder, in float32, and the tokens by the word that stands for them."""

    rows: dict[str, Tensor]
    tokens: dict[str, list[str]]
    facts: dict[str, str] = field(default_factory=dict)  # of the header

    @property
    def names(self) -> list[str]:
        return all_of(self.tokens)


def write_embeddings(path: Path, rows: Mapping[str, Tensor], tokens: TokensByWord, facts: Mapping[str, str]) -> None:
    """Write embeddings, and read them back.

    Raises:
        ValueError: rows are not finite, or what was read is not what was written.
    """
    rows = {key: value.detach().float().cpu().contiguous() for key, value in rows.items()}
    if broken := [key for key, value in rows.items() if not value.isfinite().all()]:
        raise ValueError(f"embeddings of new tokens cannot be exported: {listing(broken)} are not finite")
    twice = {OF_COMFYUI[key]: value.clone() for key, value in rows.items() if key in OF_COMFYUI}
    header = {f"reslora.{name}": value for name, value in facts.items()} | {TOKENS: json.dumps(dict(tokens))}
    with atomic_write(path) as fresh:
        save_file(rows | twice, fresh, metadata={"format": "pt", **header})
        read = read_embeddings(fresh)
        if read.tokens != dict(tokens) or not all(torch.equal(read.rows[key], rows[key]) for key in rows):
            raise ValueError(f"{path} does not hold what was written to it")


def read_embeddings(path: Path) -> Embeddings:
    """Read a file of embeddings: ours, diffusers' or kohya's.

    Raises:
        ValueError: it is none, with what is wrong with it.
    """
    stored, tokens, facts = read_embeddings_header(path)
    with reading(path):
        found = load_file(path)
        rows = {key: found[name].float().reshape(-1, found[name].shape[-1]) for key, name in stored.items()}
        if broken := [key for key, value in rows.items() if not value.isfinite().all()]:
            raise ValueError(f"{path}: {listing(broken)} are not finite")
    return Embeddings(rows, tokens, facts)


# ------------------------------------------------------------------------------------------------- pipelines


def key_of(component: str, kind: str) -> str | None:
    """The key of the embeddings of a text encoder, by its name in the pipeline and its class; None for others."""
    if not component.startswith("text_encoder"):
        return None
    return "t5" if kind.startswith("T5") else CLIPS.get(component) if "CLIP" in kind else None


def places(pipeline: Any) -> dict[str, tuple[Any, Any]]:
    """Text encoder and tokenizer of a pipeline by the key of their embeddings."""
    found = {}
    for end in ("", "_2", "_3"):
        encoder, tokenizer = (getattr(pipeline, f"{part}{end}", None) for part in ("text_encoder", "tokenizer"))
        key = key_of(f"text_encoder{end}", type(encoder).__name__)
        if key and tokenizer is not None:
            found[key] = (encoder, tokenizer)
    return found


def misfits(pipeline: Any, embeddings: Embeddings) -> list[str]:
    """Return reasons why embeddings do not fit the encoders of a pipeline."""
    there = {key: encoder.get_input_embeddings().weight.shape[1] for key, (encoder, _) in places(pipeline).items()}
    return [
        f"its {key} is {rows.shape[1]} wide, and the base has "
        + (f"{there[key]}" if key in there else "no such encoder")
        for key, rows in embeddings.rows.items()
        if there.get(key) != rows.shape[1]
    ]


def load_embeddings(pipeline: Any, embeddings: Embeddings, names: list[str] | None = None) -> None:
    """Teach a pipeline new tokens, as `load_textual_inversion` does, whatever pipeline it is; each CLIP then pools at
    the end of a text.

    Args:
        names: of the tokens, in place of those of the embeddings.

    Raises:
        ValueError: the embeddings are not of this pipeline, or it has tokens of these names already.
    """
    names = names or embeddings.names
    found = places(pipeline)
    problems = misfits(pipeline, embeddings)
    taken = {name for key in embeddings.rows if key in found for name in names if name in found[key][1].get_vocab()}
    problems += [f"the base has {listing(sorted(taken))} already"] if taken else []
    if problems:
        raise ValueError(f"these embeddings do not go with the pipeline: {'; '.join(problems)}")
    for key, rows in embeddings.rows.items():
        encoder, tokenizer = found[key]
        tokenizer.add_tokens(names)
        pool_at_the_end(encoder, tokenizer)
        if len(tokenizer) > len(encoder.get_input_embeddings().weight):
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weight = encoder.get_input_embeddings().weight
        with torch.no_grad():
            weight[tokenizer.convert_tokens_to_ids(names)] = rows.to(weight)


def pool_at_the_end(encoder: nn.Module, tokenizer: Any) -> None:
    """Make a CLIP of an old configuration pool at the end of the text, where it would at the largest id."""
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == OLD_END:
            module.eos_token_id = tokenizer.eos_token_id
