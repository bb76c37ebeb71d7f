"""The adapters of one run, on the UNet and perhaps the text encoder, LoRA and ResLoRA alike.

What differs between the two methods is here and nowhere else: a LoRA's factors are its weights, a ResLoRA's are merged
from its chain (`merged_factors`), which may need calibration; a LoRA computes as it will be exported, a ResLoRA does
so inside `merged_forward`.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from reslora_diffusion import (
    LoraFactors,
    ResLoraConfig,
    attach,
    calibrate,
    get_controller,
    merged_factors,
    merged_forward,
    relative_output_errors,
)

from .problems import BadInput, listing, refuse
from .randomness import Stream, seed_of
from .sampling import Batch

ADAPTER = "default"
Forward = Callable[[nn.Module, Batch], object]


def lora_config(args: Namespace, target_modules: list[str]) -> LoraConfig:
    """PEFT's configuration of either method. Options that were not given keep the configuration's own defaults."""
    common = {
        "r": args.rank,
        "lora_alpha": args.lora_alpha or args.rank,
        "lora_dropout": args.lora_dropout,
        "use_rslora": args.use_rslora,
        "init_lora_weights": "gaussian",
        "target_modules": target_modules,
    }
    if args.method == "lora":
        return LoraConfig(**common)
    given = {name: getattr(args, name) for name in ("shortcut", "merge_method") if getattr(args, name) is not None}
    if args.num_previous is not None:
        given["num_previous"] = None if args.num_previous == "all" else args.num_previous
    return ResLoraConfig(**common, **given)


def target_problems(model: nn.Module, component: str, target_modules: list[str], rank: int) -> list[str]:
    """Names that match nothing, and layers that are narrower than the rank."""
    problems, narrow = [], {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    for target in target_modules:
        matched = {name: layer for name, layer in layers.items() if name == target or name.endswith(f".{target}")}
        if not matched:
            leaves = sorted({name.rsplit(".", 1)[-1] for name, layer in layers.items() if layer.weight.ndim == 2})
            problems.append(f"target module {target!r} matches nothing in the {component}; it has {listing(leaves, 12)}")
        for name, layer in matched.items():
            if min(layer.weight.shape[:2]) < rank:
                narrow[name] = f"{name} {tuple(layer.weight.shape[:2])}"
    if narrow:
        problems.append(f"--rank: got {rank}, larger than layers of the {component}: {listing(narrow.values())}")
    return problems


def add_adapters(pipeline: StableDiffusionPipeline, args: Namespace) -> "Adapters":
    """Freeze the pipeline and put fresh float32 adapters on it; equal seeds give equal adapters.

    Raises:
        BadInput: the configuration does not fit the model.
    """
    targets = {"unet": args.target_modules}
    if args.train_text_encoder:
        targets["text_encoder"] = args.text_encoder_target_modules
    refuse(
        problem
        for component, names in targets.items()
        for problem in target_problems(getattr(pipeline, component), component, names, args.rank)
    )
    for component in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        component.requires_grad_(False)
    torch.manual_seed(seed_of(args.seed, Stream.ADAPTER))
    models = {}
    for component, names in targets.items():
        model = models[component] = getattr(pipeline, component)
        try:
            config = lora_config(args, names)
        except ValueError as error:
            raise BadInput([str(error)]) from error
        if args.method == "lora":
            inject_adapter_in_model(config, model, ADAPTER)
        else:
            attach(model, config, ADAPTER)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return Adapters(models, residual=args.method == "reslora")


@dataclass(frozen=True)
class Adapters:
    """Adapted models by component: "unet", and "text_encoder" if it is trained."""

    models: dict[str, nn.Module]
    residual: bool

    def named_parameters(self, component: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.models[component].named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is trained, by component and name."""
        return {
            f"{component}.{name}": parameter
            for component in self.models
            for name, parameter in self.named_parameters(component).items()
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
        for model in self.models.values():
            model.train(mode)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """No gradients and no dropout inside."""
        self.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.train()

    def calibrate(self, batches: list[Batch], forwards: dict[str, Forward]) -> None:
        """Gather what the merge method needs. The text encoder comes first: the UNet is then calibrated on the hidden
        states that the merged text encoder will give it."""
        if not self.residual:
            return
        with self.evaluation(), ExitStack() as merged:
            for component in sorted(self.models):
                calibrate(self.models[component], batches, forwards[component], ADAPTER)
                merged.enter_context(merged_forward(self.models[component], ADAPTER))

    def output_errors(self, batches: list[Batch], forwards: dict[str, Forward]) -> dict[str, float]:
        """What merging changed in each layer's output, relative to what the adapter adds to it."""
        if not self.residual:
            return {}
        with self.evaluation():
            return {
                f"{component}.{name}": error
                for component, model in self.models.items()
                for name, error in relative_output_errors(model, batches, forwards[component], ADAPTER).items()
            }

    def merged(self) -> AbstractContextManager:
        """Inside, the models compute what will be exported."""
        stack = ExitStack()
        if self.residual:
            for model in self.models.values():
                stack.enter_context(merged_forward(model, ADAPTER))
        return stack

    def factors(self) -> dict[str, dict[str, LoraFactors]]:
        """The plain LoRA of each component, in the form `export_lora` takes."""
        return {
            component: merged_factors(model, ADAPTER) if self.residual else plain_factors(model)
            for component, model in self.models.items()
        }

    def merging(self) -> dict[str, str]:
        """Names of the shortcut and of the merge method in use."""
        if not self.residual:
            return {"shortcut": "none", "merge_method": "none"}
        config = get_controller(self.models["unet"], ADAPTER).config
        return {"shortcut": str(config.shortcut), "merge_method": str(config.merge_method)}

    def health_problem(self) -> str | None:
        """Why these adapters must not be exported, if so."""
        tensors = self.tensors()
        if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
            return f"{len(broken)} of {len(tensors)} adapter tensors are not finite: {listing(broken)}"
        if not any(value.any() for name, value in tensors.items() if "lora_B" in name):
            return "every lora_B is zero: nothing was learned"
        return None


def plain_factors(model: nn.Module) -> dict[str, LoraFactors]:
    """A plain LoRA's own weights by module path."""
    return {
        name: LoraFactors(
            layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach(), layer.scaling[ADAPTER]
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
