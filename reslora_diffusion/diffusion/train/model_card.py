"""README.md of a trained adapter, in the hub's format, with a program that runs as it stands in that folder."""

import json
import os
from pathlib import Path

from reslora_diffusion.export.header import DIFFUSERS_FILE

from ...utils.problems import listing, printable
from ..models.families.unet import scheduler_changes
from ..models.load import base_model_name
from ..models.meta_pipeline import MetaPipeline, given_base
from ..options import DreamBoothOptions
from .token_card import token_imports, token_lines, token_paragraph


def model_card(
    options: DreamBoothOptions,
    tag: str,
    prompt: str,
    lines: list[str],
    images: list[str],
    vae_class: str = "AutoencoderKL",
    model: MetaPipeline | None = None,
) -> str:
    """`prompt` is one that was trained, `lines` what merging cost; `model` is the base, for new tokens."""
    prompt = options.worded(prompt)
    base, local = base_model_name(options), Path(given_base(options)).is_dir()
    tags = ["text-to-image", "diffusers", "lora", "diffusers-training", tag, options.method]
    return "\n".join(
        [
            "---",
            *([] if local else [f"base_model: {quoted(base)}"]),  # the hub takes names of its own only
            "library_name: diffusers",
            f"instance_prompt: {quoted(prompt)}",
            f"tags: [{listing(tags, len(tags))}]",
            "---",
            "",
            f"# {in_code(Path(options.output_dir).resolve().name)}",
            "",
            f"A LoRA for {in_code(base)}, trained by DreamBooth on {in_code(prompt)}; text encoder trained: "
            f"{'yes' if options.train_text_encoder else 'no'}.",
            *token_paragraph(options),
            "",
            "```python",
            *usage(options, prompt, vae_class, model),
            "```",
            "",
            *lines,
            "",
            *(f"![{name}]({name})" for name in images),
            "",
        ]
    )


def quoted(text: str) -> str:
    """A text of printable characters between quotes, as YAML, JSON and Python read it."""
    return json.dumps(printable(text, None), ensure_ascii=False)


def in_code(text: str) -> str:
    """A text of printable characters in Markdown's marks for code, where nothing is HTML or a link."""
    return f"`{printable(text, None).replace('`', chr(39))}`"


def usage(
    options: DreamBoothOptions, prompt: str, vae_class: str = "AutoencoderKL", model: MetaPipeline | None = None
) -> list[str]:
    """A program that generates an image with the adapter, by the same process as it was trained with."""
    more = {name: value for name in ("revision", "variant") if (value := getattr(options, name))}
    more |= {"text_encoder_3": None, "tokenizer_3": None} if options.skip_t5 else {}
    given = "".join(f", {name}={literal(value)}" for name, value in more.items())
    changes = "".join(f", {name}={literal(value)}" for name, value in scheduler_changes(options).items())
    vae = options.pretrained_vae_model_name_or_path
    lines = [
        f"from diffusers import {vae_class}, DiffusionPipeline" if vae else "from diffusers import DiffusionPipeline"
    ]
    lines += token_imports(options, model) if model else []
    lines += ["", f"base = {place(given_base(options), options)}"]
    if vae:
        lines.append(f"vae = {place(vae, options)}")
        given += f", vae={vae_class}.from_pretrained(vae)"
    lines.append(f"pipe = DiffusionPipeline.from_pretrained(base{given})")
    if changes:
        lines.append(f"pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config{changes})")
    if options.skip_clip_layers:  # of the pipeline's own `clip_skip` the empty prompt knows nothing
        lines.append('encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder')
        count = options.skip_clip_layers
        lines.append(f"encoder.layers = encoder.layers[:-{count}]  # as trained, with --skip_clip_layers {count}")
    where = options.hub_model_id if options.push_to_hub else "."
    lines.append(f'pipe.load_lora_weights("{where}", weight_name="{DIFFUSERS_FILE}")')
    lines += token_lines(options, model, str(where)) if model else []
    length = f", max_sequence_length={options.max_sequence_length}" if options.max_sequence_length else ""
    lines.append(f"image = pipe(prompt={quoted(prompt)}{length}).images[0]")
    return [*lines, 'image.save("image.png")']


def literal(value: str | bool | None) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value)


def place(name: str, options: DreamBoothOptions) -> str:
    """Return the place of a model: a hub name, or a path relative to the adapter's folder with a comment."""
    folder = Path(name)
    if not folder.is_dir():
        return json.dumps(name)
    folder, output = folder.resolve(), Path(options.output_dir).resolve()
    try:
        shared = Path(os.path.commonpath([folder, output]))
    except ValueError:  # on two drives
        shared = Path(folder.anchor)
    if shared == Path(shared.anchor):  # what they share is the machine: its paths are nobody else's business
        return f"{json.dumps(f'path/to/{folder.name}')}  # put the path of the base here"
    path = Path(os.path.relpath(folder, output)).as_posix()
    return f"{json.dumps(path)}  # relative to this folder; put another path of the base here if it moved"
