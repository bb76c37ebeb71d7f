"""The variants that are compared: ways to train one frozen model, each put on a fresh copy of it.

floor            the frozen model, with gradients from the first adapted layer on: no adapter can cost less
peft             PEFT's LoRA in the precision of the base                               (the yardstick)
peft_autocast    PEFT's LoRA in float32 under bf16 autocast, as accelerate's scripts run it
peft_bf16_autocast  the same with bf16 adapters
peft_fp32        PEFT's LoRA in float32 on a bf16 base, without autocast
kohya            a LoRA module as in kohya's sd-scripts, in float32 under autocast
paper_*          ResLoRA as the paper writes it, layer by layer, values handed over on the layers
peft_dora        PEFT's DoRA, on a base without autocast
lora, input, block, middle      ours, float32 factors on a base without autocast
dora, block_dora                the same as DoRA
*_frozen         ours, with the memory-saving forms of frozen layers
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from reslora_diffusion import ResLoraConfig, Shortcut, attach
from reslora_diffusion.diffusion.models.attn_processor import set_attn_processors
from reslora_diffusion.diffusion.models.memory import save_memory

RANK = 16


@dataclass(frozen=True)
class Variant:
    """A way to make a frozen model trainable, with or without autocast."""

    name: str
    adapt: Callable[[nn.Module, list[str], bool], None]  # (model, targets, on_gpu)
    autocast: bool = False
    on_cpu: bool = True  # whether it means something there: a float32 base has no autocast


# ------------------------------------------------------------------------------------------------------- floor


def is_adapted(name: str, targets: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


class RequireGrad:
    """Hooks of the floor: the first adapted layer that is reached is where gradients begin."""

    def __init__(self, zero: nn.Parameter) -> None:
        self.begun, self.zero = False, zero

    def start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.begun = False

    def begin(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.begun or not torch.is_grad_enabled():
            return None
        self.begun = True
        if torch.compiler.is_compiling():  # which cannot follow `requires_grad_`
            return output + self.zero
        return output.requires_grad_() if output.is_leaf else None


def floor(model: nn.Module, targets: list[str], on_gpu: bool) -> None:
    weight = next(model.parameters())
    model.floor_zero = nn.Parameter(torch.zeros((), device=weight.device, dtype=weight.dtype))
    state = RequireGrad(model.floor_zero)
    model.register_forward_pre_hook(state.start, with_kwargs=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_adapted(name, targets):
            module.register_forward_hook(state.begin)


# -------------------------------------------------------------------------------------------------------- PEFT


def peft(dtype: torch.dtype | None, dora: bool = False) -> Callable[[nn.Module, list[str], bool], None]:
    def adapt(model: nn.Module, targets: list[str], on_gpu: bool) -> None:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False, use_dora=dora)
        inject_adapter_in_model(config, model)
        base = next(p for p in model.parameters() if not p.requires_grad).dtype
        cast_adapters(model, dtype or base)

    return adapt


def cast_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


# ------------------------------------------------------------------------------------------------------- kohya


class KohyaLora(nn.Module):
    """A LoRA beside a linear layer, in the manner of kohya's sd-scripts: it takes the place of the layer's forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.lora_down = nn.Linear(linear.in_features, RANK, bias=False, device=linear.weight.device)
        self.lora_up = nn.Linear(RANK, linear.out_features, bias=False, device=linear.weight.device)
        self.original, self.scale, self.multiplier = linear.forward, 1.0, 1.0
        linear.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) + self.lora_up(self.lora_down(x)) * self.multiplier * self.scale


def kohya(model: nn.Module, targets: list[str], on_gpu: bool) -> None:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_adapted(n, targets)}
    model.kohya_network = nn.ModuleList(KohyaLora(layer) for layer in layers.values())


# -------------------------------------------------------------------------------------------- as the paper has it


class PaperBlock(nn.Module):
    """One ResLoRA block (arXiv 2402.18039, section 3.2), written down directly: what is needed of the previous block
    is read off that block."""

    def __init__(self, linear: nn.Linear, kind: str, chain: "list[PaperBlock]") -> None:
        super().__init__()
        weight = linear.weight
        self.lora_A = nn.Parameter(torch.randn(RANK, linear.in_features, device=weight.device).to(weight.dtype))
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, RANK, device=weight.device).to(weight.dtype))
        self.kind, self.scaling, self.original = kind, 1.0, linear.forward
        self.earlier = tuple(chain[-1:])
        self.x = self.z = None
        linear.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        before, total = self.original(x), x
        if self.kind == "input":
            if self.earlier:
                total = x + self.earlier[0].x
            self.x = x
        self.z = z = F.linear(total, self.lora_A)
        if self.kind == "middle":
            for other in self.earlier:
                z = z + other.z
        result = before + self.scaling * F.linear(z, self.lora_B)
        if self.kind == "block":
            for other in self.earlier:
                result = result + self.scaling * F.linear(F.linear(x, other.lora_A), other.lora_B)
        return result


def paper(kind: str) -> Callable[[nn.Module, list[str], bool], None]:
    def adapt(model: nn.Module, targets: list[str], on_gpu: bool) -> None:
        from reslora_diffusion.core.chains import build_chains
        from reslora_diffusion.core.discovery import find_sites
        from reslora_diffusion.core.shortcuts import SHORTCUTS

        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_adapted(n, targets)}
        shapes = {name: (layer.in_features, layer.out_features, RANK) for name, layer in layers.items()}
        blocks = nn.ModuleList()
        for chain in build_chains(find_sites(model, shapes), SHORTCUTS[Shortcut(kind)].links):
            made: list[PaperBlock] = []
            for site in chain.sites:
                made.append(PaperBlock(layers[site.name], kind, made))
            blocks.extend(made)
        model.paper_blocks = blocks

    return adapt


# -------------------------------------------------------------------------------------------------------- ours


def ours(shortcut: str, memory: bool = False, dora: bool = False) -> Callable[[nn.Module, list[str], bool], None]:
    def adapt(model: nn.Module, targets: list[str], on_gpu: bool) -> None:
        config = ResLoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=targets,
            shortcut=shortcut,
            init_lora_weights=False,
            use_dora=dora,
        )
        attach(model, config)
        cast_adapters(model, torch.float32)
        if on_gpu:
            set_attn_processors(model)
        if memory:
            save_memory(model)

    return adapt


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("floor", floor),
        Variant("peft", peft(None)),
        Variant("peft_bf16_autocast", peft(None), autocast=True, on_cpu=False),
        Variant("peft_fp32", peft(torch.float32), on_cpu=False),
        Variant("peft_autocast", peft(torch.float32), autocast=True, on_cpu=False),
        Variant("kohya", kohya, autocast=True),
        *(Variant(f"paper_{kind}", paper(kind)) for kind in ("input", "block", "middle")),
        Variant("lora", ours("none")),
        *(Variant(kind, ours(kind)) for kind in ("input", "block", "middle")),
        Variant("peft_dora", peft(torch.float32, dora=True)),
        Variant("dora", ours("none", dora=True)),
        Variant("block_dora", ours("block", dora=True)),
        *(
            Variant(f"{name}_frozen", ours(kind, True))
            for name, kind in {"lora": "none", "input": "input", "block": "block", "middle": "middle"}.items()
        ),
    )
}
