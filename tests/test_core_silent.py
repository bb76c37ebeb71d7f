"""What once was wrong without a word: each test holds the right value, and fails on the code that had the fault."""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import Lumina2Transformer2DModel, StableDiffusionPipeline, UNetMotionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import (
    EvaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from models import CLIP_TARGETS, LLAMA_TARGETS, UNET_TARGETS, build, inputs, output, randomise
from reslora_diffusion import (
    ResLoraConfig,
    attach,
    calibrate,
    explain,
    export_pipeline,
    get_adapter,
    handover,
    merged_factors,
    merged_state_dict,
    relative_output_errors,
)
from reslora_diffusion.core.functional import delta_weight
from reslora_diffusion.export import read_lora
from tiny import tiny_pipeline_folder

TARGETS = {"unet": UNET_TARGETS, "clip": CLIP_TARGETS, "llama": LLAMA_TARGETS}
LINKED = ("input", "block", "middle")


def adapted(name: str, shortcut: str = "block", **options: object) -> nn.Module:
    """A tiny model with an adapter that matters, through the library's own `add_adapter`."""
    model = build(name)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[name], "shortcut": shortcut}
    model.add_adapter(ResLoraConfig(**(settings | options)))
    randomise(model.double().eval())
    return model


def calibrated(name: str, model: nn.Module) -> nn.Module:
    calibrate(model, [inputs(name, seed=n) for n in range(3)], lambda m, batch: output(name, m, batch))
    return model


# ------------------------------------------------------------------------------- what leaves through others' doors


@pytest.mark.parametrize("shortcut", LINKED)
@pytest.mark.parametrize("convert", [dict, convert_state_dict_to_diffusers], ids=["peft", "diffusers"])
def test_saving_as_diffusers_does_is_said_and_not_read_as_plain_lora(
    shortcut: str, convert: Callable, tmp_path: Path
) -> None:
    """`save_lora_weights` with the factors as trained wrote a file that looked like plain LoRA and was none."""
    unet = adapted("unet", shortcut)
    with pytest.warns(UserWarning, match=rf"UNet2DConditionModel.*unmerged ResLoRA, shortcut '{shortcut}'.*export_pip"):
        layers = convert(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="unmerged ResLoRA"):
        read_lora(tmp_path)


def test_other_doors_say_it_too(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="merged_state_dict"):
        adapted("unet").save_lora_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="unmerged ResLoRA"):
        read_lora(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="CLIPTextModel.*merged_state_dict"):
        layers = get_peft_model_state_dict(adapted("clip"))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "encoder", text_encoder_lora_layers=layers)
    with pytest.raises(ValueError, match="unmerged ResLoRA"):
        read_lora(tmp_path / "encoder")
    with pytest.warns(UserWarning, match="merged_state_dict"):
        layers = get_peft_model_state_dict(adapted("unet"))
    kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in layers.items()})
    save_file(kohya, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="unmerged ResLoRA"):
        read_lora(tmp_path / "kohya.safetensors")


def test_a_plain_adapter_leaves_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    for options in ({"shortcut": "none"}, {"num_previous": 0}):
        state = get_peft_model_state_dict(adapted("unet", **options))
        assert all("lora_" in key for key in state)
    assert not [w for w in recwarn if "ResLoRA" in str(w.message)]


def test_a_plain_adapter_is_saved_with_metadata_as_diffusers_does(tmp_path: Path) -> None:
    """Its scripts write `config.to_dict()`, and its loader hands that to `LoraConfig`; other fields were refused."""
    config = ResLoraConfig(r=2, lora_alpha=8, target_modules=UNET_TARGETS, shortcut="none")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    pipe.unet.add_adapter(config)
    randomise(pipe.unet)
    layers, facts = get_peft_model_state_dict(pipe.unet), pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=facts)
    fresh = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    fresh.load_lora_weights(tmp_path)
    for name, layer in pipe.unet.named_modules():
        if isinstance(layer, LoraLayer):
            other = fresh.unet.get_submodule(name)
            assert set(other.scaling.values()) == {4.0}
            assert torch.equal(other.lora_A["default_0"].weight, layer.lora_A["default"].weight)
    assert ResLoraConfig(**facts).shortcut == "none"
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(tmp_path).shortcut == "none"
    with pytest.raises(TypeError, match="unexpected keyword argument"):  # an unmerged one is not taken for a plain one
        LoraConfig(**ResLoraConfig(r=2, shortcut="block").to_dict())


@pytest.mark.parametrize("shortcut", ["none", *LINKED])
def test_merged_state_dict_is_the_drop_in(shortcut: str, tmp_path: Path) -> None:
    """Loaded by diffusers, the file computes what the adapter merges into."""
    unet = calibrated("unet", adapted("unet", shortcut, rank_pattern={"up_blocks.*to_q": 2}))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=merged_state_dict(unet))
    loaded = build("unet")
    loaded.load_lora_adapter(tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    loaded.double()
    args, base = inputs("unet"), output("unet", build("unet"), inputs("unet"))
    wanted = build("unet")
    for name, factors in merged_factors(unet).items():
        wanted.get_submodule(name).weight.data += delta_weight(factors)
    assert torch.allclose(output("unet", loaded, args), output("unet", wanted, args), atol=1e-9)
    assert (output("unet", wanted, args) - base).abs().max() > 1e-2


@pytest.mark.parametrize("wrapped", [False, True])
def test_merged_state_dict_has_the_names_of_pefts(wrapped: bool) -> None:
    settings = {"r": 2, "target_modules": ["q_proj"], "shortcut": "block", "modules_to_save": ["lm_head"]}
    model = build("llama")
    model = get_peft_model(model, ResLoraConfig(**settings)) if wrapped else adapted("llama", **settings)
    randomise(model.double())
    state = {k: v for k, v in get_peft_model_state_dict(model).items() if "not_merged" not in k}
    merged = merged_state_dict(model)
    assert merged.keys() == state.keys()
    assert {value.shape[0] for key, value in merged.items() if "lora_A" in key} == {4}


def test_a_checkpoint_of_a_diffusers_script_is_taken_up_again(tmp_path: Path) -> None:
    """A script that saves and loads factors through diffusers goes on where it was, shortcut and all."""
    unet = calibrated("unet", adapted("unet", "middle"))
    with pytest.warns(UserWarning, match="unmerged ResLoRA"):
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    fresh = build("unet")
    fresh.add_adapter(ResLoraConfig(r=3, lora_alpha=6, target_modules=UNET_TARGETS, shortcut="middle"))
    fresh.double()
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    result = set_peft_model_state_dict(fresh, {k.removeprefix("unet."): v for k, v in stored.items()})
    assert not result.unexpected_keys
    args = inputs("unet")
    assert torch.equal(output("unet", fresh, args), output("unet", unet, args))
    assert merged_factors(fresh).keys() == merged_factors(unet).keys()


def test_pefts_own_folders_stay_possible_and_are_no_plain_lora(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """vLLM looks at names alone: a folder of `block` had nothing but those of a plain LoRA."""
    model = get_peft_model(build("llama"), ResLoraConfig(r=3, target_modules=LLAMA_TARGETS, shortcut="block"))
    randomise(model.double())
    model.save_pretrained(tmp_path)
    assert not [w for w in recwarn if "ResLoRA" in str(w.message)]
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    again = PeftModel.from_pretrained(build("llama"), tmp_path).double()
    args = inputs("llama")
    assert torch.equal(output("llama", again, args), output("llama", model, args))


def test_export_pipeline_writes_what_all_components_merge_into(tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    with pytest.raises(ValueError, match="no component of StableDiffusionPipeline has an adapter 'default'"):
        export_pipeline(pipe, tmp_path / "none")
    pipe.unet.add_adapter(ResLoraConfig(r=3, lora_alpha=6, target_modules=UNET_TARGETS, shortcut="block"))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for model in (pipe.unet, pipe.text_encoder):
        randomise(model)
    report = export_pipeline(pipe, tmp_path / "out", dtype=torch.float32)
    assert report.facts["shortcut"] == "block"
    components = read_lora(tmp_path / "out").components
    assert components.keys() == {"unet", "text_encoder"}
    for name, factors in merged_factors(pipe.unet).items():
        assert torch.allclose(delta_weight(components["unet"][name]), delta_weight(factors), atol=1e-5)
    layer = pipe.text_encoder.get_submodule("encoder.layers.0.self_attn.q_proj")
    got = components["text_encoder"]["text_model.encoder.layers.0.self_attn.q_proj"]
    assert torch.allclose(delta_weight(got), layer.get_delta_weight("default"), atol=1e-5)


def test_export_pipeline_names_every_component_that_cannot_be_exported(tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    pipe.unet.add_adapter(ResLoraConfig(r=3, target_modules=UNET_TARGETS, shortcut="input"))
    pipe.text_encoder.add_adapter(ResLoraConfig(r=2, target_modules=["q_proj"], shortcut="block", bias="all"))
    with pytest.raises(ValueError, match="the adapters of this pipeline cannot be exported") as caught:
        export_pipeline(pipe, tmp_path)
    assert "unet: merging shortcut 'input' by least_squares" in str(caught.value)
    assert "text_encoder: bias='all'" in str(caught.value)
    assert not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("init", [True, "gaussian", "eva", "orthogonal"])
@pytest.mark.parametrize("shortcut", ["none", *LINKED])
def test_every_initialisation_that_is_accepted_starts_at_the_base(shortcut: str, init: object) -> None:
    """`middle` adds B_n A_{n-1}, which an orthogonal initialisation does not make zero."""
    if (shortcut, init) == ("middle", "orthogonal"):
        with pytest.raises(ValueError, match="would not start at the base; wanted True, False or 'gaussian', 'eva'"):
            ResLoraConfig(shortcut=shortcut, init_lora_weights=init)
        return
    model = build("llama")
    settings = {"r": 4, "target_modules": LLAMA_TARGETS, "shortcut": shortcut, "init_lora_weights": init}
    model.add_adapter(ResLoraConfig(**settings, num_previous=1))
    args = inputs("llama")
    assert torch.allclose(output("llama", model.double(), args), output("llama", build("llama"), args), atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_the_base_are_no_lora_of_it(init: str) -> None:
    with pytest.raises(ValueError, match=r"changes the base weights.*wanted True, False or .*or shortcut 'none'"):
        ResLoraConfig(shortcut="input", init_lora_weights=init)
    model = build("llama").float()
    model.add_adapter(ResLoraConfig(r=4, target_modules=["q_proj"], shortcut="none", init_lora_weights=init))
    args = inputs("llama")
    assert torch.allclose(output("llama", model, args), output("llama", build("llama").float(), args), atol=1e-4)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' has changed the base weights"):
        merged_factors(model)


@pytest.mark.parametrize(("init", "message"), [("gausian", "got 'gausian'; wanted True"), ("mica", "use PEFT's LoraC")])
def test_other_initialisations_are_refused(init: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResLoraConfig(shortcut="none", init_lora_weights=init)


# ----------------------------------------------------------------------------------------------- towers, lone layers


def siglip() -> nn.Module:
    """Text and vision towers of equal widths, as in every released SigLIP."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 32, "max_position_embeddings": 8, "projection_size": 16}
    config = transformers.SiglipConfig(
        text_config=small | text, vision_config=small | {"image_size": 8, "patch_size": 4}
    )
    return transformers.SiglipModel(config).eval()


def clip_towers() -> nn.Module:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = small | {"image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=small, vision_config=vision))


def llava() -> nn.Module:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=32)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def lumina() -> nn.Module:
    """A trunk, and a refiner for each of image and text, all equally wide."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_refiner_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
    return Lumina2Transformer2DModel(**sizes, axes_dim_rope=(4, 4, 8), cap_feat_dim=16)


def motion_unet() -> nn.Module:
    """Attention over places and over time by turns."""
    return UNetMotionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
        norm_num_groups=8,
        motion_num_attention_heads=2,
    )


TOWERS = {
    "siglip": (siglip, "q_proj", ("text_model", "vision_model")),
    "clip": (clip_towers, "q_proj", ("text_model", "vision_model")),
    "llava": (llava, "q_proj", ("vision_tower", "language_model")),
    "t5": (t5, "q", ("encoder.block", "decoder.block")),
    "lumina": (lumina, "to_q", ("noise_refiner", "context_refiner", "layers.")),
    "motion": (motion_unet, "to_q", (".attentions.", ".motion_modules.")),
}


@pytest.mark.parametrize("shortcut", LINKED)
@pytest.mark.parametrize("name", TOWERS)
def test_towers_are_not_joined(name: str, shortcut: str) -> None:
    """`block` asked for equal widths alone, and joined the last text layer of SigLIP to its first vision layer."""
    make, target, towers = TOWERS[name]
    model = make()
    attach(model, ResLoraConfig(r=2, target_modules=[target], shortcut=shortcut))
    found = []
    for chain in explain(model).chains:
        inside = {tower for tower in towers for site in chain.sites if tower in site.name}
        assert len(inside) == 1, [site.name for site in chain.sites]
        found += inside if len(chain.sites) > 1 else ()
    assert set(found) == set(towers)


def test_a_gradient_stays_in_its_tower() -> None:
    model = siglip()
    attach(model, ResLoraConfig(r=2, target_modules=["q_proj"], shortcut="block"))
    randomise(model)
    model.get_image_features(pixel_values=torch.randn(1, 3, 8, 8)).pooler_output.sum().backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"vision_model"}


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["fused", "plain"])
@pytest.mark.parametrize("shortcut", LINKED)
def test_a_layer_joined_to_nothing_is_said_and_computes_plain_lora(
    shortcut: str, dropout: float, caplog: pytest.LogCaptureFixture
) -> None:
    """`input` made such a layer read its own input twice."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    base = [module.weight.detach().clone() for module in (model[0], model[2])]
    biases = [model[0].bias.detach(), model[2].bias.detach()]
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["2"], "shortcut": shortcut, "lora_dropout": dropout}
    with caplog.at_level(logging.INFO):
        attach(model, ResLoraConfig(**settings))
    assert f"shortcut '{shortcut}' joins 1 of 1 adapted layers to no other" in caplog.text
    assert "plain LoRA, joined to nothing: 1 x 2" in str(explain(model))
    assert explain(model).to_dict()["alone"] == ["2"]
    randomise(model.double().eval())
    A, B = (getattr(model[2], side)["default"].weight for side in ("lora_A", "lora_B"))
    x = torch.randn(5, 6, dtype=torch.float64)
    hidden = (x @ base[0].T + biases[0]).relu()
    wanted = hidden @ base[1].T + biases[1] + 3 * hidden @ A.T @ B.T
    assert torch.allclose(model(x), wanted, atol=1e-12)
    assert torch.allclose(delta_weight(merged_factors(model)["2"]), 3 * B @ A, atol=1e-12)  # nothing to calibrate
    assert (3 * B @ A).abs().max() > 1e-2
    assert max(relative_output_errors(model, [x], lambda m, batch: m(batch)).values()) < 1e-12


@pytest.mark.parametrize("method", ["least_squares", "paper_input", "paper_weight"])
def test_a_lone_layer_beside_chains_merges_exactly(method: str) -> None:
    """The UNet's middle block has a resolution of its own: its self-attention is alone in the chains of `input`."""
    unet = adapted("unet", "input", merge_method=method)
    unet = calibrated("unet", unet)
    alone = explain(unet).to_dict()["alone"]
    assert alone
    factors = merged_factors(unet)
    for name in alone:
        layer = unet.get_submodule(name)
        own = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert torch.allclose(delta_weight(factors[name]), own, atol=1e-12)


def test_layers_that_run_twice_in_a_forward_are_plain_lora() -> None:
    """DeBERTa-v3 projects tokens and relative positions by one layer; its defaults raised in the first step."""
    config = transformers.DebertaV2Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=32,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
    )
    for shortcut in ("input", "middle"):
        model = transformers.DebertaV2Model(config)
        settings = {"r": 2, "target_modules": ["query_proj", "value_proj"], "shortcut": shortcut}
        attach(model, ResLoraConfig(**settings))
        randomise(model)
        alone = explain(model).to_dict()["alone"]
        assert [name.rpartition(".")[2] for name in alone] == ["query_proj"] * 3
        assert explain(model).links == 2
        model(input_ids=torch.arange(6)[None]).last_hidden_state.sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


# --------------------------------------------------------------------------------- factors that others put in place


@pytest.mark.parametrize("shortcut", LINKED)
def test_factors_that_eva_replaces_are_linked_anew(shortcut: str) -> None:
    """After a forward, kernels went on with the old factors: wrong outputs, and new ones without a gradient."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LLAMA_TARGETS, "shortcut": shortcut}
    config = ResLoraConfig(**settings, init_lora_weights="eva", eva_config=EvaConfig(), task_type="CAUSAL_LM")
    model = get_peft_model(build("llama").float(), config).double()
    args = inputs("llama")
    output("llama", model, args)
    batches = [{"input_ids": inputs("llama", batch=8, seed=n)[0]} for n in range(4)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    model.double()
    ranks = {module.r["default"] for module in model.modules() if isinstance(module, LoraLayer)}
    assert len(ranks) > 1
    randomise(model)
    output("llama", model, args).sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_" in name)
    again = get_peft_model(build("llama"), copy.deepcopy(model.peft_config["default"])).double()
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert torch.allclose(output("llama", model, args), output("llama", again, args), atol=1e-12)
    assert explain(model).to_dict() == explain(again).to_dict()
    if shortcut == "block":
        want = output("llama", model, args)
        merged = model.merge_and_unload()
        assert torch.allclose(output("llama", merged, args), want, atol=1e-9)


@pytest.mark.parametrize("shortcut", ["none", *LINKED])
def test_factors_that_are_replaced_are_used(shortcut: str) -> None:
    """`update_layer` replaces them, in the layer that another one reads and in the one that reads."""
    model = adapted("llama", shortcut)
    args = inputs("llama")
    before = output("llama", model, args)
    for number in (1, 2):
        layer = model.get_submodule(f"model.layers.{number}.self_attn.q_proj")
        layer.update_layer("default", 3, 6, model.peft_config["default"])
    randomise(model.double(), seed=2)
    fresh = adapted("llama", shortcut)
    randomise(fresh, seed=2)
    got = output("llama", model, args)
    assert torch.allclose(got, output("llama", fresh, args), atol=1e-12)
    assert (got - before).abs().max() > 1e-3


def test_a_layer_that_is_taken_away_is_no_link() -> None:
    """EVA removes layers of rank 0."""
    model = adapted("llama", "middle", target_modules=["q_proj"])
    args = inputs("llama")
    output("llama", model, args)
    attention = model.model.layers[0].self_attn
    attention.q_proj = attention.q_proj.base_layer
    attached = [name for chain in explain(model).chains for site in chain.sites for name in [site.name]]
    assert attached == [f"model.layers.{n}.self_attn.q_proj" for n in (1, 2, 3)]
    assert explain(model).links == 2
    output("llama", model, args).sum().backward()
    assert "model.layers.0.self_attn.q_proj" not in merged_factors(calibrated("llama", model))


class Rungs(nn.Module):
    """A stack whose layers do not feed each other, so that what an adapter adds is linear in each layer's B A."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer, x in zip(self.layers, inputs, strict=True)])


def two_adapters(first: dict, second: dict) -> PeftModel:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["0", "1", "2"]}
    model = get_peft_model(Rungs(), ResLoraConfig(**(settings | first)), "a")
    model.add_adapter("b", ResLoraConfig(**(settings | second)))
    randomise(model.double())
    return model


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("shortcut", ["none", *LINKED])
def test_combining_adapters_is_right_or_refused(shortcut: str, kind: str) -> None:
    """The combination adds what the two add. `svd` refactors layers one by one, which was wrong for `middle`."""
    model = two_adapters({"shortcut": shortcut}, {"shortcut": shortcut})
    weights, x = {"a": 0.5, "b": 2.0}, torch.randn(3, 5, 6, dtype=torch.float64)
    if (shortcut, kind) == ("middle", "svd"):
        with pytest.raises(ValueError, match=r"'svd' takes each layer's B A apart.*'middle'.*wanted 'cat'"):
            model.add_weighted_adapter(list(weights), list(weights.values()), "c", kind)
        assert "c" not in model.peft_config
        return
    model.add_weighted_adapter(list(weights), list(weights.values()), "c", kind, svd_rank=4)
    model.double()
    with model.disable_adapter():
        base = model(x)
    added = {}
    for name in ("a", "b", "c"):
        model.set_adapter(name)
        added[name] = model(x) - base
    wanted = sum(weight * added[name] for name, weight in weights.items())
    assert torch.allclose(added["c"], wanted, atol=1e-6)
    assert wanted.abs().max() > 1e-1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"shortcut": "input"}, {"shortcut": "block"}),
        ({"shortcut": "block"}, {"shortcut": "none"}),
        ({"shortcut": "block", "num_previous": 1}, {"shortcut": "block", "num_previous": 2}),
        ({"shortcut": "input"}, {"shortcut": "input", "target_modules": ["0", "2"]}),
    ],
)
def test_adapters_of_different_links_are_not_combined(first: dict, second: dict) -> None:
    """They were joined as the first one's are."""
    model = two_adapters(first, second)
    with pytest.raises(ValueError, match=r"joined differently.*merged_factors, reslora_diffusion.export.combine"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "cat")


def test_middle_is_not_combined_where_scalings_differ_in_a_chain() -> None:
    options = {"shortcut": "middle", "alpha_pattern": {"layers.1": 8}}
    with pytest.raises(ValueError, match="whose scalings differ here"):
        two_adapters(options, options).add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "cat")


# ------------------------------------------------------------------------------------------------ what PEFT asks for


def test_peft_sees_its_own_configuration_and_the_type() -> None:
    config = ResLoraConfig(r=2, target_modules=["q_proj"], shortcut="block")
    model = get_peft_model(build("llama"), config)
    assert model.peft_config["default"] is config
    assert model.get_model_status().peft_types == {"default": "RESLORA"}
    other = get_peft_model(build("llama"), config)
    handover(other)
    assert (other.peft_config["default"].shortcut, config.shortcut) == ("none", "block")
    assert get_adapter(other).config is other.peft_config["default"]
    copied = copy.deepcopy(other)
    assert get_adapter(copied).config is copied.peft_config["default"]


def test_what_peft_refuses_for_lora_is_refused() -> None:
    """Mamba's kernels read the weight of `out_proj` past its layer; PEFT asks for the type LORA by name."""
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = transformers.MambaForCausalLM(config)
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        get_peft_model(model, ResLoraConfig(r=2, target_modules=["out_proj"], shortcut="block"))


@pytest.mark.filterwarnings("ignore:the factors of adapter")
@pytest.mark.parametrize("shortcut", LINKED)
def test_transformers_own_saving_and_loading(shortcut: str, tmp_path: Path) -> None:
    """It writes the type RESLORA beside the factors, and its loader puts the calibration where merging finds it."""
    model = calibrated("llama", adapted("llama", shortcut))
    model.save_pretrained(tmp_path)
    loaded = build("llama").double()
    loaded.load_adapter(tmp_path)
    args = inputs("llama")
    assert torch.equal(output("llama", loaded, args), output("llama", model, args))
    assert get_adapter(loaded).calibration.keys() == get_adapter(model).calibration.keys()
    assert not any("calibration" in name for name in loaded.state_dict())
    for name, factors in merged_factors(model).items():
        assert torch.allclose(merged_factors(loaded)[name].lora_A, factors.lora_A)


@pytest.mark.filterwarnings("ignore:the factors of adapter")
@pytest.mark.parametrize("loader", ["transformers", "peft"])
def test_frozen_links_come_with_their_adapter(tmp_path: Path, loader: str) -> None:
    """Without them the adapter computes something else."""
    model = adapted("llama", "block")
    adapter = get_adapter(model)
    frozen = {name: adapter.factors(name) for name in list(adapter.layers)[::2]}
    for _ in range(2):
        adapter.add_frozen({name: tuple(torch.randn_like(f) / 4 for f in pair) for name, pair in frozen.items()})
    model.save_pretrained(tmp_path)
    args = inputs("llama")
    if loader == "transformers":
        loaded = build("llama").double()
        loaded.load_adapter(tmp_path)
    else:
        loaded = PeftModel.from_pretrained(build("llama").double(), tmp_path)
        loaded.double()
        loaded = loaded.get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(output("llama", loaded, args), output("llama", model, args), atol=1e-12)
    assert not any("frozen" in name for name in loaded.state_dict())


def test_frozen_links_of_a_file_take_the_place_of_those_that_are_there() -> None:
    model = get_peft_model(build("llama"), ResLoraConfig(r=2, target_modules=["q_proj"], shortcut="block"))
    adapter = get_adapter(model)
    links = [{name: tuple(torch.randn_like(f) for f in adapter.factors(name)) for name in adapter.layers} for _ in "ab"]
    adapter.add_frozen(links[0])
    stored = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    adapter.add_frozen(links[1])
    set_peft_model_state_dict(model, stored)
    found = get_adapter(model).frozen
    assert found.keys() == links[0].keys()
    for name, pairs in found.items():
        for got, wanted in zip(sum(pairs, ()), links[0][name], strict=True):
            assert torch.equal(got, wanted), name


def test_frozen_links_that_a_loader_drops_are_missed() -> None:
    config = ResLoraConfig(r=2, target_modules=["q_proj"], frozen_links=2)
    model = get_peft_model(build("llama"), config)
    with pytest.warns(UserWarning, match="saved with 2 frozen links beside its factors, and they were not loaded"):
        output("llama", model, inputs("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output("llama", model, inputs("llama"))


@pytest.mark.filterwarnings("ignore:the factors of adapter")
@pytest.mark.parametrize("shortcut", LINKED)
def test_saving_by_transformers_and_loading_by_peft(shortcut: str, tmp_path: Path) -> None:
    model = calibrated("llama", adapted("llama", shortcut))
    model.save_pretrained(tmp_path)
    base, args = build("llama").double(), inputs("llama")
    before = output("llama", base, args)
    loaded = PeftModel.from_pretrained(base, tmp_path).double().get_base_model()
    assert torch.allclose(output("llama", loaded, args), output("llama", model, args), atol=1e-12)
    assert (output("llama", loaded, args) - before).abs().max() > 1e-3
    assert get_adapter(loaded).calibration.keys() == get_adapter(model).calibration.keys()


# ------------------------------------------------------------------------------------------- layers that share weights


@pytest.mark.parametrize("kind", [LoraConfig, ResLoraConfig])
def test_replicated_layers_are_no_layers_of_the_base(kind: type, tmp_path: Path) -> None:
    """Their factors were exported as a LoRA of the base, 0.8 of the adapter's effect wrong, with a proof of 0.0."""
    config = kind(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    model = get_peft_model(build("llama"), config)
    randomise(model)
    with pytest.raises(ValueError, match="layer_replication=.* layers that the base does not have"):
        merged_state_dict(model)
    if kind is ResLoraConfig:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="share one weight, and merging would add to it what each"):
                merge()
