"""PEFT folders: loaded by PEFT itself, in a process that knows only PEFT, and shaped as vLLM wants them."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from forks import run_forked
from lora_factors import ATTENTION, CLIP, dense, largest_error, loaded_deltas, random_factors, wanted_deltas
from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.export import (
    CheckFailed,
    export_peft,
    export_peft_components,
    fuse,
    read_lora,
    resize,
    verify_lora,
)
from reslora_diffusion.export.peft_folder import VLLM_RANKS, vllm_note
from tiny import tiny_text_encoder, tiny_tokenizer, tiny_unet

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = torch.arange(12)[None]


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes)).eval()


@pytest.fixture(scope="module")
def factors():
    return random_factors(llama(), LINEAR, 0, (2, 4), (0.5, 3.0))


@pytest.fixture(scope="module")
def out(tmp_path_factory, factors):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    report = export_peft(folder, factors, base_model="org/llama", model=llama(), dtype=torch.float32)
    assert "--max-lora-rank 8" in str(report)
    return folder


def merged_logits(factors) -> torch.Tensor:
    model = llama()
    layers = dict(model.named_modules())
    for path, f in factors.items():
        layers[path].weight.data += dense(f).float()
    return model(TOKENS).logits


def test_peft_loads_what_was_exported(out, factors):
    base = llama()(TOKENS).logits
    model = PeftModel.from_pretrained(llama(), out)
    assert largest_error(loaded_deltas(model.get_base_model()), wanted_deltas(factors)) < 1e-6
    logits = model(TOKENS).logits
    assert (logits - base).abs().max() > 0.1
    assert torch.allclose(logits, merged_logits(factors), atol=1e-4)
    assert torch.allclose(model.merge_and_unload()(TOKENS).logits, logits, atol=1e-4)


def test_the_configuration_is_a_plain_lora(out):
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 4
    assert config["base_model_name_or_path"] == "org/llama"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(LINEAR)
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    ranks = {min(tensor.shape) for tensor in load_file(out / "adapter_model.safetensors").values()}
    assert ranks == {4}


def test_a_process_without_this_package_loads_it(out, tmp_path, factors):
    llama().save_pretrained(tmp_path / "base")
    program = f"""
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(out)!r}).eval()
assert "reslora_diffusion" not in sys.modules
torch.save(model(torch.arange(12)[None]).logits, {str(tmp_path / "logits.pt")!r})
"""
    done = run_forked(program)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), merged_logits(factors), atol=1e-4)


def test_modules_that_a_last_name_would_not_single_out(tmp_path, factors):
    """Only two layers adapted: last names would reach the third too."""
    two = {path: f for path, f in factors.items() if ".2." not in path}
    export_peft(tmp_path / "a", two, model=llama(), dtype=torch.float32)
    export_peft(tmp_path / "b", two, dtype=torch.float32)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == sorted(two)
        model = PeftModel.from_pretrained(llama(), folder)
        assert largest_error(loaded_deltas(model.get_base_model()), wanted_deltas(two)) < 1e-6


def test_names_of_a_wrapped_model_are_understood(tmp_path, factors):
    wrapped = {f"base_model.model.{path}": f for path, f in factors.items()}
    export_peft(tmp_path, wrapped, model=PeftModel.from_pretrained(llama(), export(tmp_path / "x", factors)))
    assert read_lora(tmp_path).components["model"].keys() == factors.keys()


def export(folder, factors):
    export_peft(folder, factors)
    return folder


def test_transposed_layers(tmp_path):
    """GPT-2 keeps its weights as [in, out]; PEFT must be told."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    factors = {}
    for name, module in model.named_modules():
        if name.endswith("c_attn"):
            width, out = module.weight.shape
            factors[name] = LoraFactors(torch.randn(2, width) * 0.3, torch.randn(out, 2) * 0.3, 1.5)
    export_peft(tmp_path / "out", factors, model=model, dtype=torch.float32)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    wanted = GPT2LMHeadModel(config).eval()
    wanted.load_state_dict(model.state_dict())
    for path, f in factors.items():
        wanted.get_submodule(path).weight.data += dense(f).float().T
    loaded = PeftModel.from_pretrained(model, tmp_path / "out")
    assert torch.allclose(loaded(TOKENS).logits, wanted(TOKENS).logits, atol=1e-4)
    loaded.unload()
    model.save_pretrained(tmp_path / "base")
    fuse(tmp_path / "out", str(tmp_path / "base"), tmp_path / "fused")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
    assert torch.allclose(fused(TOKENS).logits, wanted(TOKENS).logits, atol=1e-4)


@pytest.mark.parametrize(("rank", "needed"), [(1, 1), (2, 8), (12, 16), (64, 64), (300, 320), (512, 512)])
def test_the_rank_that_vllm_needs(rank, needed):
    assert vllm_note(rank).endswith(f"--max-lora-rank {needed}")
    assert needed in VLLM_RANKS


def test_ranks_that_vllm_cannot_serve():
    assert "export at a smaller rank" in vllm_note(513)


def test_a_language_model_is_merged_verified_and_resized(tmp_path, out, factors):
    llama().save_pretrained(tmp_path / "base")
    assert verify_lora(out, str(tmp_path / "base")).passed
    report = fuse(out, str(tmp_path / "base"), tmp_path / "fused")
    assert report.modules == len(factors)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
    assert torch.allclose(fused(TOKENS).logits, merged_logits(factors), atol=1e-4)
    with pytest.raises(CheckFailed, match="allow_lossy"):
        resize(out, tmp_path / "small", 1)
    resize(out, tmp_path / "same", 4)
    assert read_lora(tmp_path / "same").components["model"].keys() == factors.keys()
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    head = {"lm_head": LoraFactors(torch.ones(1, 32), torch.ones(64, 1), 1.0)}
    with pytest.raises(ValueError, match="share their weight with other layers"):
        fuse(export(tmp_path / "head", head), str(tmp_path / "tied"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_parts_of_a_diffusion_model_are_peft_models_of_their_own(tmp_path):
    encoder = tiny_text_encoder(tiny_tokenizer(tmp_path / "tokenizer"))
    unet = tiny_unet()
    components = {"unet": random_factors(unet, ATTENTION, 0), "text_encoder": random_factors(encoder, CLIP, 1)}
    export_peft_components(tmp_path, components, dtype=torch.float32)
    for component, model in (("unet", unet), ("text_encoder", encoder)):
        loaded = PeftModel.from_pretrained(model, tmp_path / component)
        assert largest_error(loaded_deltas(loaded.get_base_model()), wanted_deltas(components[component])) < 1e-6
    assert read_lora(tmp_path).components.keys() == components.keys()


def test_bad_factors_write_nothing(tmp_path, factors):
    first = next(iter(factors))
    with pytest.raises(ValueError, match="NaN"):
        export_peft(tmp_path / "out", factors | {first: factors[first]._replace(scaling=float("nan"))})
    with pytest.raises(ValueError, match="the base lacks 1 of the modules: model.model.layers.9.x"):
        export_peft(tmp_path / "out", factors | {"model.layers.9.x": factors[first]}, model=llama())
    with pytest.raises(ValueError, match="there are no modules"):
        export_peft(tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
