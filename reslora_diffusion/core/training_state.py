"""Training state on disk: safetensors for tensors, JSON for everything else, never a pickle.

A training state is a folder:

    <name>.safetensors     parameters and optimizer moments, keyed by parameter name
    <name>.json            learning-rate schedule, step counters, whatever the caller adds

`save_training_state` writes the folder under a temporary name and renames it, so that a run killed half-way leaves
the previous state untouched. `load_training_state` is its inverse and restores in place.
"""

import json
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
    fresh = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    facts = dict(facts or {})
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if optimizer is not None and model is not None:
        flat: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=FLAT))
        stored |= {f"optimizer.{k}": v.detach().cpu().contiguous() for k, v in flat.items() if torch.is_tensor(v)}
        facts["optimizer"] = {k: v for k, v in flat.items() if not torch.is_tensor(v)}
    save_file(stored, fresh / "state.safetensors")
    (fresh / "state.json").write_text(json.dumps(facts, indent=2))
    stale = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)
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
    """
    folder = Path(folder)
    missing = [name for name in ("state.safetensors", "state.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is not a complete training state: {' and '.join(missing)} missing")
    stored = load_file(folder / "state.safetensors")
    facts = json.loads((folder / "state.json").read_text())
    moments = {k.removeprefix("optimizer."): v for k, v in stored.items() if k.startswith("optimizer.")}
    flat: dict[str, Any] = {k.replace(WRAPPED, ""): v for k, v in moments.items()}
    flat |= facts.pop("optimizer", {})
    if optimizer is not None and model is not None:
        set_moments(model, optimizer, flat)
    return {k: v for k, v in stored.items() if not k.startswith("optimizer.")}, facts


def set_moments(model: nn.Module, optimizer: torch.optim.Optimizer, flat: dict[str, Any]) -> None:
    """Restore an optimizer. What never had a gradient has no moments, as the last layer of CLIP where a model reads the
    one before it; `set_optimizer_state_dict` wants some of every parameter, so it is lent fresh ones for a moment."""
    fresh = {k.replace(WRAPPED, ""): v for k, v in get_optimizer_state_dict(model, optimizer, options=FLAT).items()}
    set_optimizer_state_dict(model, optimizer, fresh | flat, options=FLAT)
    lent = {key.rpartition(".")[0] for key in fresh} - {key.rpartition(".")[0] for key in flat}
    for name, parameter in model.named_parameters():
        if f"state.{name}" in lent:
            optimizer.state.pop(parameter, None)
