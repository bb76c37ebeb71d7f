"""The proof of a PEFT folder compares the outputs of the whole model, and says where it cannot."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from llm_tiny import COMMON, ENCODER, GROUPED
from reslora_diffusion import ResLoraConfig, calibrate, merged_factors
from reslora_diffusion.export import CheckFailed, export_peft, peft_folder
from reslora_diffusion.export.state_dict import adapter_factors

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SMALL | {"image_size": 32, "patch_size": 16}
WHISPER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {name: value for name, value in WHISPER.items() if "source" not in name and name != "num_mel_bins"}
QV = ["q_proj", "v_proj"]
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)), QV, {}),
    "tied": (lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)), QV, {}),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)), ["c_attn"], {}),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**ENCODER)), ["query"], {"task_type": "SEQ_CLS"}),
    "bart": (
        lambda: BartForSequenceClassification(BartConfig(**BART, max_position_embeddings=64)),
        QV,
        {"modules_to_save": ["classification_head"]},
    ),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5)), ["q", "v"], {}),
    "whisper": (lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)), QV, {}),
    "clip": (lambda: CLIPModel(CLIPConfig(text_config=COMMON, vision_config=VISION, projection_dim=32)), QV, {}),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**VISION)), ["q_proj"], {"modules_to_save": ["classifier"]}),
    "llava": (
        lambda: LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=GROUPED | {"model_type": "llama"},
                vision_config=VISION | {"model_type": "clip_vision_model"},
                image_token_index=63,
            )
        ),
        QV,
        {},
    ),
    "ast": (
        lambda: ASTForAudioClassification(ASTConfig(**SMALL, patch_size=8, max_length=128, num_mel_bins=16)),
        ["q_proj"],
        {},
    ),
}


def trained(model, config, name="default"):
    peft = get_peft_model(model.eval(), config, adapter_name=name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return peft


def llama(**more):
    torch.manual_seed(0)
    return trained(LlamaForCausalLM(LlamaConfig(**GROUPED)), ResLoraConfig(r=4, target_modules=QV, **more))


def outputs_in(folder):
    return json.loads((folder / "export_report.json").read_text())["outputs"]


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_of_models_of_all_kinds_are_compared(tmp_path, kind):
    torch.manual_seed(0)
    make, targets, more = MODELS[kind]
    peft = trained(make(), ResLoraConfig(r=4, target_modules=targets, shortcut="block", **more))
    flags = {name: p.requires_grad for name, p in peft.named_parameters()}
    peft.train()
    report = export_peft(tmp_path, adapter_factors(peft), model=peft, task_type=None, dtype=torch.float32)
    found = outputs_in(tmp_path)
    assert found["compared"], found
    assert found["error"] < 1e-4
    assert found["effect"] > 1e-3
    assert "outputs of the whole model by PEFT" in str(report)
    assert peft.training
    assert {name: p.requires_grad for name, p in peft.named_parameters()} == flags


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_fault(tmp_path, base, dtype):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED)).to(base)
    more = {"modules_to_save": ["lm_head"]}
    peft = trained(model, ResLoraConfig(r=4, target_modules=QV, shortcut="block", **more))
    export_peft(tmp_path, merged_factors(peft), model=peft, dtype=dtype)
    found = outputs_in(tmp_path)
    assert found["compared"], found
    assert found["dtype"] == str(base).removeprefix("torch.")


def test_a_fitted_merge_is_what_is_compared(tmp_path):
    """`input` merges into what it is calibrated to; the outputs are those of that, not of the shortcut."""
    peft = llama(shortcut="input")
    calibrate(peft, [torch.tensor([[3, 4, 9, 17, 25, 31]])], lambda model, ids: model(ids))
    export_peft(tmp_path, merged_factors(peft), model=peft, dtype=torch.float32)
    assert outputs_in(tmp_path)["error"] < 1e-4


def test_no_weight_is_held_twice(tmp_path, monkeypatch):
    peft = llama(shortcut="block")
    own = {p.data_ptr() for p in peft.parameters()}
    real, seen = peft_folder.prove_peft, []

    def looking(*args):
        found = real(*args)
        proof = args[-2]
        seen.extend(p for name, p in proof.base.named_parameters() if "lora_" not in name)
        return found

    monkeypatch.setattr(peft_folder, "prove_peft", looking)
    export_peft(tmp_path, merged_factors(peft), model=peft)
    assert len(seen) == sum("lora_" not in name for name, _ in peft.named_parameters())
    assert {p.data_ptr() for p in seen} <= own


def test_a_resized_vocabulary_is_not_written_into(tmp_path):
    LlamaForCausalLM(LlamaConfig(**GROUPED)).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70, mean_resizing=False)
    peft = trained(model, LoraConfig(r=4, target_modules=QV))
    embedding = peft.get_input_embeddings().weight.clone()
    base_model = str(tmp_path / "base")
    export_peft(tmp_path / "out", adapter_factors(peft), model=peft, base_model=base_model, dtype=torch.float32)
    assert outputs_in(tmp_path / "out").get("error", 1) < 1e-4, outputs_in(tmp_path / "out")
    assert torch.equal(peft.get_input_embeddings().weight, embedding)


class Doubled(nn.Module):
    """A layer that no configuration makes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def test_a_model_that_its_configuration_does_not_make_is_not_compared(tmp_path):
    peft = llama(shortcut="block")
    layer = peft.get_base_model().model.layers[1]
    layer.input_layernorm = Doubled(layer.input_layernorm)
    export_peft(tmp_path, merged_factors(peft), model=peft)
    assert "a new LlamaForCausalLM with the same weights" in outputs_in(tmp_path)["reason"]


def test_an_adapter_that_peft_computes_otherwise_fails_the_proof(tmp_path, monkeypatch):
    """The factors arrive as they were written, and their place in the model is another."""
    peft = llama(shortcut="block")
    real = peft_folder.adapter_config
    monkeypatch.setattr(
        peft_folder,
        "adapter_config",
        lambda *args: real(*args) | {"fan_in_fan_out": False, "lora_alpha": 4, "use_rslora": False},
    )
    monkeypatch.setattr(peft_folder, "misreading", lambda check, tolerance: None)
    monkeypatch.setattr(peft_folder, "health_problems", lambda components: [])
    with pytest.raises(CheckFailed, match="PEFT computes something else from the folder than the trained model"):
        export_peft(tmp_path / "out", merged_factors(peft), model=peft)
    assert not (tmp_path / "out").exists()


def test_a_cut_rank_says_what_it_costs_the_outputs(tmp_path):
    peft = llama(shortcut="block")
    export_peft(tmp_path, merged_factors(peft), model=peft, rank=4, allow_lossy=True, dtype=torch.float32)
    found = outputs_in(tmp_path)
    assert found["error"] > 0.01
    assert "allowed" not in found


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda peft, f: (None, f), "no trained model was given"),
        (lambda peft, f: (LlamaForCausalLM(LlamaConfig(**GROUPED)), f), "a base without the adapter"),
        (lambda peft, f: (peft, {k: v._replace(scaling=2 * v.scaling) for k, v in f.items()}), "are not those of the"),
    ],
)
def test_where_nothing_can_be_compared_the_report_says_so(tmp_path, spoil, reason):
    peft = llama(shortcut="block")
    model, factors = spoil(peft, merged_factors(peft))
    report = export_peft(tmp_path, factors, model=model)
    assert reason in outputs_in(tmp_path)["reason"]
    assert "the outputs of the whole model were not compared: " in str(report)


def test_unknown_inputs_are_asked_for_and_taken(tmp_path):
    peft = llama(shortcut="block")
    peft.get_base_model().main_input_name = "something"
    export_peft(tmp_path, merged_factors(peft), model=peft)
    assert "the inputs of LlamaForCausalLM are not known; give some" in outputs_in(tmp_path)["reason"]
    export_peft(tmp_path, merged_factors(peft), model=peft, inputs={"input_ids": torch.tensor([[3, 4, 5]])})
    assert outputs_in(tmp_path)["inputs"] == "input_ids [1, 3]"


def test_an_adapter_of_another_name_takes_what_it_trained_along(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=QV, modules_to_save=["lm_head"])
    peft = trained(LlamaForCausalLM(LlamaConfig(**GROUPED)), config, name="mine")
    factors = adapter_factors(peft, "mine")
    export_peft(tmp_path, factors, model=peft, dtype=torch.float32, adapter_name="mine")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    assert outputs_in(tmp_path).get("error", 1) < 1e-4, outputs_in(tmp_path)


def test_what_was_trained_by_hand_is_not_lost_without_a_word(tmp_path):
    """An unfrozen norm is in no folder of PEFT: the factors alone compute something else."""
    peft = llama(shortcut="block")
    peft.get_base_model().model.norm.weight.requires_grad = True
    with pytest.raises(ValueError, match=r"model\.norm\.weight are trained .* modules_to_save"):
        export_peft(tmp_path / "out", merged_factors(peft), model=peft)
    assert not (tmp_path / "out").exists()
