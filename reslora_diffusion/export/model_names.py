"""Models that are told apart by names of their tensors alone, whatever file they are in."""

from collections.abc import Collection
from typing import NamedTuple

NESTED = "model.diffusion_model."  # before the names of a denoiser, where text encoders and autoencoder are there too
TEXT_ENCODERS = ("cond_stage_model.", "conditioner.embedders.")  # in a whole checkpoint


class Transformer(NamedTuple):
    """A transformer that is found alone in a file: names that only it has, its classes in diffusers, and a pipeline of
    the hub that has its configuration and all other parts."""

    marks: tuple[str, ...]
    pipeline_class: str
    denoiser_class: str
    config: str


TRANSFORMERS = (  # an earlier one may have the marks of a later one too
    Transformer(
        ("joint_blocks.0.context_block.adaLN_modulation.1.bias",),
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        "stabilityai/stable-diffusion-3.5-medium",
    ),
    Transformer(
        ("distilled_guidance_layer.in_proj.bias",),
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        "lodestones/Chroma1-HD",
    ),
    Transformer(
        ("single_stream_modulation.lin.weight",),
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        "black-forest-labs/FLUX.2-klein-4B",
    ),
    Transformer(
        ("double_blocks.0.img_attn.norm.key_norm.scale",),
        "FluxPipeline",
        "FluxTransformer2DModel",
        "black-forest-labs/FLUX.1-schnell",
    ),
    Transformer(
        ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"),
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        "Qwen/Qwen-Image",
    ),
    Transformer(
        ("cap_embedder.0.weight", "layers.0.adaLN_modulation.0.weight"),
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        "Tongyi-MAI/Z-Image-Turbo",
    ),
    Transformer(
        ("cap_embedder.0.weight", "layers.0.attention.qkv.weight"),
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        "Alpha-VLLM/Lumina-Image-2.0",
    ),
)
# Names that only other models have, and what they are.
OTHERS = {
    "double_layers.0.attn.w2q.weight": "an AuraFlow model, which is read from a folder in diffusers' format",
    "nerf_image_embedder.embedder.0.bias": "a Chroma Radiance model",
    "cap_embedder.0.weight": "a Lumina-Next model",
    "blocks.0.cross_attn.q_linear.weight": "a SANA or PixArt model, which is read from a folder in diffusers' format",
    "head.modulation": "a Wan model",
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": "a HunyuanVideo model",
    "control_model.time_embed.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "controlnet_blocks.0.weight": "a ControlNet",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "double_stream_blocks.0.block.adaLN_modulation.1.bias": "a HiDream model",
    "early_stream_modulations.image.lin.weight": "a FLUX.3 model",
    "txt_in.text_norm.weight": "a Qwen-Image 2.1 model",
    "txtfusion.projector.weight": "a Krea 2 model",
    "model.embed_tokens.weight": "a language model",
    "transformer_blocks.0.attn.add_q_proj.weight": "a transformer in diffusers' layout",
    "down_blocks.0.resnets.0.conv1.weight": "a UNet in diffusers' layout",
}
ANYWAY = ("nerf_image_embedder.embedder.0.bias", "controlnet_blocks.0.weight")  # what else it may look like


def transformer_of(inner: Collection[str]) -> Transformer | None:
    """The transformer whose marks are among the names."""
    return next((kind for kind in TRANSFORMERS if all(mark in inner for mark in kind.marks)), None)


def is_autoencoder(names: Collection[str]) -> bool:
    return any("quant_conv" in name or name.startswith(("first_stage_model.", "encoder.down")) for name in names)


def is_text_encoder(names: Collection[str]) -> bool:
    own = ("encoder.block.", "encoder.layers.")
    return any("text_model.encoder" in name or name.startswith(own) for name in names)


def described(names: Collection[str]) -> str | None:
    """The model that has tensors of these names, in words; None if it is none that is known here."""
    if any(name.startswith(TEXT_ENCODERS) for name in names):
        return "a whole checkpoint"
    inner = {name.removeprefix(NESTED) for name in names}
    kind = transformer_of(inner)
    for name, what in OTHERS.items():
        if name in inner and (kind is None or name in ANYWAY):
            return what
    if kind:
        return f"a {kind.denoiser_class}"
    if "input_blocks.0.0.weight" in inner:
        return "a UNet"
    if is_autoencoder(names):
        return "an autoencoder"
    return "a text encoder" if is_text_encoder(names) else None
