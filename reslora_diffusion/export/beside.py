"""A PEFT model may train more than its factors; this module reads and writes it as PEFT stores it.

    modules_to_save           whole modules, such as the head of a classifier: `score.weight`
    trainable_token_indices   rows of an embedding: `embed_tokens.token_adapter.trainable_tokens_delta` [tokens, width]
    a resized vocabulary      the whole embedding and output layer

Names are those in the base model; in `adapter_model.safetensors` they have PEFT's prefix.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from reslora_diffusion.core.sharding import whole

from ..rules import DEFAULT_ADAPTER
from ..utils.model_files import Files, Unknown
from ..utils.problems import listing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTED = re.compile(r"(^|\.)(lora_\w+|modules_to_save|token_adapter)\.")  # in the names of an adapter's parameters
# Tasks whose models PEFT wraps a head of, and where it looks for one.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def without_peft(model: nn.Module) -> nn.Module:
    """The base under PEFT's wrapper, if it has one."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


class Beside(NamedTuple):
    """Tensors by name, and the fields of `adapter_config.json` by which PEFT finds them."""

    tensors: dict[str, Tensor]
    fields: dict[str, Any]


def trained_beside(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER, base_model: str | None = None) -> Beside:
    """Return what `model` has trained beside the factors of an adapter; a collective where weights are sharded.

    Args:
        model: PEFT's, or one with PEFT's layers in it.
        adapter_name: of the adapter.
        base_model: folder or hub name of the base, to find out whether the vocabulary was resized.
    """
    base = without_peft(model)
    tensors: dict[str, Tensor] = {}
    saved, has_tokens = [], False
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            keys = module.adapter_state_dict_load_map(adapter_name)
            state = module.state_dict() if keys else {}
            tensors |= {f"{name}.{key}": whole(state[held]) for key, held in keys.items()}
            tokens = any("trainable_tokens" in key for key in keys)
            has_tokens |= tokens
            saved += [name.rpartition(".")[2]] if keys and not tokens else []
    fields: dict[str, Any] = {}
    if saved:
        fields["modules_to_save"] = sorted(set(saved))
    if has_tokens:
        configs: Any = model.peft_config
        fields["trainable_token_indices"] = configs[adapter_name].trainable_token_indices
    if not has_tokens and base_model and was_resized(base, base_model):
        tensors |= embeddings(cast("PreTrainedModel", base), set(tensors))  # only such a model has a vocabulary
    return Beside({name: value.detach() for name, value in tensors.items()}, fields)


def was_resized(model: nn.Module, base_model: str) -> bool:
    """Return whether a language model has another number of tokens than its base, as far as this machine knows."""
    try:
        stated = Files(base_model, None).json("config.json")
    except (Unknown, OSError, ValueError):
        return False
    vocabulary = stated.get("vocab_size") or stated.get("text_config", {}).get("vocab_size")
    return vocabulary is not None and vocabulary != getattr(getattr(model, "config", None), "vocab_size", vocabulary)


def embeddings(model: "PreTrainedModel", known: set[str]) -> dict[str, Tensor]:
    """Input embedding and output layer, unless they are adapted or saved already."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for layer in filter(None, layers):
        name = names[id(layer)]
        if isinstance(layer, nn.Linear | nn.Embedding) and f"{name}.weight" not in known:
            found[f"{name}.weight"] = whole(layer.weight)
    return found


def missing_head(task_type: str | None, tensors: Mapping[str, Tensor]) -> str | None:
    """Problems where PEFT will look for a trained head that is not there."""
    wanted = HEADS.get(str(task_type), ())
    if not wanted or any(part in wanted for name in tensors for part in name.split(".")):
        return None
    return (
        f"task_type {task_type} makes PEFT look for a trained head ({' or '.join(wanted)}), and there is none; give "
        "the trained PEFT model as `model`, or another task_type"
    )


def trained_by_hand(model: nn.Module, beside: Beside) -> str | None:
    """Problems where a model trains weights of its base that no folder of PEFT will hold."""
    base = without_peft(model)
    if not any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        return None  # nothing is trained here
    lost = [
        name
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and not ADAPTED.search(name) and name not in beside.tensors
    ]
    if not lost:
        return None
    return (
        f"{listing(lost)} are trained (requires_grad), and a folder of PEFT would not hold them; adapt with "
        "modules_to_save, or freeze them first if the base as released has the same values"
    )


def hold_values(model: nn.Module, beside: Beside) -> None:
    """Give the modules of a hollow model that PEFT copies or fills memory of their own."""
    names = {name.partition(".token_adapter.")[0] for name in beside.tensors}
    for name, module in model.named_modules():
        if (
            name in names
            or any(f"{name}.{part}" in names for part in ("weight", "bias"))
            or any(
                tensor.startswith(f"{name}.")
                and name.rpartition(".")[2] in (beside.fields.get("modules_to_save") or ())
                for tensor in beside.tensors
            )
        ):
            for part in module.modules():
                for key, parameter in part._parameters.items():
                    if parameter is not None:
                        part._parameters[key] = nn.Parameter(torch.zeros_like(parameter).contiguous(), False)


def unlike(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names of what did not arrive as it was written."""
    return sorted(
        name
        for name in got.keys() | wanted.keys()
        if name not in got or name not in wanted or not torch.equal(got[name].to(wanted[name]), wanted[name])
    )
