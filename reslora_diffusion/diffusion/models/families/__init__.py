"""The differences between families of models, one small module each. All else is the same code for all of them."""

from .aura_flow import AuraFlow
from .base import Family
from .chroma import Chroma
from .flux import Flux
from .flux_2 import Flux2, Flux2Klein
from .lumina_2 import Lumina2
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .texts import Texts, Tokens
from .z_image import ZImage

FAMILIES: dict[str, Family] = {
    family.pipeline_class: family
    for family in (
        *(StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux()),
        *(QwenImage(), ZImage(), Flux2(), Flux2Klein(), Sana(), Lumina2(), Chroma(), AuraFlow()),
    )
}


def not_trained_here() -> list[str]:
    """The installed diffusers' text-to-image pipelines that load LoRAs and are of no family here, by class."""
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as PIPELINES

    kinds = {kind.__name__ for kind in PIPELINES.values() if hasattr(kind, "load_lora_weights")}
    return sorted(kinds - FAMILIES.keys())


__all__ = ["FAMILIES", "Family", "Texts", "Tokens", "not_trained_here"]
