"""Files of a pruned model.

Where all blocks have one width, the model's own configuration states it, and `from_pretrained` of transformers loads
the folder. Where they differ (outer blocks were spared), and for the UNets and transformers of diffusers, whose
configurations state no inner width, `pruned.json` stands beside the weights:

    {"layers": {"down_blocks.0. ... .to_q": [8, 16], ...}, "attributes": {"down_blocks.0. ... .attn1": {"heads": 1}}}

and `load_pruned` reads it. `from_pretrained` refuses such a folder, as shapes differ from the configuration's.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn

from ...utils.documents import parse_json
from ...utils.files import write_text
from ...utils.problems import BAD_DATA, BadInput, printable, refuse
from .slicing import Slimmed, resize, set_attributes

SHAPES = "pruned.json"


def save_pruned(model: nn.Module, slimmed: Slimmed, folder: str | Path) -> Path:
    """Write what `slim` has made, by the model's own `save_pretrained`."""
    folder = Path(folder)
    cast(Any, model).save_pretrained(folder)
    if not slimmed.uniform:
        facts = {"layers": dict(slimmed.shapes), "attributes": dict(slimmed.attributes)}
        write_text(folder / SHAPES, json.dumps(facts, indent=2) + "\n")
    return folder


def load_pruned(folder: str | Path, kind: Any, dtype: torch.dtype | None = None) -> Any:
    """Load a folder that `save_pruned` has written.

    >>> unet = load_pruned("my-run/pruned", UNet2DConditionModel)
    >>> pipeline = StableDiffusionPipeline.from_pretrained(base, unet=unet)

    Args:
        kind: the class of the model, of transformers or diffusers.
        dtype: precision of the weights; None leaves that of the files.

    Raises:
        BadInput: the folder is not that of such a model.
    """
    folder = Path(folder)
    if not (folder / SHAPES).is_file():
        return kind.from_pretrained(folder, **({} if dtype is None else {"torch_dtype": dtype}))
    try:
        facts = parse_json((folder / SHAPES).read_text(encoding="utf-8"))
        facts["layers"].items(), facts["attributes"].items()
    except (OSError, *BAD_DATA) as error:
        raise BadInput([f"{folder / SHAPES} cannot be read: {printable(error)}"]) from error
    tensors = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    model = bare(folder, kind)
    names = dict(model.named_modules())
    strange = sorted({*facts["layers"], *facts["attributes"]} - names.keys())
    refuse([f"{folder / SHAPES} names {strange[0]}, which {kind.__name__} does not have"] if strange else [])
    for name, shape in facts["layers"].items():
        layer: Any = names[name]
        layer.weight = nn.Parameter(layer.weight.new_empty(shape))
        if getattr(layer, "bias", None) is not None:
            layer.bias = nn.Parameter(layer.bias.new_empty(shape[0]))
        resize(layer)
    set_attributes(model, facts["attributes"])
    own = model.state_dict()
    unlike = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    unknown = sorted(tensors.keys() - own.keys())
    refuse(f"{folder} holds {name}, which does not fit {kind.__name__}" for name in sorted([*unlike, *unknown])[:8])
    model.load_state_dict(tensors, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    stored = {value.data_ptr() for value in tensors.values()}
    absent = sorted(name for name, value in model.state_dict().items() if value.data_ptr() not in stored)
    refuse(f"{folder} lacks {name}" for name in absent[:8])
    return (model if dtype is None else model.to(dtype)).eval()


def bare(folder: Path, kind: Any) -> Any:
    """A model of the folder's configuration, with any weights."""
    if hasattr(kind, "load_config"):  # of diffusers
        return kind.from_config(kind.load_config(folder))
    return kind._from_config(kind.config_class.from_pretrained(folder))
