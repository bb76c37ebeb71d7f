"""The models that are measured, with random weights: speed does not depend on what they say.

sd15, sdxl       the UNets of Stable Diffusion 1.5 (512 px) and SDXL (1024 px)
llama_1b         the shape of Llama-3.2-1B, 1024 tokens
tiny_unet        so small that launching its operations is what takes the time, as on a GPU at batch 1
proxy_unet       of the same kind, so large that arithmetic is what takes the time, on a CPU
sticker_unet     of the pipeline in assets/sticker-sd, which is trained on a CPU
tiny_llama       a Llama that fits a CPU
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Subject:
    """A model that is measured: how it is made, and what it is run on."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.device, torch.dtype], dict[str, Tensor]]  # (batch, device, dtype)
    targets: list[str]


def unet(**config: object) -> Callable[[], nn.Module]:
    return lambda: UNet2DConditionModel(**config)


STICKER = UNet2DConditionModel.load_config(Path(__file__).parents[1] / "assets" / "sticker-sd" / "unet")


def sticker_unet() -> nn.Module:
    return UNet2DConditionModel.from_config(STICKER)


def unet_inputs(size: int, channels: int, tokens: int = 77, text_width: int = 0, latents: int = 4) -> Callable:
    def make(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        given = {
            "sample": torch.randn(batch, latents, size, size, device=device, dtype=dtype),
            "timestep": torch.full((batch,), 500, device=device),
            "encoder_hidden_states": torch.randn(batch, tokens, channels, device=device, dtype=dtype),
        }
        if text_width:
            given["added_cond_kwargs"] = {
                "text_embeds": torch.randn(batch, text_width, device=device, dtype=dtype),
                "time_ids": torch.full((batch, 6), 512.0, device=device, dtype=dtype),
            }
        return given

    return make


def llama(**config: object) -> Callable[[], nn.Module]:
    return lambda: LlamaForCausalLM(LlamaConfig(use_cache=False, **config))


def llama_inputs(tokens: int, vocabulary: int) -> Callable:
    def make(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(vocabulary, (batch, tokens), device=device)}

    return make


def small_unet(channels: tuple[int, ...], size: int, text: int) -> dict:
    kinds = ["CrossAttn"] * (len(channels) - 1) + [""]
    return {
        "sample_size": size,
        "block_out_channels": channels,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": text,
        "norm_num_groups": 8,
    }


SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
TINY_LLAMA = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

SUBJECTS = {
    "sd15": Subject(unet(sample_size=64, cross_attention_dim=768), unet_inputs(64, 768), UNET_TARGETS),
    "sdxl": Subject(unet(**SDXL), unet_inputs(128, 2048, text_width=1280), UNET_TARGETS),
    "llama_1b": Subject(llama(**LLAMA_1B), llama_inputs(1024, 128256), LLAMA_TARGETS),
    "tiny_unet": Subject(unet(**small_unet((16, 32, 32, 32), 8, 32)), unet_inputs(8, 32, 8), UNET_TARGETS),
    "proxy_unet": Subject(unet(**small_unet((64, 128, 256, 256), 32, 256)), unet_inputs(32, 256), UNET_TARGETS),
    "sticker_unet": Subject(sticker_unet, unet_inputs(8, 128, latents=STICKER["in_channels"]), UNET_TARGETS),
    "tiny_llama": Subject(llama(**TINY_LLAMA), llama_inputs(128, 512), LLAMA_TARGETS),
}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that most of a model consists of, under the names that diffusers and transformers know them by."""
    kinds = getattr(model, "_repeated_blocks", None) or model._no_split_modules
    return [module for module in model.modules() if type(module).__name__ in kinds]
