"""Chains and link counts on the real architectures, built from their configurations without weights."""

import json
import warnings

import pytest
import torch
from torch import nn

from models import build, inputs, output, randomise
from reslora_diffusion import ResLoraConfig, attach, explain, get_adapter
from reslora_diffusion.core.chains import Site, build_chains, windows
from reslora_diffusion.core.shortcuts import SHORTCUTS
from reslora_diffusion.rules import Shortcut

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def sd_unet(cross_attention_dim: int, heads: object) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=cross_attention_dim, attention_head_dim=heads, use_linear_projection=True
    )


def sdxl_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
    )


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel()


def clip_l() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


def llama_3_8b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8)
    )


CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COUNTS = {
    "SD 1.5": (lambda: sd_unet(768, 8), ATTENTION, 128, (84, 84, 88)),
    "SD 2.1": (lambda: sd_unet(1024, (5, 10, 20, 20)), ATTENTION, 128, (84, 84, 88)),
    "SDXL": (sdxl_unet, ATTENTION, 560, (540, 540, 536)),
    "CLIP-L": (clip_l, CLIP, 72, (66, 66, 66)),
    "Llama-3-8B": (llama_3_8b, LLAMA, 224, (217, 217, 217)),
    "SD3-medium": (sd3, JOINT, 191, (183, 183, 183)),
    "FLUX.1": (flux, JOINT, 266, (255, 255, 258)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_link_counts(name: str) -> None:
    make, targets, sites, counts = COUNTS[name]
    with torch.device("meta"):
        model = make()
        attach(model, ResLoraConfig(r=2, target_modules=targets, shortcut="input"))
        controller = get_adapter(model)
        assert len(controller.sites) == sites
        for shortcut, links in zip(("input", "middle", "block"), counts, strict=True):
            chains = build_chains(controller.sites.values(), SHORTCUTS[Shortcut(shortcut)].links)
            assert sum(len(chain.sites) - 1 for chain in chains) == links, shortcut
            assert sum(len(chain.sites) for chain in chains) == sites


def test_unet_order_is_down_mid_up() -> None:
    model = build("unet")
    attach(model, ResLoraConfig(r=2, target_modules=["attn2.to_k"], shortcut="input"))
    (chain,) = get_adapter(model).chains
    stages = [site.name.split(".")[0] for site in chain.sites]
    assert stages == ["down_blocks", "down_blocks", "mid_block", "up_blocks", "up_blocks", "up_blocks", "up_blocks"]
    assert {site.tokens for site in chain.sites} == {"prompt"}


def test_chains_are_those_that_really_run() -> None:
    """The order in the chains is the order of calls, and no link is skipped at run time."""
    model = build("unet")
    attach(model, ResLoraConfig(r=2, target_modules=ATTENTION, shortcut="input"))
    model.double()
    controller, called = get_adapter(model), []
    for name, layer in controller.layers.items():
        layer.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    output("unet", model, inputs("unet"))
    for chain in controller.chains:
        places = [called.index(site.name) for site in chain.sites]
        assert places == sorted(places)
    assert controller.skipped == {}


def test_equal_widths_at_other_resolutions_are_not_joined() -> None:
    model = build("unet")
    attach(model, ResLoraConfig(r=2, target_modules=["attn1.to_q"], shortcut="input"))
    assert [len(chain.sites) for chain in get_adapter(model).chains] == [1, 4, 2]  # 8 x 8, then 4 x 4, then 8 x 8
    other = build("unet")
    attach(other, ResLoraConfig(r=2, target_modules=["attn1.to_q"], shortcut="block"))
    assert [len(chain.sites) for chain in get_adapter(other).chains] == [7]
    cut = build("unet")
    attach(cut, ResLoraConfig(r=2, target_modules=["attn1.to_q"], shortcut="block", same_resolution_only=True))
    assert [len(chain.sites) for chain in get_adapter(cut).chains] == [1, 4, 2]


def test_windows_do_not_cross_the_ends_of_chains() -> None:
    sites = [Site(str(n), "q", 4, 4, 2, "a" if n < 3 else "b") for n in range(6)]
    chains = build_chains(sites, SHORTCUTS[Shortcut.MIDDLE].links)
    assert windows(chains, None) == {"0": (), "1": ("0",), "2": ("1", "0"), "3": (), "4": ("3",), "5": ("4", "3")}
    assert windows(chains, 1)["2"] == ("1",)
    assert windows(chains, 0)["2"] == ()


def test_explain_is_a_table_and_data() -> None:
    model = build("llama")
    attach(model, ResLoraConfig(r=2, target_modules=["q_proj", "v_proj"], shortcut="block", num_previous=2))
    explanation = explain(model)
    assert explanation.links == 6
    text = str(explanation)
    assert "self_attn.q_proj" in text
    assert "6 links between 8 layers" in text
    assert json.loads(json.dumps(explanation.to_dict()))["chains"][0]["sites"][0]["in_features"] == 16


def test_encoder_and_decoder_are_different_chains() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=3, num_heads=2)
    )
    attach(model, ResLoraConfig(r=2, target_modules=["q", "v"], shortcut="input"))
    roles = {chain.role: len(chain.sites) for chain in get_adapter(model).chains}
    assert roles == {
        "encoder.SelfAttention.q": 3,
        "encoder.SelfAttention.v": 3,
        "decoder.SelfAttention.q": 3,
        "decoder.SelfAttention.v": 3,
        "decoder.EncDecAttention.q": 3,
        "decoder.EncDecAttention.v": 3,
    }


def test_experts_are_left_unlinked() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "gate": nn.Linear(4, 4)}) for _ in "ab")
            self.down = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for expert in self.experts:
                x = expert["up"](x) * expert["gate"](x)
            return self.down(x)

    model = nn.Sequential(*(Layer() for _ in range(3)))
    attach(model, ResLoraConfig(r=2, target_modules=["up", "down"], shortcut="middle"))
    randomise(model)
    chains = {chain.sites[0].name: chain for chain in get_adapter(model).chains}
    assert len(chains["0.down"].sites) == 3
    assert len(chains["1.experts.0.up"].sites) == 1
    assert "expert" in chains["1.experts.0.up"].sites[0].unlinked
    assert "expert" in str(explain(model))
    model(torch.randn(2, 4)).sum().backward()


def shared_layers(count: int = 3) -> nn.Module:
    """One layer under three names, as in ALBERT."""
    layer = nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})
    layer.forward = lambda x: layer["down"](layer["up"](x).tanh())
    return nn.Sequential(*[layer] * count)


def test_a_layer_under_several_names_is_left_unlinked() -> None:
    model = shared_layers()
    attach(model, ResLoraConfig(r=2, target_modules=["up"], shortcut="middle"))
    sites = [site for chain in get_adapter(model).chains for site in chain.sites]
    assert all("also known as" in site.unlinked for site in sites)
    model(torch.randn(2, 4)).sum().backward()


def test_a_layer_that_runs_twice_in_one_forward_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                for layer in self.layers:
                    x = layer(x)
            return x

    model = Twice()
    attach(model, ResLoraConfig(r=2, target_modules=r"layers\.\d", shortcut="input"))
    with pytest.raises(RuntimeError, match=r"layers\.0 ran twice in one forward.*shortcut=\"block\""):
        model(torch.randn(2, 4))


def test_a_predecessor_that_does_not_fit_is_skipped_counted_and_told_once() -> None:
    class Pooling(nn.Module):
        """The second half sees half the tokens, which no name gives away."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for n, layer in enumerate(self.layers):
                x = layer(x if n < 2 else x[:, ::2][:, :1])
            return x

    model = Pooling()
    attach(model, ResLoraConfig(r=2, target_modules=r"layers\.\d", shortcut="input"))
    with pytest.warns(UserWarning, match=r"layers\.2 is skipped: layers\.1 has shape \(3, 6, 4\), wanted \(3, 1, 4\)"):
        model(torch.randn(3, 6, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 6, 4))
    assert get_adapter(model).skipped == {"layers.2": 2}
