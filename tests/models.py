"""Small models of the real classes, in float64, with the input they are run on: `build(name)` gives (model, run).

`unet` has equal widths at two resolutions, the case where equal weight shapes do not mean equal numbers of tokens.
"""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"unet": UNET_TARGETS, "clip": CLIP_TARGETS, "llama": LLAMA_TARGETS}


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=4,
    )


def clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def llama(**changes: object) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def inputs(name: str, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if name == "unet":
        noisy = torch.randn(batch, 4, 8, 8, generator=generator, dtype=torch.float64)
        prompt = torch.randn(batch, 5, 24, generator=generator, dtype=torch.float64)
        return noisy, torch.randint(0, 1000, (batch,), generator=generator), prompt
    return (torch.randint(2, 64, (batch, 9), generator=generator),)


def output(name: str, model: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    """The tensor that a loss is made of."""
    if name == "unet":
        return model(*args, return_dict=False)[0]
    return model(*args)[0]


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = {"unet": unet, "clip": clip, "llama": llama}[name]().double().eval()
    model.requires_grad_(False)
    return model


def randomise(model: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Give every adapter factor values that matter: at initialisation B is zero and every method agrees."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(size * noise.to(parameter.device))


Runner = Callable[[nn.Module], Tensor]
