"""Quantised bases: shortcuts over layers whose weights are not floats, by each back-end that is installed."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm_tiny import GROUPED, SHORTCUTS, batch, config, randomise
from reslora_diffusion import calibrate, explain, get_controller, merged_factors, merged_forward
from reslora_diffusion.export import export_peft


def wide_llama() -> nn.Module:
    """Rows as long as a quantisation block."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**GROUPED | {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32})
    ).eval()


def by_torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear))
    return model


def by_bitsandbytes(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            quantised = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
            quantised.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantised.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("quantise", [by_torchao, by_bitsandbytes])
def test_a_quantised_base_trains_calibrates_and_exports(quantise, shortcut, tmp_path):
    model = get_peft_model(
        quantise(wide_llama()), config("llama", shortcut=shortcut, target_modules=["q_proj", "v_proj"])
    )
    randomise(model)
    with torch.no_grad():
        moved = model(**batch("llama")).logits
        with model.disable_adapter():
            assert (model(**batch("llama")).logits - moved).abs().max() > 1e-3
    assert explain(model).links == 4
    model.train()(**batch("llama")).logits.square().sum().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert len(gradients) == 12
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    calibrate(model, [batch("llama", seed) for seed in range(3)], lambda model, inputs: model(**inputs))
    assert not get_controller(model).skipped
    fitted = merged_factors(model)
    get_controller(model).config.merge_method = "paper_weight"  # needs norms of the base's weights
    by_weight = merged_factors(model)
    assert all(f.lora_A.isfinite().all() for f in by_weight.values())
    if shortcut in ("input", "middle"):
        assert not all(torch.equal(f.lora_A, fitted[name].lora_A) for name, f in by_weight.items())
    get_controller(model).config.merge_method = "least_squares"
    export_peft(tmp_path, fitted, dtype=torch.float32, model=model)
    model.eval()
    with torch.no_grad():
        with merged_forward(model):
            expected = model(**batch("llama")).logits
        loaded = PeftModel.from_pretrained(quantise(wide_llama()), tmp_path).eval()
        torch.testing.assert_close(loaded(**batch("llama")).logits, expected, rtol=1e-4, atol=1e-4)
