"""The modules whose forward is one forward of the chains: hooks on them open and close the state of an adapter."""

from collections.abc import Iterable
from typing import Any

from torch import nn

FUSED_PROJECTIONS = (
    "fuse_qkv_projections() has replaced to_q, to_k and to_v, so their adapters are never called; call "
    "unfuse_qkv_projections(), or merge the adapter first (fuse_lora)"
)
DATA_PARALLEL = (
    "torch.nn.DataParallel runs its replicas in threads that share one ResLoRA context; use DistributedDataParallel "
    "(accelerate launch, torchrun)"
)


def is_inside(name: str, ancestor: str) -> bool:
    return not ancestor or name.startswith(f"{ancestor}.")


def find_root(model: nn.Module, names: list[str]) -> tuple[str, nn.Module]:
    """The lowest common ancestor of layers that has a forward of its own: whoever calls the layers calls it."""
    paths = [name.split(".") for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and type(model.get_submodule(".".join(common))).forward is nn.Module.forward:
        common.pop()
    name = ".".join(common)
    return name, model.get_submodule(name)


def find_roots(model: nn.Module, chains: Iterable[list[str]]) -> dict[str, nn.Module]:
    """The outermost of the modules that run whole chains: one for a UNet, two for an encoder and its decoder."""
    found = dict(find_root(model, chain) for chain in chains)
    return {n: r for n, r in found.items() if not any(o != n and is_inside(n, o) for o in found)}


def may_be_fused(model: nn.Module, homes: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules around layers on which `fuse_qkv_projections` of diffusers may be called."""
    parents = set(map(id, homes))
    return [module for module in model.modules() if id(module) in parents and hasattr(module, "fused_projections")]


def is_fused(attention: Any) -> bool:
    """Return whether diffusers' `fuse_qkv_projections` is in force; on older attentions undoing it leaves the flag."""
    if not attention.fused_projections:
        return False
    return hasattr(attention, "unfuse_projections") or "Fused" in type(attention.processor).__name__
