"""Options that do not fit a model, found without torch in its files where these suffice, else in its modules.

Files lack what is made when a model is loaded: heads of a classifier, output layers that share the embedding's weight.
So of files only what is certain is said; `models.target_problems` asks the same of the modules of every model.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..utils.model_files import Files, Unknown
from ..utils.problems import listing
from .options import GlueOptions, ScriptOptions
from .quantising import stored_quantisation_problems

EMBEDDING = ("emb", "wte", "wpe")  # in the last part of an embedding's name
OUTPUT = "lm_head"
# Types of model whose tensors are called in files as in memory. Others may be converted when they are loaded.
SAME_NAMES = frozenset(
    "bert distilbert gemma gemma2 gpt2 gpt_neo gptj llama mistral olmo olmo2 opt phi phi3 qwen2 qwen3 roberta "
    "smollm3 starcoder2 t5 xlm-roberta".split()
)

Shapes = Mapping[str, tuple[int, ...]]


def length_problems(context: int | None, max_length: int | None) -> Iterator[str]:
    if max_length is not None and context is not None and max_length > context:
        yield f"--max_length: got {max_length}, wanted at most {context}, the model's context"


def layer_problems(layers: Shapes, targets: Sequence[str], rank: int) -> Iterator[str]:
    """Target modules that match nothing, and layers narrower than the rank. `layers`: the linear ones of a model."""
    for target in targets:
        matched = {name: shape for name, shape in sorted(layers.items()) if f".{name}".endswith(f".{target}")}
        if not matched:
            yield f"--target_modules: {target!r} matches nothing; the model has {listing(leaves_of(layers), 12)}"
        if narrow := [f"{name} {shape}" for name, shape in matched.items() if min(shape) < rank]:
            yield f"--rank: got {rank}, larger than {listing(narrow)}"


def leaves_of(layers: Shapes) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in layers})


def stored_problems(options: ScriptOptions) -> list[str]:
    """Problems that a model's files on this machine show; files of vision-language models hold more than is trained."""
    files = Files(str(options.model_name_or_path), options.model_revision)
    try:
        config = files.json("config.json")
        if "text_config" in config:
            return []
        context = config.get("max_position_embeddings", config.get("n_positions"))  # as GPT-2 calls it
        problems = [*length_problems(context, options.max_length), *stored_quantisation_problems(config, options)]
        layers = stored_layers(files.shapes("")) if options.target_modules and keeps_names(config) else {}
    except (Unknown, OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    if not layers:
        return problems
    leaves, whole = {*leaves_of(layers), OUTPUT}, not isinstance(options, GlueOptions)
    targets = [target for target in options.target_modules or [] if target != "all-linear"]
    certain = [
        target
        for target in targets
        if any(f".{name}".endswith(f".{target}") for name in layers)
        or (whole and target.rpartition(".")[2] not in leaves)
    ]
    return problems + [*layer_problems(layers, certain, options.rank)]


def keeps_names(config: Mapping[str, Any]) -> bool:
    """Return whether a model's tensors certainly have the names in its files that they have once loaded."""
    return config["model_type"] in SAME_NAMES and "quantization_config" not in config


def stored_layers(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The linear layers among a model's tensors, by name and in order of names."""
    weights: dict[str, tuple[int, ...]] = {
        name.removesuffix(".weight"): shape for name, shape in sorted(shapes.items()) if len(shape) == 2
    }
    found = {
        name: shape
        for name, shape in weights.items()
        if not any(part in name.rpartition(".")[2] for part in EMBEDDING) and f"{name}.weight" in shapes
    }
    tied: tuple[int, ...] | None = next((shape for name, shape in weights.items() if name not in found), None)
    return found if OUTPUT in found or tied is None else found | {OUTPUT: tied}
