"""Small models of the real classes, in float64, with the input they are run on: `build(name)` gives (model, run).

`unet` has equal widths at two resolutions, the case where equal weight shapes do not mean equal numbers of tokens.
"""

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLUX_TARGETS = [
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
]
TARGETS = {"unet": UNET_TARGETS, "clip": CLIP_TARGETS, "llama": LLAMA_TARGETS, "flux": FLUX_TARGETS}


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


def flux() -> FluxTransformer2DModel:
    """Two blocks with a stream each for image and text, then three that see both as one."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def inputs(name: str, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if name == "unet":
        noisy = torch.randn(batch, 4, 8, 8, generator=generator, dtype=torch.float64)
        prompt = torch.randn(batch, 5, 24, generator=generator, dtype=torch.float64)
        return noisy, torch.randint(0, 1000, (batch,), generator=generator), prompt
    if name == "flux":
        tokens, prompt = (torch.randn(batch, *shape, generator=generator).double() for shape in ((16, 4), (5, 16)))
        pooled = torch.randn(batch, 8, generator=generator).double()
        times, places = torch.rand(batch, generator=generator).double(), torch.zeros(16 + 5, 3).double()
        places[:16, 1:] = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        return tokens, prompt, pooled, times, places[:16], places[16:]
    return (torch.randint(2, 64, (batch, 9), generator=generator),)


def output(name: str, model: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    """The tensor that a loss is made of."""
    if name == "unet":
        return model(*args, return_dict=False)[0]
    return model(*args)[0]


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = {"unet": unet, "clip": clip, "llama": llama, "flux": flux}[name]().double().eval()
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
