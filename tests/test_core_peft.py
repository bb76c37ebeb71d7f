"""ResLoRA as a PEFT method: every way in, switching, merging, saving, and what the rest of PEFT sees.

What `core.peft` touches of PEFT is asserted by name below, for the versions that it names.
"""

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import NoMatchingPeftModuleError
from torch import nn
from transformers import LlamaForCausalLM

from forks import run_forked
from models import CLIP_TARGETS, LLAMA_TARGETS, UNET_TARGETS, build, inputs, output, randomise
from reslora_diffusion import (
    ResLoraConfig,
    attach,
    calibrate,
    detach,
    get_adapter,
    merged_factors,
    merged_forward,
)

SHORTCUTS = ("none", "input", "block", "middle")


def config(shortcut: str = "input", targets: object = LLAMA_TARGETS, **options: object) -> ResLoraConfig:
    return ResLoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": targets, "shortcut": shortcut} | options)


def peft_llama(shortcut: str, **options: object) -> PeftModel:
    model = get_peft_model(build("llama"), config(shortcut, **options)).double().eval()
    randomise(model)
    return model


def run(model: nn.Module) -> torch.Tensor:
    return output("llama", model, inputs("llama"))


def calibrated(model: nn.Module) -> nn.Module:
    calibrate(model, [inputs("llama", seed=n) for n in range(4)], lambda m, batch: m(*batch))
    return model


def test_what_core_peft_touches_is_there() -> None:
    from reslora_diffusion.core.peft import VERSIONS

    assert peft.__version__.startswith(VERSIONS), f"core.peft was written for PEFT {VERSIONS}: check its list of names"
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.tuners.lora.layer import LoraLayer, LoraVariant

    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["RESLORA"] is ResLoraConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING["RESLORA"] == "lora_"
    for name in ("inject_adapter", "_get_adapter_state_dict", "_remap_adapter_state_dict_for_load", "delete_adapter"):
        assert callable(getattr(peft.LoraModel, name))
    for name in ("init", "merge_safe", "merge_unsafe", "unmerge", "forward", "supports_lora_conversion"):
        assert callable(getattr(LoraVariant, name))
    assert callable(LoraLayer._cast_input_dtype)


@pytest.mark.parametrize("name", ["unet", "clip", "llama"])
def test_ways_in_agree(name: str) -> None:
    """`attach`, the libraries' own `add_adapter`, and `get_peft_model` give the same model."""
    targets = {"unet": UNET_TARGETS, "clip": CLIP_TARGETS, "llama": LLAMA_TARGETS}[name]
    args, outputs = inputs(name), []
    for way in ("attach", "add_adapter", "get_peft_model"):
        model = build(name)
        if way == "attach":
            attach(model, config("middle", targets))
        elif way == "add_adapter":
            model.add_adapter(config("middle", targets))
        else:
            model = get_peft_model(model, config("middle", targets))
        model.double().eval()
        randomise(model)
        outputs.append(output(name, model, args))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in n for n in trained)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - output(name, build(name), args)).abs().max() > 1e-3


def test_none_is_pefts_own_lora() -> None:
    plain = get_peft_model(build("llama"), LoraConfig(r=3, lora_alpha=6, target_modules=LLAMA_TARGETS)).double().eval()
    randomise(plain)
    assert torch.allclose(run(plain), run(peft_llama("none")), atol=1e-12)


def test_training_changes_only_the_adapter() -> None:
    model = peft_llama("input")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model).square().mean().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_disable_switch_and_delete(shortcut: str) -> None:
    base = run(build("llama"))
    model = peft_llama(shortcut)
    first = run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), base)
    model.add_adapter("second", config("block", ["q_proj"]))
    model.set_adapter("second")
    model.double()
    randomise(model, seed=4)
    second = run(model)
    assert (first - second).abs().max() > 1e-3
    model.base_model.set_adapter(["default", "second"])
    assert (run(model) - second).abs().max() > 1e-3
    model.set_adapter("default")
    assert (run(model) - second).abs().max() > 1e-3
    assert (run(model) - base).abs().max() > 1e-3
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(run(model), second)
    with pytest.raises(ValueError, match="no ResLoRA adapter 'default'"):
        get_adapter(model, "default")


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_go_with_the_adapter() -> None:
    base = build("llama")
    clean = hooks_of(base)
    model = get_peft_model(base, config("input"))
    assert hooks_of(model) == clean + 2
    model.delete_adapter("default")
    assert hooks_of(model) == clean
    model = get_peft_model(build("llama"), config("input"))
    assert hooks_of(model.unload()) == clean
    attached = build("llama")
    attach(attached, config("input"))
    detach(attached)
    assert hooks_of(attached) == clean
    assert torch.equal(run(attached), run(build("llama")))
    assert not hasattr(attached, "peft_config")


def test_hooks_go_after_unload_lora_of_diffusers() -> None:
    unet = build("unet")
    clean = hooks_of(unet)
    unet.add_adapter(config("input", UNET_TARGETS))
    assert hooks_of(unet) == clean + 2
    unet.unload_lora()
    output("unet", unet, inputs("unet"))
    assert hooks_of(unet) == clean


@pytest.mark.parametrize("method", ["least_squares", "paper_input", "paper_weight", "drop"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_merge_and_unmerge(shortcut: str, method: str) -> None:
    """Five outputs: base, adapted, as exported, merged, unmerged."""
    model = calibrated(peft_llama(shortcut, merge_method=method))
    base, before = run(build("llama")), run(model)
    with merged_forward(model):
        exported = run(model)
    factors = merged_factors(model)
    model.merge_adapter()
    assert torch.allclose(run(model), exported, atol=1e-12)
    assert (exported - base).abs().max() > 1e-3
    if shortcut in ("none", "block"):
        assert torch.allclose(exported, before, atol=1e-12)
    else:
        assert (exported - before).abs().max() > 1e-6
    model.unmerge_adapter()
    assert torch.allclose(run(model), before, atol=1e-12)
    plain = model.merge_and_unload()
    assert isinstance(plain, LlamaForCausalLM)
    assert torch.allclose(run(plain), exported, atol=1e-12)
    by_hand = build("llama")
    for name, f in factors.items():
        by_hand.get_submodule(name).weight.data += f.scaling * f.lora_B @ f.lora_A
    assert torch.allclose(run(by_hand), exported, atol=1e-12)


def test_merging_without_calibration_says_what_is_missing() -> None:
    model = peft_llama("input")
    with pytest.raises(ValueError, match=r"least_squares needs activations: call calibrate.*'paper_weight' or 'drop'"):
        model.merge_and_unload()
    assert run(model).isfinite().all()


def test_training_on_after_calibration_is_told() -> None:
    model = calibrated(peft_llama("input"))
    merged_factors(model)
    with torch.no_grad():
        get_adapter(model).factors("model.layers.0.self_attn.q_proj")[0].mul_(2)
    with pytest.warns(UserWarning, match="calibrate it again"):
        merged_factors(model)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_knows_whether_it_was_trained_on_after_calibration(pickled: bool) -> None:
    def copied(model: nn.Module) -> nn.Module:
        return pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)

    model = peft_llama("input")
    A = get_adapter(model).factors("model.layers.0.self_attn.q_proj")[0]
    with torch.no_grad():
        A.mul_(1)  # one change more than a copy knows of
    calibrated(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = copied(model)
        merged_factors(copied(same))
    run(same)
    with torch.no_grad():
        for trained in (A, get_adapter(same).factors("model.layers.0.self_attn.q_proj")[0]):
            trained.mul_(2)
    for stale in (copied(model), same):
        with pytest.warns(UserWarning, match="calibrate it again"):
            merged_factors(stale)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_fuse_and_unfuse_in_diffusers(shortcut: str) -> None:
    unet, args = build("unet"), inputs("unet")
    unet.add_adapter(config(shortcut, UNET_TARGETS))
    unet.double()
    randomise(unet)
    calibrate(unet, [args], lambda model, batch: model(*batch))
    before = output("unet", unet, args)
    with merged_forward(unet):
        exported = output("unet", unet, args)
    unet.fuse_lora()
    assert torch.allclose(output("unet", unet, args), exported, atol=1e-11)
    unet.unfuse_lora()
    assert torch.allclose(output("unet", unet, args), before, atol=1e-11)
    unet.fuse_lora(lora_scale=0.5)
    half = output("unet", unet, args)
    assert (half - exported).abs().max() > 1e-3
    unet.unfuse_lora()


def test_strength_scales_every_shortcut() -> None:
    unet, args = build("unet"), inputs("unet")
    unet.add_adapter(config("block", UNET_TARGETS))
    unet.double()
    randomise(unet)
    whole, base = output("unet", unet, args), output("unet", build("unet"), args)
    unet.set_adapters(["default"], [0.0])
    assert torch.allclose(output("unet", unet, args), base, atol=1e-12)
    unet.set_adapters(["default"], [1.0])
    assert torch.allclose(output("unet", unet, args), whole, atol=1e-12)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_save_and_load(shortcut: str, tmp_path) -> None:
    """Weights, links and calibration: a reloaded run computes and merges to the same."""
    model = calibrated(peft_llama(shortcut, num_previous=1))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["shortcut"], saved["num_previous"]) == ("RESLORA", shortcut, 1)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).double()
    assert torch.allclose(run(loaded), run(model), atol=1e-12)
    assert get_adapter(loaded).explain() == get_adapter(model).explain()
    for name, factors in merged_factors(model).items():
        again = merged_factors(loaded)[name]
        assert torch.allclose(again.lora_A, factors.lora_A)
        assert torch.allclose(again.lora_B, factors.lora_B)
    trainable = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).double()
    run(trainable).mean().backward()


def test_load_under_another_name(tmp_path) -> None:
    model = calibrated(peft_llama("middle"))
    model.save_pretrained(tmp_path)
    other = peft_llama("block")
    other.load_adapter(tmp_path, "loaded")
    other.set_adapter("loaded")
    other.double()
    assert torch.allclose(run(other), run(model), atol=1e-12)
    assert merged_factors(other, "loaded").keys() == merged_factors(model).keys()


def test_a_process_without_this_package_refuses_the_file(tmp_path) -> None:
    peft_llama("input").save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = run_forked(code)
    assert done.returncode != 0
    assert "RESLORA" in done.stderr


ASKED_FOR = "reslora_diffusion, importlib.util; importlib.util.find_spec('peft'); import peft"


@pytest.mark.parametrize(  # tests/test_imports.py also imports our package first
    "order", ["peft, reslora_diffusion", pytest.param("reslora_diffusion, peft", marks=pytest.mark.slow), ASKED_FOR]
)
def test_importing_the_package_is_enough_to_load_the_file_in_any_order(order: str, tmp_path) -> None:
    peft_llama("input").save_pretrained(tmp_path)
    code = (
        f"import sys, {order}\n"
        f"config = peft.PeftConfig.from_pretrained({str(tmp_path)!r})\n"
        "print(type(config).__name__, 'diffusers' in sys.modules)"
    )
    done = run_forked(code)
    assert done.stdout.split() == ["ResLoraConfig", "False"], done.stderr


def test_loading_other_shapes_names_each_tensor(tmp_path) -> None:
    peft_llama("input").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))
    with pytest.raises(RuntimeError) as caught:
        PeftModel.from_pretrained(build("llama"), tmp_path)
    assert str(caught.value).count("size mismatch for") == 56
    assert "layers.3.self_attn.q_proj.lora_A.default.weight" in str(caught.value)


def test_conversion_by_peft_is_refused() -> None:
    assert not peft_llama("input").supports_lora_conversion()


def test_every_fault_in_one_message() -> None:
    with pytest.raises(ValueError, match="ResLoraConfig") as caught:
        ResLoraConfig(
            r=0,
            shortcut="sideways",
            merge_method="hope",
            num_previous=-1,
            lora_dropout=1.5,
            use_dora=True,
            lora_bias=True,
        )
    text = str(caught.value)
    for part in ("r: got 0", "'sideways'", "'hope'", "num_previous: got -1", "1.5", "use_dora", "lora_bias"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortcut": "input", "num_previous": 3}, "reaches back one block"),
        ({"shortcut": "input", "num_previous": None}, "reaches back one block"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"reslora_version": 99}, "got 99, this package reads up to 1"),
        ({"num_previous": True}, "num_previous: got True"),
    ],
)
def test_faults(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResLoraConfig(**options)


def test_the_default_shortcut_merges_exactly() -> None:
    model = get_peft_model(build("llama"), ResLoraConfig(r=3, target_modules=LLAMA_TARGETS)).double().eval()
    randomise(model)
    assert model.peft_config["default"].shortcut == "block"
    trained = run(model)
    assert torch.allclose(run(model.merge_and_unload()), trained, atol=1e-12)


def test_targets_that_match_nothing_are_offered_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"not found in the base model.*nearest are .*q_proj"):
        attach(build("llama"), config(targets=["q_prj"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exclude_modules": ["q_proj"]}, "mismatched target modules and excluded modules"),
        ({"layers_to_transform": [99]}, "You specified 'layers_to_transform'"),
    ],
)
def test_targets_that_are_left_out_are_not_called_unknown(options: dict, said: str) -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=said) as caught:
        attach(build("llama"), ResLoraConfig(target_modules=["q_proj"], **options))
    assert "no module has such a name" not in str(caught.value)


def test_attach_returns_a_handle() -> None:
    model = build("llama")
    adapted = attach(model, config("block"))
    run(model)
    assert adapted.explain() == get_adapter(model).explain()
    assert "has not run" not in str(adapted.explain_kernels())
    assert {id(p) for p in adapted.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    adapted.detach()
    with pytest.raises(ValueError, match="no ResLoRA adapter 'default'"):
        adapted.explain()


def test_attaching_twice_is_refused() -> None:
    model = build("llama")
    attach(model, config())
    with pytest.raises(ValueError, match="on this model already"):
        attach(model, config())


def test_state_dict_has_no_more_than_the_factors() -> None:
    """Links between layers must not make modules of each other: 2 tensors a layer, and safetensors takes them."""
    model = build("llama")
    before = len(model.state_dict())
    attach(model, config("middle", num_previous=None))
    assert len(model.state_dict()) == before + 2 * len(get_adapter(model).layers)


def test_survives_pickling_and_copying(tmp_path) -> None:
    model = peft_llama("input")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(loaded), run(model))
    assert torch.equal(run(copy.deepcopy(model)), run(model))


def test_a_plain_lora_beside_a_residual_one() -> None:
    """A bf16 base keeps working when PEFT's own LoRA, in float32, is added to the same layers."""
    unet = build("unet").to(torch.bfloat16)
    unet.add_adapter(config("input", UNET_TARGETS), "residual")
    unet.add_adapter(LoraConfig(r=2, target_modules=UNET_TARGETS), "plain")
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    args = tuple(a.bfloat16() if a.is_floating_point() else a for a in inputs("unet"))
    for active in (["residual"], ["plain"], ["residual", "plain"]):
        unet.set_adapters(active)
        assert output("unet", unet, args).dtype is torch.bfloat16
