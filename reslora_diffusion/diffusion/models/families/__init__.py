"""What differs between families of models, one small module each. Everything else is the same code for all of them."""

from .base import Family, Texts, Tokens
from .flux import Flux
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL

FAMILIES: dict[str, Family] = {
    family.pipeline_class: family for family in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux())
}

__all__ = ["FAMILIES", "Family", "Texts", "Tokens"]
