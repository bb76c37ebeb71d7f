"""Random LoRA factors for real models, and what loaders made of them, in float64 and without the exporter's help."""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from reslora_diffusion.core.functional import LoraFactors

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def random_factors(
    model: nn.Module, targets: tuple[str, ...], seed: int, ranks: tuple[int, ...] = (4,), scalings=(1.0,), std=0.3
) -> dict[str, LoraFactors]:
    """Factors for every linear layer and convolution whose name ends so; ranks and scalings take turns."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim not in (2, 4) or not name.endswith(targets):
            continue
        turn = len(factors)
        rank, kernel = ranks[turn % len(ranks)], weight.shape[2:]
        A = torch.randn(rank, weight.shape[1], *kernel, generator=generator) * std
        B = torch.randn(weight.shape[0], rank, *(1 for _ in kernel), generator=generator) * std
        factors[name] = LoraFactors(A, B, scalings[turn % len(scalings)])
    return factors


def dense(factors: LoraFactors) -> Tensor:
    """Float64 delta_weight, convolutions flattened."""
    return factors.scaling * (factors.lora_B.double().flatten(1) @ factors.lora_A.double().flatten(1))


def unprefixed(name: str) -> str:
    return name.removeprefix("text_model.")


def loaded_deltas(model: nn.Module) -> dict[str, Tensor]:
    """What the layers of a model add to their weights: the sum over their active adapters."""
    deltas = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            parts = [
                layer.scaling[a]
                * (layer.lora_B[a].weight.double().flatten(1) @ layer.lora_A[a].weight.double().flatten(1))
                for a in layer.active_adapters
                if a in layer.lora_A
            ]
            deltas[unprefixed(name)] = sum(parts).detach()
    return deltas


def largest_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative, over modules; names must be the same."""
    assert got.keys() == wanted.keys()
    return max(((got[n] - wanted[n]).norm() / wanted[n].norm()).item() for n in wanted)


def wanted_deltas(factors: dict[str, LoraFactors]) -> dict[str, Tensor]:
    return {unprefixed(name): dense(f) for name, f in factors.items()}
