"""Memory and arithmetic of a training step, before any weight is loaded: the base's forward is run on `meta`.

arithmetic    FLOPs of a forward, and BACKWARD times as much for the gradients of inputs and adapters
time          arithmetic by the speed of this device on a large matrix product: no step can be faster
activations   bytes that the forward keeps for the backward, weights apart
"""

import copy
import time
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import PartialState
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..options import DreamBoothOptions
from ..options.plan import Plan
from .families import Texts, Tokens
from .families.long_prompts import pieces_of
from .load import base_dtype

BACKWARD = 1.3  # times a forward: gradients of inputs and adapters, none of the base
EDGE = 1024  # of the matrices that the device is timed on


class Estimate(NamedTuple):
    flops: float  # of a step, forwards and backwards
    kept: int  # bytes, of one forward


class OnPaper(TorchFunctionMode):
    """Answers on `meta` that a device would give otherwise.

    Attention writes no probabilities, masked or not: every device that is trained on has a kernel that does not. A
    model that asks how many tokens the prompts have, as Lumina 2 does, is told that each has `length`.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and args[0].is_meta:
            return [self.length] * len(args[0])
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        fused = torch.ops.aten._scaled_dot_product_flash_attention
        query, key, value = args[:3] or (kwargs[name] for name in ("query", "key", "value"))
        return fused(query, key, value, 0.0, kwargs.get("is_causal", False), False, scale=kwargs.get("scale"))[0]


class SavedForBackward:
    """Sizes of the storages that a forward keeps for its backward; `models` are there anyway."""

    def __init__(self, *models: nn.Module) -> None:
        self.weights = {p.untyped_storage()._cdata for model in models for p in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.alive: list[Tensor] = []  # so that no storage's place is taken by another

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda value: value)

    def pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self.weights:
            self.sizes[storage._cdata] = storage.nbytes()
            self.alive.append(value.detach())
        return value

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def estimate(plan: Plan, options: DreamBoothOptions) -> Estimate:
    """The cost of one training step at the largest of the sizes that are trained on."""
    base, dtype = plan.base, base_dtype(options)
    family, meta = base.family, dict[str, Any](device="meta")
    models: dict[str, Any] = copy.deepcopy({family.denoiser: base.denoiser, **base.text_encoders})
    for model in models.values():
        model.requires_grad_(False).to(dtype)
    for name, (_, config) in base.adapters(options).items():
        inject_adapter_in_model(config, models[name], low_cpu_mem_usage=True)
    denoiser = models.pop(family.denoiser)
    if options.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()

    classes = any(concept.classes for concept in plan.concepts)
    images, prompts = options.train_batch_size * (1 + classes), 1 + classes
    width, height = (side // base.vae_scale_factor for side in max(plan.buckets, key=lambda size: size[0] * size[1]))
    latents = torch.empty(images, family.vae_channels(base.vae), height, width, dtype=dtype, **meta)
    pieces = pieces_of(options)
    length = base.windows[0][1] + 2 * (pieces - 1)  # each piece has a start and an end
    ids = torch.zeros(prompts, len(models), length, dtype=torch.long, **meta)
    fixed = None
    if family.fixed_encoder:
        length, inner = family.t5_length(options), family.text_width(denoiser.config)
        fixed = torch.empty(prompts, length, inner, dtype=dtype, **meta)
    kept, flops = SavedForBackward(denoiser, *models.values()), FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(kept.hooks())
        stack.enter_context(flops)
        stack.enter_context(OnPaper(length))
        with torch.set_grad_enabled(options.trains_text):
            texts = family.encode([*models.values()], Tokens(ids, fixed))
        first = torch.zeros(images, dtype=torch.long, **meta)
        each = Texts(texts.hidden[first], None if texts.pooled is None else texts.pooled[first])
        condition = family.condition(each, torch.empty(images, 6, dtype=dtype, **meta))
        times = torch.empty(images, **meta)
        guidance = family.guidance_input(family.training_guidance(denoiser.config, options), times)
        family.denoise(denoiser, latents, times, condition | guidance)
    passes = 1 + BACKWARD + options.gradient_checkpointing
    return Estimate(flops.get_total_flops() * passes * options.gradient_accumulation_steps, kept.bytes)


def speed(dtype: torch.dtype) -> float:
    """FLOPs a second of this device on a large matrix product."""
    device = PartialState().device
    a = torch.ones(EDGE, EDGE, dtype=dtype, device=device)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * EDGE**3 / (time.perf_counter() - started))
    return best


def on_paper(plan: Plan, options: DreamBoothOptions) -> str:
    """A line for `--dry_run`."""
    flops, kept = estimate(plan, options)
    seconds = flops / speed(base_dtype(options))
    return (
        f"on paper: {flops / 1e12:.2g} TFLOP a step, on this device at least {seconds:.2g} s, "
        f"{seconds * plan.max_train_steps / 60:.2g} minutes in all; activations about {kept / 1e6:,.1f} MB"
    )
