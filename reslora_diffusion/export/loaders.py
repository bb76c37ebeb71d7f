"""The real loaders of diffusers and PEFT, run on hollow models, and the factors that arrive in the layers.

load_diffusers   `load_lora_weights` of the pipeline that the models belong to
load_peft        `PeftModel.from_pretrained`
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders import (
    AuraFlowLoraLoaderMixin,
    Flux2LoraLoaderMixin,
    FluxLoraLoaderMixin,
    Lumina2LoraLoaderMixin,
    QwenImageLoraLoaderMixin,
    SanaLoraLoaderMixin,
    SD3LoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    ZImageLoraLoaderMixin,
)
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from reslora_diffusion.core.dora import magnitude_of
from reslora_diffusion.core.functional import LoraFactors, with_magnitude

from .factors import Components, computable
from .header import open_safetensors
from .hollow import Models, PlaceholderDenoiser
from .keys import Naming, classic_path
from .parsing import OF_COMFYUI

ADAPTER = "proof"

LOADERS: dict[str, type] = {  # by the class of the transformer, which a base has and a placeholder has not
    "AuraFlowTransformer2DModel": AuraFlowLoraLoaderMixin,
    "Flux2Transformer2DModel": Flux2LoraLoaderMixin,
    "Lumina2Transformer2DModel": Lumina2LoraLoaderMixin,
    "SanaTransformer2DModel": SanaLoraLoaderMixin,
    "QwenImageTransformer2DModel": QwenImageLoraLoaderMixin,
    "ZImageTransformer2DModel": ZImageLoraLoaderMixin,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Loaders' remarks and progress bars belong to their own users."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.set_verbosity(100)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def arrived(model: nn.Module, component: str) -> dict[str, LoraFactors]:
    """Return the factors in a model's LoRA layers by classic path; layers that the loader left empty have none."""
    found = {
        classic_path(component, name): with_magnitude(
            LoraFactors(
                layer.lora_A[ADAPTER].get_parameter("weight").detach(),
                layer.lora_B[ADAPTER].get_parameter("weight").detach(),
                layer.scaling[ADAPTER],
            ),
            magnitude_of(layer, ADAPTER),
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A
    }
    return {
        path: f._replace(lora_A=computable(f.lora_A), lora_B=computable(f.lora_B))
        for path, f in found.items()
        if not (f.lora_A.is_meta or f.lora_B.is_meta)
    }


def load_diffusers(path: Path, models: Models, naming: Naming) -> Components:
    """`load_lora_weights` of the pipeline that `models` are of, and what is in them afterwards.

    Raises:
        ValueError: the loader refuses the file.
    """
    denoiser = "transformer" if "transformer" in models else "unet"
    mixin: type = StableDiffusionLoraLoaderMixin if naming is Naming.SD else StableDiffusionXLLoraLoaderMixin
    if denoiser == "transformer":
        flux = naming is Naming.FLUX or hasattr(models[denoiser], "single_transformer_blocks")
        usual = FluxLoraLoaderMixin if flux else SD3LoraLoaderMixin
        with open_safetensors(path) as file:
            if any(key.startswith(f"{OF_COMFYUI}.") for key in file.keys()):  # noqa: SIM118 (no mapping)
                usual = QwenImageLoraLoaderMixin  # takes the prefix off whatever follows
        mixin = LOADERS.get(type(models[denoiser]).__name__, usual)

    class Pipeline(DiffusionPipeline, mixin):  # type: ignore[misc, valid-type]  # a base chosen as the program runs
        def __init__(
            self,
            unet: nn.Module | None = None,
            transformer: nn.Module | None = None,
            text_encoder: nn.Module | None = None,
            text_encoder_2: nn.Module | None = None,
        ) -> None:
            super().__init__()
            self.register_modules(
                unet=unet, transformer=transformer, text_encoder=text_encoder, text_encoder_2=text_encoder_2
            )

    with quiet():
        pipeline = Pipeline(**{denoiser: PlaceholderDenoiser()} | models)
        try:
            pipeline.load_lora_weights(
                str(path.parent),
                weight_name=path.name,
                adapter_name=ADAPTER,
                local_files_only=True,
                use_safetensors=True,
            )
        except Exception as error:  # whatever a loader raises, it is its verdict on the file
            raise ValueError(f"diffusers {diffusers.__version__} does not load {path.name}: {error}") from error
    return {component: found for component, model in models.items() if (found := arrived(model, component))}


def load_peft(
    folder: Path, model: nn.Module, component: str, targets: list[str] | None = None, factors_alone: bool = False
) -> dict[str, LoraFactors]:
    """`PeftModel.from_pretrained`, and what is in the model afterwards.

    Args:
        folder: of PEFT.
        model: to load into; it is changed.
        component: of which pipeline part, or "model".
        targets: the modules that `target_modules` means, where PEFT shall not find out itself.
        factors_alone: leave out what was trained beside them, which a placeholder has no place for.

    Raises:
        ValueError: PEFT refuses the folder.
    """
    with quiet():
        try:
            config = PeftConfig.from_pretrained(str(folder))
            config.task_type = None  # a placeholder has no generation methods
            config.target_modules = config.target_modules if targets is None else targets
            if factors_alone:
                config.modules_to_save = config.trainable_token_indices = None
            PeftModel.from_pretrained(model, str(folder), adapter_name=ADAPTER, config=config)
        except Exception as error:
            raise ValueError(f"PEFT does not load {folder.name}: {error}") from error
    return arrived(model, component)
