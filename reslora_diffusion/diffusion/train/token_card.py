"""The part of a model card that is about new tokens."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import diffusers
from diffusers.loaders import TextualInversionLoaderMixin

from reslora_diffusion.export.embeddings import OLD_END
from reslora_diffusion.export.embeddings_header import SUFFIX

from ...utils.problems import listing, printable
from ...utils.wording import all_of
from ..options import DreamBoothOptions
from .record import export_name

if TYPE_CHECKING:
    from ..models.meta_pipeline import MetaPipeline


def token_paragraph(options: DreamBoothOptions) -> list[str]:
    """Return the lines on the new tokens and the files of their embeddings."""
    if not options.new_tokens:
        return []
    words = {printable(word, None).replace("`", "'"): "".join(own) for word, own in options.new_tokens.items()}
    pairs = listing((f"`{word}` is `{own}`" for word, own in words.items()), 20)
    name = f"{export_name(options)}{SUFFIX}"
    return [
        "",
        f"New tokens were trained beside it (pivotal tuning): {pairs} in a prompt. Their embeddings are `{name}`, "
        f"which ComfyUI and A1111 call `{name.removesuffix('.safetensors')}`.",
    ]


def token_imports(options: DreamBoothOptions, base: "MetaPipeline") -> Iterator[str]:
    """Lines at the head of a program that loads the tokens."""
    if options.new_tokens:
        if not loads_tokens(base):
            yield "from diffusers.loaders import TextualInversionLoaderMixin"
        if options.push_to_hub:
            yield "from huggingface_hub import hf_hub_download"
        yield "from safetensors.torch import load_file"


def token_lines(options: DreamBoothOptions, base: "MetaPipeline", where: str) -> Iterator[str]:
    """Lines that give a pipeline `pipe` the tokens; `where` is the adapter's folder or repository."""
    if not options.new_tokens:
        return
    name = json.dumps(f"{export_name(options)}{SUFFIX}")
    path = f"hf_hub_download({json.dumps(where)}, {name})" if options.push_to_hub else name
    if not loads_tokens(base):
        yield 'pipe = type("Pipeline", (type(pipe), TextualInversionLoaderMixin), {})(**pipe.components)'
    yield f"tokens = {json.dumps(all_of(options.new_tokens))}"
    yield f"rows = load_file({path})"
    for encoder, tokenizer in base.family.token_encoders(options).items():
        key, own = base.family.embedding_keys[encoder], f"text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer}"
        yield f'pipe.load_textual_inversion(rows["{key}"], token=tokens, {own})'
        config = getattr(base.text_encoders.get(encoder), "config", None)
        if getattr(config, "eos_token_id", None) == OLD_END:  # see `export.embeddings`
            clip = f'getattr(pipe.{encoder}, "text_model", pipe.{encoder})'
            yield f"{clip}.eos_token_id = pipe.{tokenizer}.eos_token_id  # as trained: pool at the end of the prompt"


def loads_tokens(base: "MetaPipeline") -> bool:
    """Return whether the pipeline has `load_textual_inversion`, as that of Stable Diffusion 3 has not."""
    return issubclass(getattr(diffusers, base.family.pipeline_class), TextualInversionLoaderMixin)
