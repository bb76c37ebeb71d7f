"""The core on language models of every kind it promises: which layers are joined, and that they compute the paper."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from llm_tiny import DECODERS, MODELS, SHORTCUTS, adapted, batch, build, config, naive_reslora, randomise
from reslora_diffusion import ResLoraConfig, attach, calibrate, explain, get_adapter, merged_factors, merged_forward

PREFIX = "base_model.model."
ROLES = {
    "llama": {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
    },
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "bert": {"attention.self.query", "attention.self.key", "attention.self.value"},
    "roberta": {"attention.self.query", "attention.self.value", "attention.output.dense", "output.dense"},
    "t5": {f"{side}.SelfAttention.{p}" for side in ("encoder", "decoder") for p in "qkvo"}
    | {f"decoder.EncDecAttention.{p}" for p in "qkvo"},
}
ROLES |= dict.fromkeys(("qwen2", "qwen3", "mistral", "gemma3"), ROLES["llama"])


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(name)).logits


def forward(model: nn.Module, inputs: dict) -> object:
    return model(**inputs)


@pytest.mark.parametrize("name", MODELS)
def test_every_role_is_one_chain_in_the_order_of_layers(name):
    explanation = explain(adapted(name))
    chains = {chain.role: [site.name for site in chain.sites] for chain in explanation.chains}
    assert set(chains) == ROLES[name]
    for names in chains.values():
        assert len(names) == 3
        assert names == sorted(names)
    assert explanation.links == 2 * len(chains)
    assert all(role in str(explanation) for role in chains)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_the_papers(name, shortcut):
    model = adapted(name, shortcut=shortcut, num_previous=1 if shortcut == "input" else 2).double()
    controller = get_adapter(model)
    chains = [[site.name.removeprefix(PREFIX) for site in chain.sites] for chain in controller.chains]
    scaling = {path.removeprefix(PREFIX): 2.0 for path in controller.sites}
    factors = {
        path.removeprefix(PREFIX): (*(f.detach() for f in controller.factors(path)), scaling[path.removeprefix(PREFIX)])
        for path in controller.sites
    }
    base = build(name).double()
    if "classifier" in dict(base.named_modules()):  # PEFT trains a copy of it
        base.classifier.load_state_dict(model.base_model.model.classifier.modules_to_save["default"].state_dict())
    with naive_reslora(base, factors, chains, shortcut, 2), torch.no_grad():
        expected = base(**batch(name)).logits
    assert (logits(model, name) - logits(base, name)).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-9, atol=1e-9)
    assert not controller.skipped


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load_give_the_same_model(name, tmp_path):
    model = adapted(name, shortcut="middle", num_previous=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True).eval()
    assert get_adapter(loaded).config.shortcut == "middle"
    assert get_adapter(loaded).config.num_previous == 2
    torch.testing.assert_close(logits(loaded, name), logits(model, name), rtol=0, atol=0)
    assert any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_disabled_adapter_is_the_base_and_several_can_be_switched(name):
    model = adapted(name, shortcut="input")
    base = logits(build(name), name)
    first = logits(model, name)
    model.add_adapter("other", config(name, shortcut="block", num_previous=2))
    randomise(model, seed=7)
    model.set_adapter("default")
    again = logits(model, name)
    model.set_adapter("other")
    second = logits(model, name)
    with model.disable_adapter():
        plain = logits(model, name)
    assert (first - base).abs().max() > 1e-3
    assert (second - again).abs().max() > 1e-3
    if name not in ("roberta", "bert"):  # whose trained heads were randomised with the adapter
        torch.testing.assert_close(plain, base)
    assert {str(get_adapter(model, n).config.shortcut) for n in ("default", "other")} == {"input", "block"}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unload_computes_what_is_exported(name, shortcut):
    model = adapted(name, shortcut=shortcut, num_previous=1 if shortcut == "input" else 2).double()
    unmerged = logits(model, name)
    calibrate(model, [batch(name, seed) for seed in range(4)], forward)
    with merged_forward(model):
        exported = logits(model, name)
    if shortcut == "block":
        torch.testing.assert_close(exported, unmerged, rtol=1e-8, atol=1e-8)
    ranks = {factors.lora_A.shape[0] for factors in merged_factors(model).values()}
    assert ranks == ({4, 8, 12} if shortcut == "block" else {4})
    merged = model.merge_and_unload()
    assert not any("lora" in key for key in merged.state_dict())
    torch.testing.assert_close(logits(merged, name), exported, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_own_add_adapter(name):
    model = build(name)
    base = logits(model, name)
    model.add_adapter(config(name, shortcut="input", task_type=None))
    randomise(model)
    assert (logits(model, name) - base).abs().max() > 1e-3
    model.disable_adapters()
    torch.testing.assert_close(logits(model, name), base)
    model.enable_adapters()
    assert explain(model).links > 0


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "roberta"])
def test_activation_checkpointing_changes_no_gradient(name, shortcut):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(name, shortcut=shortcut).double().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**batch(name)).logits.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert sum("lora_A" in key for key in gradients[0]) >= 6
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_reentrant_checkpointing_is_refused(shortcut):
    model = adapted("llama", shortcut=shortcut).train()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant. *: *False|non-reentrant"):
        model(**batch("llama")).logits.sum().backward()


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    ).eval()


def test_mixture_of_experts_links_its_attention():
    model = randomise(get_peft_model(mixtral(), ResLoraConfig(r=4, target_modules=["q_proj", "v_proj"]))).eval()
    assert explain(model).links == 4
    assert (logits(model, "llama") - logits(mixtral(), "llama")).abs().max() > 1e-3


class Experts(nn.Module):
    """A layer as mixtures of experts were written before their experts were fused into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        half = len(x) // 2
        return torch.cat([self.experts[0]["up"](x[:half]), self.experts[1]["up"](x[half:])])


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_experts_are_not_linked_and_explain_says_so():
    model = Stack()
    attach(model, ResLoraConfig(r=2, target_modules=["proj", "up"], shortcut="input"))
    randomise(model)(torch.randn(6, 8))
    explanation = explain(model)
    assert explanation.links == 2
    assert {chain.role for chain in explanation.chains if len(chain.sites) > 1} == {"proj"}
    assert "expert" in str(explanation)


@pytest.mark.parametrize("name", DECODERS)
def test_only_factors_are_trained(name):
    model = get_peft_model(build(name), config(name))
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_A." in key or ".lora_B." in key for key in trained)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch(name)).logits, logits(build(name), name))
