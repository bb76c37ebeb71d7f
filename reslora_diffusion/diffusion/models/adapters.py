"""The adapters of one run, on the denoiser and perhaps the text encoders, LoRA and ResLoRA alike.

`--method lora` is the shortcut `none` of the same code: PEFT's numbers, in less time. What a ResLoRA has besides is a
chain, from which its factors are merged (`merged_factors`), perhaps after calibration; and only inside `merged_forward`
does it compute what will be exported.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from reslora_diffusion import (
    AdaptedModel,
    LoraFactors,
    ResLoraConfig,
    Shortcut,
    attach,
    calibrate,
    distill,
    explain,
    factor_pairs,
    get_adapter,
    merged_factors,
    merged_forward,
    relative_output_errors,
)
from reslora_diffusion.methods.optimizers import FactorPair

from ...utils.problems import listing, refuse
from ..data.sampling import Batch
from ..objective.randomness import Stream, seed_of
from ..options import DreamBoothOptions
from .meta_pipeline import MetaPipeline
from .new_tokens import add_new_tokens, new_tokens_in

ADAPTER = "default"
NOTHING_TO_MERGE = "none"  # in place of a merge method, where the adapter is a plain LoRA
Forward = Callable[[nn.Module, Batch], Any]  # a tensor of the denoiser, states of a text encoder


def add_adapters(pipeline: DiffusionPipeline, base: MetaPipeline, options: DreamBoothOptions) -> "Adapters":
    """Freeze the pipeline and put fresh float32 adapters on it; equal seeds give equal adapters."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    assert options.seed is not None, "`resolve_seed` has set it"
    torch.manual_seed(seed_of(options.seed, Stream.ADAPTER))
    models = {}
    for component, (_, config) in base.adapters(options).items():
        model = models[component] = getattr(pipeline, component)
        attach(model, config, ADAPTER)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return Adapters(models, add_new_tokens(pipeline, base.family, options))


@dataclass(frozen=True)
class Adapters:
    """Adapted models by component: the denoiser, then the text encoders if they are trained. Text encoders whose new
    tokens are trained stand apart."""

    models: dict[str, nn.Module]
    with_new_tokens: dict[str, nn.Module] = field(default_factory=dict)  # text encoders, which have no adapter
    stopped: set[str] = field(default_factory=set)  # those that are not trained any more

    @property
    def denoiser(self) -> str:
        return next(iter(self.models))

    @property
    def config(self) -> ResLoraConfig:
        """The configuration of the denoiser's adapter; all adapters have one method."""
        return get_adapter(self.models[self.denoiser], ADAPTER).config

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Every model that something is trained of."""
        return {**self.models, **self.with_new_tokens}

    def handles(self) -> list[AdaptedModel]:
        """The adapters, as schedules take them."""
        return [AdaptedModel(model, ADAPTER) for model in self.models.values()]

    def pairs(self) -> list[FactorPair]:
        """The two factors of every layer, for optimizers that see them together."""
        return [pair for model in self.models.values() for pair in factor_pairs(model, ADAPTER)]

    def named_parameters(self, component: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.trained[component].named_parameters() if p.requires_grad}

    def by_component(self) -> dict[str, dict[str, nn.Parameter]]:
        return {component: self.named_parameters(component) for component in self.trained}

    def tensors(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by component and name."""
        return {
            f"{component}.{name}": parameter
            for component, parameters in self.by_component().items()
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`; raises `BadInput` if names or shapes differ."""
        own = self.tensors()
        absent, strange = own.keys() - tensors.keys(), tensors.keys() - own.keys()
        unlike = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
        problems = {"lacks": absent, "also holds": strange, "holds in another shape": unlike}
        refuse(f"the checkpoint {how} {listing(sorted(names))}" for how, names in problems.items() if names)
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def train(self, mode: bool = True) -> None:
        for component, model in self.trained.items():
            model.train(mode and component not in self.stopped)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """No gradients and no dropout inside."""
        self.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.train()

    # ------------------------------------------------------------------------------------------ merging

    def calibrate(self, batches: Sequence[Batch], forwards: dict[str, Forward], distillation_steps: int = 0) -> None:
        """Gather what the merge method needs, over all processes: each must call this, with its share of the batches.

        Text encoders come first: the denoiser is then calibrated, and its merge refined in `distillation_steps`, on the
        states that they will give it when merged.
        """
        with self.evaluation(), ExitStack() as merged:
            for component in reversed(self.models):
                model, forward = self.models[component], forwards[component]
                calibrate(model, batches, forward, ADAPTER)
                if distillation_steps and component == self.denoiser:
                    distill(model, batches, forward, ADAPTER, steps=distillation_steps)
                merged.enter_context(merged_forward(self.models[component], ADAPTER))

    def output_errors(self, batches: Sequence[Batch], forwards: dict[str, Forward]) -> dict[str, float]:
        """Measure the change by merging of each layer's output, relative to what the adapter adds to it; called like
        `calibrate`."""
        with self.evaluation():
            return {
                f"{component}.{name}": error
                for component, model in self.models.items()
                for name, error in relative_output_errors(model, batches, forwards[component], ADAPTER).items()
            }

    def merged(self) -> AbstractContextManager:
        """Inside, the models compute what will be exported."""
        stack = ExitStack()
        for model in self.models.values():
            stack.enter_context(merged_forward(model, ADAPTER))
        return stack

    def factors(self) -> dict[str, dict[str, LoraFactors]]:
        """The plain LoRA of each component, in the form `export_lora` takes."""
        return {component: merged_factors(model, ADAPTER) for component, model in self.models.items()}

    def merging(self) -> dict[str, str]:
        """Names of the shortcut and of the merge method in use; a plain LoRA has nothing to merge."""
        shortcut, merge_method = str(self.config.shortcut), str(self.config.merge_method)
        return {
            "shortcut": shortcut,
            "merge_method": NOTHING_TO_MERGE if shortcut == Shortcut.NONE else merge_method,
        }

    def links(self) -> list[str]:
        """A line on each component's shortcuts."""
        if self.config.shortcut is Shortcut.NONE:
            return []
        return [f"{name}: {str(explain(model, ADAPTER)).splitlines()[0]}" for name, model in self.models.items()]

    # ------------------------------------------------------------------------------------------ new tokens

    def rescale_new_tokens(self, where: Tensor) -> None:
        """Bring new tokens that are trained towards the size of the others, if `where` [] is true."""
        for component, encoder in self.with_new_tokens.items():
            if component not in self.stopped:
                new_tokens_in(encoder).rescale(where)

    def new_tokens(self) -> dict[str, Tensor]:
        """Embeddings [n, D] of the new tokens by component, on the CPU."""
        return {name: new_tokens_in(one).new.detach().cpu().clone() for name, one in self.with_new_tokens.items()}

    # ------------------------------------------------------------------------------------------ health

    @torch.no_grad()
    def limit_norms(self, largest: float) -> None:
        """Scale A and B of each layer so that ||s B A||_F is at most `largest`; nothing waits for the device."""
        for model in (model for component, model in self.models.items() if component not in self.stopped):
            for layer in model.modules():
                if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
                    halves = (half[ADAPTER].get_parameter("weight") for half in (layer.lora_A, layer.lora_B))
                    A, B = (half.flatten(1) for half in halves)  # views, of a convolution's factors
                    # ||B A||^2 = <B^T B, A A^T>: r x r products, not out x in.
                    squared = ((B.T @ B) * (A @ A.T)).sum().clamp(min=1e-20)
                    factor = (largest / (layer.scaling[ADAPTER] * squared.sqrt())).clamp(max=1).sqrt()
                    A.mul_(factor)
                    B.mul_(factor)

    def health_problem(self) -> str | None:
        """Return reasons why these adapters must not be exported."""
        tensors = self.tensors()
        if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
            return f"{len(broken)} of {len(tensors)} adapter tensors are not finite: {listing(broken)}"
        linked = any(get_adapter(model, ADAPTER).frozen for model in self.models.values())  # a next link is zero
        if not linked and not any(value.any() for name, value in tensors.items() if "lora_B" in name):
            return "every lora_B is zero: nothing was learned"
        return None
