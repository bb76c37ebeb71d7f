"""Tiny language models built from configuration, and ResLoRA on them written naively with forward hooks."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from reslora_diffusion import ResLoraConfig

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, LAYERS = 64, 3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
ENCODER = COMMON | {"max_position_embeddings": 64, "num_labels": 3}
DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=LAYERS, n_head=4, bos_token_id=1, eos_token_id=2
    )
    config.pad_token_id = 0
    return GPT2LMHeadModel(config)


def t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=LAYERS,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


DECODERS: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)), DECODER_TARGETS),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)), DECODER_TARGETS),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)), DECODER_TARGETS),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8)), DECODER_TARGETS),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, sliding_window=8)), DECODER_TARGETS),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
}
OTHERS = {
    "t5": (t5, ["q", "k", "v", "o"]),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER)), ["query", "value", "output.dense"]),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**ENCODER)), ["query", "key", "value"]),
}
MODELS = DECODERS | OTHERS
SHORTCUTS = ("input", "block", "middle")


def load_script(name: str) -> ModuleType:
    """A program of `train_scripts` as a module; programs import their neighbours by bare names."""
    folder = str(ROOT / "train_scripts")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def build(name: str) -> PreTrainedModel:
    """A model with the same random weights at every call, in evaluation mode."""
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def config(name: str, **kwargs) -> ResLoraConfig:
    task = "SEQ_2_SEQ_LM" if name == "t5" else "SEQ_CLS" if name in ("roberta", "bert") else "CAUSAL_LM"
    return ResLoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": MODELS[name][1], "task_type": task} | kwargs)


def randomise(model: nn.Module, seed: int = 1, size: float = 0.3) -> nn.Module:
    """Factors that make a visible difference."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def adapted(name: str, **kwargs):
    return randomise(get_peft_model(build(name), config(name, **kwargs))).eval()


def batch(name: str, seed: int = 2, tokens: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(seed))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | {"decoder_input_ids": ids[:, :5]} if name == "t5" else inputs


@contextmanager
def naive_reslora(
    model: nn.Module,
    factors: dict[str, tuple[Tensor, Tensor, float]],
    chains: list[list[str]],
    shortcut: str,
    num_previous: int,
) -> Iterator[None]:
    """The paper's formulas as forward hooks on a model without adapters; (A, B, s) by module path."""
    seen: dict[str, Tensor] = {}
    handles = []

    def add(path: str, earlier: list[str]) -> Callable:
        A, B, s = factors[path]

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = seen[path] = args[0]
            window = earlier[-num_previous:]
            if shortcut == "input":
                return output + s * (x + (seen[window[-1]] if window else x)) @ A.T @ B.T
            if shortcut == "block":
                terms = [factors[other] for other in [*window, path]]
                return output + s * sum(x @ a.T @ b.T for a, b, _ in terms)
            return output + s * sum(seen[other] @ factors[other][0].T for other in [*window, path]) @ B.T

        return hook

    for chain in chains:
        for place, path in enumerate(chain):
            handles.append(model.get_submodule(path).register_forward_hook(add(path, chain[:place])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
