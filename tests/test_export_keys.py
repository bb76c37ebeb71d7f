"""Names and shapes of the released Stable Diffusion models, against their real classes and diffusers' own maps."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.export import export_lora, read_lora
from reslora_diffusion.export.geometry import (
    GEOMETRIES,
    BaseKind,
    a1111_applies,
    a1111_module,
    a1111_modules,
    comfyui_names,
    family_of,
    module_paths,
)
from reslora_diffusion.export.keys import Naming, classic_path, flat_path, from_kohya, to_kohya, to_sgm
from reslora_diffusion.export.parsing import parse_key

XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {
    BaseKind.SD1: {"cross_attention_dim": 768, "attention_head_dim": 8},
    BaseKind.SD2: {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    BaseKind.SDXL: XL,
}
CLIPS = {
    BaseKind.SD1: {"text_encoder": (CLIPTextModel, 768, 12)},
    BaseKind.SD2: {"text_encoder": (CLIPTextModel, 1024, 23)},
    BaseKind.SDXL: {
        "text_encoder": (CLIPTextModel, 768, 12),
        "text_encoder_2": (CLIPTextModelWithProjection, 1280, 32),
    },
}
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out", "conv1", "conv2")


@pytest.fixture(scope="module", params=list(UNETS), ids=lambda family: family.name)
def family(request) -> BaseKind:
    return request.param


@pytest.fixture(scope="module")
def models(family) -> dict[str, nn.Module]:
    with torch.device("meta"):
        found = {"unet": UNet2DConditionModel(**UNETS[family])}
        for component, (kind, width, layers) in CLIPS[family].items():
            config = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers)
            found[component] = kind(config)
    return found


def layers(component: str, model: nn.Module) -> dict[str, nn.Module]:
    """Everything that a LoRA may adapt, by classic path."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {classic_path(component, n): m for n, m in found.items() if component == "unet" or "layers." in n}


def rank_one(model: nn.Module, component: str, ends: tuple[str, ...]) -> dict[str, LoraFactors]:
    """Factors that tell modules apart by their value; small, so that all of SDXL is proved in seconds."""
    factors = {}
    for number, (path, layer) in enumerate(layers(component, model).items(), start=1):
        if path.endswith(ends):
            kernel = layer.weight.shape[2:]
            A = torch.full((1, layer.weight.shape[1], *kernel), 1 / 64)
            B = torch.full((layer.weight.shape[0], 1, *(1 for _ in kernel)), number / 256)
            factors[path] = LoraFactors(A, B, 1.0)
    return factors


def test_our_table_is_the_real_architecture(family, models):
    for component, ours in module_paths(GEOMETRIES[family]).items():
        real = set(layers(component, models[component]))
        assert real <= ours
        assert {path for path in ours - real if not path.endswith("conv_shortcut")} == set()


def test_kohya_names_are_read_back(family, models):
    naming = Naming.SDXL if family is BaseKind.SDXL else Naming.SD
    for component, model in models.items():
        names = {to_kohya(component, path, naming): path for path in layers(component, model)}
        assert len(names) == len(layers(component, model))
        assert {name: from_kohya(name) for name in names} == {n: (component, path) for n, path in names.items()}


def test_comfyui_and_a1111_know_every_name(family, models):
    """Two maps written from those programs' rules, held against the third."""
    naming = Naming.SDXL if family is BaseKind.SDXL else Naming.SD
    comfyui, a1111 = comfyui_names(family), a1111_modules(family)
    for component, model in models.items():
        for path in layers(component, model):
            name = to_kohya(component, path, naming)
            assert comfyui[name] == (component, path)
            assert a1111_module(name, family) in a1111


def test_stability_names_are_those_of_diffusers():
    """Only SDXL's files carry them; diffusers' loader undoes the numbering."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**XL)
    paths = [path for path in layers("unet", unet) if "attentions" in path]
    state_dict = {}
    for path in paths:
        name = to_kohya("unet", path, Naming.SDXL)
        assert name == f"lora_unet_{to_sgm(path).replace('.', '_')}"
        state_dict[f"{name}.lora_down.weight"] = torch.zeros(1, 1)
        state_dict[f"{name}.lora_up.weight"] = torch.zeros(1, 1)
    config = SimpleNamespace(layers_per_block=2)
    converted, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(state_dict, unet_config=config)
    assert {parse_key(key).path for key in converted} == set(paths)


def test_an_export_for_the_real_architecture_is_proved_and_read_back(tmp_path, family, models):
    """The real loaders, into the real UNet and text encoders, without their memory."""
    ends = ADAPTED if family is BaseKind.SD1 else ("attn2.to_k", "attn1.to_out.0", "attentions.1.proj_in", "conv2")
    components = {"unet": rank_one(models["unet"], "unet", ends)}
    for component in CLIPS[family]:
        components[component] = rank_one(models[component], component, ("0.self_attn.q_proj", "1.mlp.fc1"))
    report = export_lora(tmp_path, components, models=models, name="x")
    assert report.family == family
    assert {(check.matched, check.expected) for check in report.checks} == {(len(report.losses),) * 2}
    assert {"ComfyUI's names", "A1111 and Forge's names"} <= {check.loader for check in report.checks}
    for file in (tmp_path, tmp_path / "kohya" / "x.safetensors"):
        found = read_lora(file).components
        assert family_of(found) is family
        active = {c: {path for path, f in modules.items() if f.lora_B.any()} for c, modules in found.items()}
        assert active == {c: set(modules) for c, modules in components.items()}


def test_a1111_uses_attention_of_open_clip_only_where_it_is_whole(tmp_path, family, models):
    """Its rule: `if module_q and module_k and module_v and module_out`, with what one file holds of a layer."""
    component = "text_encoder_2" if family is BaseKind.SDXL else "text_encoder"
    prefix = {BaseKind.SDXL: "lora_te2", BaseKind.SD2: "lora_te"}.get(family)
    components = {
        "unet": rank_one(models["unet"], "unet", ("attn2.to_k",)),
        component: rank_one(models[component], component, ("q_proj", "v_proj", "3.mlp.fc1")),
    }
    report = export_lora(tmp_path, components, models=models, name="x")
    a1111 = next(check for check in report.checks if check.loader.startswith("A1111"))
    assert (a1111.matched, a1111.expected) == (len(report.losses),) * 2
    tensors = load_file(tmp_path / "kohya/x.safetensors")
    held = {name.partition(".")[0] for name in tensors}
    for n in range(CLIPS[family][component][2] if prefix else 0):
        layer = f"{prefix}_text_model_encoder_layers_{n}_self_attn"
        assert {f"{layer}_{part}_proj" for part in ("q", "k", "v", "out")} <= held
        assert tensors[f"{layer}_q_proj.lora_up.weight"].any()
        assert not tensors[f"{layer}_k_proj.lora_up.weight"].any()
    trained = {name for name in held if tensors[f"{name}.lora_up.weight"].any()}
    kept = a1111_applies(trained, family)
    lost = {name for name in trained if prefix and name.startswith(prefix) and "self_attn" in name}
    assert kept == trained - lost  # as it was without the zeros: 0 of 32 layers of SDXL's second encoder
    assert bool(lost) == (family is not BaseKind.SD1)


def test_families_are_told_apart_by_shape():
    factors = LoraFactors(torch.zeros(1, 768), torch.zeros(320, 1), 1.0)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert family_of({"unet": {path: factors}}) is BaseKind.SD1
    assert family_of({"unet": {path: factors._replace(lora_A=torch.zeros(1, 1024))}}) is BaseKind.SD2
    assert family_of({"unet": {path: factors._replace(lora_A=torch.zeros(1, 32))}}) is BaseKind.CUSTOM
    assert family_of({"transformer": {path: factors}}) is BaseKind.TRANSFORMER
    wide, query = factors._replace(lora_A=torch.zeros(1, 3072)), "attn.to_q"
    both = {f"transformer_blocks.0.{query}": wide, f"single_transformer_blocks.7.{query}": wide}
    assert family_of({"transformer": both}) is BaseKind.FLUX
    assert family_of({"transformer": dict.fromkeys(both, factors)}) is BaseKind.TRANSFORMER
    assert family_of({"model": {path: factors}}) is BaseKind.OTHER
    deep = "down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q"
    assert family_of({"unet": {deep: factors}}) is BaseKind.SDXL


def test_clip_layouts_are_inverse_to_each_other():
    for flat in ("encoder.layers.0.mlp.fc1", "encoder.layers.11.self_attn.q_proj"):
        assert flat_path(classic_path("text_encoder", flat)) == flat
    assert classic_path("unet", "encoder.layers.0") == "encoder.layers.0"


@pytest.mark.parametrize(
    ("key", "component", "path"),
    [
        ("unet.mid_block.attentions.0.proj_in.lora.down.weight", "unet", "mid_block.attentions.0.proj_in"),
        ("unet.mid_block.attn1.processor.to_q_lora.down.weight", "unet", "mid_block.attn1.to_q"),
        ("unet.mid_block.attn1.processor.to_out_lora.up.weight", "unet", "mid_block.attn1.to_out.0"),
        ("unet.mid_block.attn1.to_q.lora_A.default.weight", "unet", "mid_block.attn1.to_q"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            "text_encoder",
            "text_model.encoder.layers.0.self_attn.q_proj",
        ),
        ("text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight", "text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        (
            "lora_te1_text_model_encoder_layers_3_mlp_fc2.lora_up.weight",
            "text_encoder",
            "text_model.encoder.layers.3.mlp.fc2",
        ),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "unet", "down_blocks.1.attentions.0.proj_in"),
        ("lora_unet_output_blocks_2_2_conv.alpha", "unet", "up_blocks.0.upsamplers.0.conv"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "model", "model.layers.0.self_attn.q_proj"),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_B.weight", "unet", "mid_block.attentions.0.proj_in"),
    ],
)
def test_dialects_of_every_age_are_read(key, component, path):
    parsed = parse_key(key)
    assert (parsed.component, parsed.path) == (component, path)
