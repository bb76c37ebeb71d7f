"""The attention processor computes what the layers compute by themselves, on UNets, SD3 and Flux."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from models import FLUX_TARGETS, UNET_TARGETS, build, inputs, output, randomise
from reslora_diffusion import ResLoraConfig, attach, calibrate, explain_kernels, get_adapter, merged_forward
from reslora_diffusion.diffusion.models.attn_processor import (
    ResLoRAAttnProcessor,
    set_attn_processors,
    unset_attn_processors,
)
from reslora_diffusion.diffusion.models.optimize import optimize_for_training, restore_after_training

JOINT = [*UNET_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def sd3() -> tuple[nn.Module, dict]:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    g = torch.Generator().manual_seed(0)
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=g, dtype=torch.float64),
        "pooled_projections": torch.randn(2, 8, generator=g, dtype=torch.float64),
        "timestep": torch.tensor([3, 7]),
    }


def flux() -> tuple[nn.Module, dict]:
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    return build("flux"), dict(zip(names, inputs("flux"), strict=True))


def unet() -> tuple[nn.Module, dict]:
    noisy, timesteps, prompt = inputs("unet")
    return build("unet"), {"sample": noisy, "timestep": timesteps, "encoder_hidden_states": prompt}


CASES = {"unet": (unet, UNET_TARGETS), "sd3": (sd3, JOINT), "flux": (flux, FLUX_TARGETS)}


def gradients_of(model: nn.Module, kwargs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**kwargs, return_dict=False)[0]
    model.zero_grad()
    out.square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("shortcut", "num_previous"), [("none", 1), ("input", 1), ("middle", None), ("block", 1)])
@pytest.mark.parametrize("family", CASES)
def test_outputs_and_gradients_are_the_layers_own(
    family: str, shortcut: str, num_previous: int | None, checkpointing: bool
) -> None:
    make, targets = CASES[family]
    torch.manual_seed(0)
    model, kwargs = make()
    attach(model, ResLoraConfig(r=3, target_modules=targets, shortcut=shortcut, num_previous=num_previous))
    model.double().eval()
    randomise(model, size=0.2)  # at 0.3, to round the weights changes the gradients of `input` by 4e-10
    wanted, wanted_gradients = gradients_of(model, kwargs)
    assert len(set_attn_processors(model)) > 2
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    got, gradients = gradients_of(model, kwargs)
    assert (got - wanted).abs().max() < 1e-12
    for name, gradient in wanted_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name


def adapted_unet(shortcut: str = "input") -> nn.Module:
    model = build("unet")
    attach(model, ResLoraConfig(r=3, target_modules=UNET_TARGETS, shortcut=shortcut))
    model.double()
    randomise(model)
    return model


def test_it_really_prepares() -> None:
    model = adapted_unet("middle")
    set_attn_processors(model)
    output("unet", model, inputs("unet"))
    assert get_adapter(model).prepared == {}
    kernels = {name: choice[0] for name, choice in explain_kernels(model).layers.items()}
    grouped = {name for name, kernel in kernels.items() if kernel == "grouped"}
    together = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_k", "attn2.to_v")  # read one tensor
    assert grouped == {name for name in kernels if name.endswith(together)}
    assert kernels["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"] == "fused"


def test_it_owns_no_weights_and_swapping_loses_nothing() -> None:
    model, args = adapted_unet(), inputs("unet")
    wanted, keys = output("unet", model, args), model.state_dict().keys()
    set_attn_processors(model)
    assert model.state_dict().keys() == keys
    assert not any(isinstance(p, nn.Module) for p in model.attn_processors.values())
    unset_attn_processors(model)
    assert not any(isinstance(p, ResLoRAAttnProcessor) for p in model.attn_processors.values())
    assert torch.equal(output("unet", model, args), wanted)
    set_attn_processors(model)
    set_attn_processors(model)
    assert not any(isinstance(p.inner, ResLoRAAttnProcessor) for p in model.attn_processors.values())
    model.set_attention_slice("max")
    assert torch.allclose(output("unet", model, args), wanted, atol=1e-12)


def test_keywords_of_the_wrapped_processor_reach_it() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Loud(AttnProcessor2_0):
        heard: list = []

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, volume=None, **kwargs):
            self.heard.append(volume)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    model = adapted_unet()
    model.set_attn_processor(Loud())
    set_attn_processors(model)
    noisy, timesteps, prompt = inputs("unet")
    model(noisy, timesteps, prompt, cross_attention_kwargs={"volume": 11})
    assert set(Loud.heard) == {11}


def test_a_processor_that_changes_its_input_falls_back() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Doubling(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return super().__call__(attn, 2 * hidden_states, *args, **kwargs)

    model, args = adapted_unet(), inputs("unet")
    model.set_attn_processor(Doubling())
    wanted = output("unet", model, args)
    set_attn_processors(model)
    assert torch.allclose(output("unet", model, args), wanted, atol=1e-12)


def test_merged_forward_and_copies() -> None:
    model, args = adapted_unet(), inputs("unet")
    calibrate(model, [args], lambda m, batch: m(*batch))
    with merged_forward(model):
        wanted = output("unet", model, args)
    set_attn_processors(model)
    with merged_forward(model):
        assert torch.allclose(output("unet", model, args), wanted, atol=1e-12)
    other = copy.deepcopy(model)
    processor = next(iter(other.attn_processors.values()))
    assert processor.adapter is get_adapter(other)
    assert torch.allclose(output("unet", other, args), output("unet", model, args), atol=1e-12)


def test_fused_projections_are_refused_while_the_adapter_is_live() -> None:
    model, args = adapted_unet("block"), inputs("unet")
    whole = output("unet", model, args)
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="unfuse_qkv_projections"):
        output("unet", model, args)
    model.unfuse_qkv_projections()
    assert torch.equal(output("unet", model, args), whole)
    model.fuse_lora()
    model.fuse_qkv_projections()
    assert torch.allclose(output("unet", model, args), whole, atol=1e-11)


def test_optimize_for_training_and_back() -> None:
    model, (_, kwargs) = adapted_unet("block"), unet()
    wanted, wanted_gradients = gradients_of(model, kwargs)
    assert optimize_for_training(model) == {"attention": 0, "memory": 0}  # on a CPU, unless it is asked for
    found = optimize_for_training(model, attention=True, memory=True)
    assert found["attention"] == len(model.attn_processors)
    assert found["memory"] > 20
    got, gradients = gradients_of(model, kwargs)
    assert (got - wanted).abs().max() < 1e-11
    for name, gradient in wanted_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name
    restore_after_training(model)
    assert not any(isinstance(p, ResLoRAAttnProcessor) for p in model.attn_processors.values())
    assert torch.equal(gradients_of(model, kwargs)[0], wanted)
