"""What was trained beside the factors is exported as PEFT does, and PEFT alone computes what was trained."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from llm_tiny import GROUPED
from reslora_diffusion import ResLoraConfig, merged_factors
from reslora_diffusion.export import CheckFailed, export_peft, inspect_lora, verify_lora
from reslora_diffusion.export.state_dict import adapter_factors

TOKENS = torch.tensor([[3, 4, 9, 17, 25, 31]])
KINDS = {
    "head": {"task_type": "SEQ_CLS"},
    "output layer": {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]},
    "embedding": {"task_type": "CAUSAL_LM", "modules_to_save": ["embed_tokens"]},
    "tokens": {"task_type": "CAUSAL_LM", "trainable_token_indices": [3, 4]},
    "tokens of two": {"task_type": "CAUSAL_LM", "trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [4]}},
    "tokens and head": {"task_type": "SEQ_CLS", "trainable_token_indices": [3, 4]},
}


def fresh(kind, tied=False):
    torch.manual_seed(0)
    cls = LlamaForSequenceClassification if "head" in kind else LlamaForCausalLM
    return cls(LlamaConfig(**GROUPED, tie_word_embeddings=tied)).eval()


def trained(model, config):
    """An adapted model after some training of everything that is trainable."""
    peft = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return peft


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [LoraConfig, ResLoraConfig])
def test_peft_computes_what_was_trained(tmp_path, kind, config, tied):
    if tied and kind != "tokens":
        pytest.skip("not adapted beside a tied layer")
    more = {"shortcut": "block"} if config is ResLoraConfig else {}
    peft = trained(fresh(kind, tied), config(r=4, target_modules=["q_proj", "v_proj"], **more, **KINDS[kind]))
    with torch.no_grad():
        wanted, base = peft(TOKENS).logits, fresh(kind, tied)(TOKENS).logits
    factors = adapter_factors(peft)
    report = export_peft(tmp_path / "out", factors, model=peft, task_type=KINDS[kind]["task_type"], dtype=torch.float32)
    assert "what was trained beside the factors" in str(report)
    assert "vLLM and llama.cpp take factors alone" in str(report)
    assert "--enable-lora" not in str(report)
    loaded = PeftModel.from_pretrained(fresh(kind, tied), tmp_path / "out").eval()
    with torch.no_grad():
        got = loaded(TOKENS).logits
    assert (wanted - base).norm() > 0.1 * base.norm()
    assert (got - wanted).norm() < 1e-4 * (wanted - base).norm()
    assert inspect_lora(tmp_path / "out").healthy
    assert verify_lora(tmp_path / "out").passed


def test_it_is_the_head_and_not_the_factors_alone_that_matters(tmp_path):
    """The error that a proof of factors alone cannot see."""
    peft = trained(fresh("head"), ResLoraConfig(r=4, target_modules=["q_proj"], shortcut="none", task_type="SEQ_CLS"))
    export_peft(tmp_path / "out", merged_factors(peft), model=peft, task_type=None, dtype=torch.float32)
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    torch.testing.assert_close(stored["base_model.model.score.weight"], peft.score.weight)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["score"]


def test_a_head_that_is_not_there_is_asked_for(tmp_path):
    peft = trained(fresh("head"), ResLoraConfig(r=4, target_modules=["q_proj"], shortcut="none", task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"task_type SEQ_CLS makes PEFT look for a trained head.*as `model`"):
        export_peft(tmp_path / "out", merged_factors(peft), task_type="SEQ_CLS")
    assert not (tmp_path / "out").exists()


def test_a_head_that_peft_does_not_read_fails_the_proof(tmp_path, monkeypatch):
    from reslora_diffusion.export import peft_folder

    peft = trained(fresh("head"), LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    real = peft_folder.save_tensors

    def careless(tensors, path, metadata):
        real({k: t * 2 if "score" in k else t for k, t in tensors.items()}, path, metadata)

    monkeypatch.setattr(peft_folder, "save_tensors", careless)
    with pytest.raises(CheckFailed, match=r"does not read what was trained beside the factors: score\.weight"):
        export_peft(tmp_path / "out", adapter_factors(peft), model=peft, task_type="SEQ_CLS")


def test_a_resized_vocabulary(tmp_path):
    fresh("").save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70, mean_resizing=False)
    peft = trained(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    export_peft(
        tmp_path / "out", adapter_factors(peft), model=peft, base_model=str(tmp_path / "base"), dtype=torch.float32
    )
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert stored["base_model.model.model.embed_tokens.weight"].shape == (70, 32)
    assert stored["base_model.model.lm_head.weight"].shape == (70, 32)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, peft(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_trained_biases_beside_a_lora_hide_none_of_it(tmp_path):
    """PEFT looked for the biases in a model that has only what the LoRA adapts, and was said not to load the folder."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only")
    peft = trained(Qwen2ForCausalLM(Qwen2Config(**GROUPED)), config)
    peft.save_pretrained(tmp_path)
    result = verify_lora(tmp_path)
    assert result.passed, str(result)
    assert [(check.matched, check.expected) for check in result.checks] == [(3, 3)]
