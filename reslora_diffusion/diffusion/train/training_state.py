"""Training state on disk: safetensors for tensors, JSON for everything else, never a pickle.

A training state is a folder:

    state.safetensors     parameters and optimizer moments, keyed by parameter name
    state.json            step counters, whatever the caller adds, shapes and checksums

`save_training_state` writes the folder under a temporary name, flushes and renames it, so that a run killed half-way
leaves the previous state untouched. `load_training_state` is its inverse: it compares checksums and restores in place.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ...utils.files import partial_name, replace_folder
from ...utils.state_files import FACTS, TENSORS, BrokenState, check_state, write_facts

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
# What bitsandbytes puts between a parameter and its 8-bit moments in `state_dict()`, and not in `state`.
WRAPPED = "__bnb_optimizer_quant_state__."


def save_training_state(
    folder: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write a training state so that it is either wholly there or not there at all.

    Args:
        folder: where the state goes; an older state of that name is replaced only once the new one is complete.
        tensors: what is trained (and EMA copies, generator states, ...), by name.
        model: owner of the optimizer's parameters; gives the moments their names.
        optimizer: its per-parameter state is stored under `optimizer.` keys.
        facts: JSON-serialisable values: step, schedule state, configuration, versions.
    """
    folder = Path(folder)
    fresh = partial_name(folder)
    fresh.mkdir(parents=True)
    facts = dict(facts or {})
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if optimizer is not None and model is not None:
        flat: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=FLAT))
        stored |= {f"optimizer.{k}": v.detach().cpu().contiguous() for k, v in flat.items() if torch.is_tensor(v)}
        facts["optimizer"] = {k: v for k, v in flat.items() if not torch.is_tensor(v)}
    try:
        save_file(stored, fresh / TENSORS)
        write_facts(fresh, facts)
        replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def load_training_state(
    folder: str | os.PathLike,
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_training_state` wrote: `(tensors, facts)`, with the optimizer restored in place if given.

    Raises:
        FileNotFoundError: the folder is not a complete training state.
        BrokenState: it is not what was written; says what is damaged or missing.
    """
    folder = Path(folder)
    missing = [name for name in (TENSORS, FACTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is not a complete training state: {' and '.join(missing)} missing")
    facts = check_state(folder)
    stored = load_file(folder / TENSORS)
    moments = {k.removeprefix("optimizer."): v for k, v in stored.items() if k.startswith("optimizer.")}
    flat: dict[str, Any] = {k.replace(WRAPPED, ""): v for k, v in moments.items()}
    flat |= facts.pop("optimizer", {})
    if optimizer is not None and model is not None:
        set_moments(model, optimizer, flat)
    return {k: v for k, v in stored.items() if not k.startswith("optimizer.")}, facts


def set_moments(model: nn.Module, optimizer: torch.optim.Optimizer, flat: dict[str, Any]) -> None:
    """Restore an optimizer. What never had a gradient has no moments, as the last layer of CLIP where a model reads the
    one before it; `set_optimizer_state_dict` wants moments of every parameter, so fresh ones are added for it.

    Raises:
        BrokenState: a parameter has some of its moments and lacks others.
    """
    for parameter in [parameter for parameter, state in optimizer.state.items() if not state]:
        del optimizer.state[parameter]  # made by asking for it; torch's helpers take it for a state
    fresh = {k.replace(WRAPPED, ""): v for k, v in get_optimizer_state_dict(model, optimizer, options=FLAT).items()}
    added = {key.rpartition(".")[0] for key in fresh} - {key.rpartition(".")[0] for key in flat}
    absent = [key for key in fresh.keys() - flat.keys() if key.rpartition(".")[0] not in added]
    if torn := sorted(key for key in absent if key.startswith("state.")):
        raise BrokenState(f"the training state lacks moments: {', '.join(torn[:3])}")
    set_optimizer_state_dict(model, optimizer, fresh | flat, options=FLAT)
    for name, parameter in model.named_parameters():
        if f"state.{name}" in added:
            optimizer.state.pop(parameter, None)
    set_rest(model, optimizer, {key: flat[key] for key in flat.keys() - fresh.keys()})


def set_rest(model: nn.Module, optimizer: torch.optim.Optimizer, rest: dict[str, Any]) -> None:
    """Restore what torch's helpers do not: what an optimizer makes in a step with gradients and not in one without."""
    parameters = dict(model.named_parameters())
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for key, value in rest.items():
        kind, _, name = key.partition(".")
        owner, _, entry = name.rpartition(".")
        parameter = parameters.get(owner)
        if parameter is None or parameter not in groups:
            continue
        if kind == "state":
            optimizer.state[parameter][entry] = value.to(parameter.device) if torch.is_tensor(value) else value
        else:
            groups[parameter][entry] = value


def take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Take out the tensors whose names begin with `prefix`, and return them under the rest of their names."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
