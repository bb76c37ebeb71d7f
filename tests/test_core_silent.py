"""What once was wrong without a word: each test holds the right value, and fails on the code that had the fault."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from models import CLIP_TARGETS, LLAMA_TARGETS, UNET_TARGETS, build, inputs, output, randomise
from reslora_diffusion import (
    ResLoraConfig,
    calibrate,
    export_pipeline,
    merged_factors,
    merged_state_dict,
)
from reslora_diffusion.core.functional import delta_weight
from reslora_diffusion.export import read_lora
from tiny import tiny_pipeline_folder

TARGETS = {"unet": UNET_TARGETS, "clip": CLIP_TARGETS, "llama": LLAMA_TARGETS}
LINKED = ("input", "block", "middle")


def adapted(name: str, shortcut: str = "block", **options: object) -> torch.nn.Module:
    """A tiny model with an adapter that matters, through the library's own `add_adapter`."""
    model = build(name)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[name], "shortcut": shortcut}
    model.add_adapter(ResLoraConfig(**(settings | options)))
    randomise(model.double().eval())
    return model


def calibrated(name: str, model: torch.nn.Module) -> torch.nn.Module:
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
