"""What files and adapters may be called, the same everywhere."""

import unicodedata

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llm_tiny import GROUPED
from reslora_diffusion import ResLoraConfig, attach
from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.export import export_lora, read_lora
from reslora_diffusion.utils.names import LONGEST, adapter_name_problem, file_name_from, file_name_problem

COMPONENTS = {
    "unet": {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": LoraFactors(torch.ones(2, 8), torch.ones(8, 2), 1)
    }
}


@pytest.mark.parametrize("name", ["panda", "panda-v1.2", "Möwe", "熊猫", "панда_2", "2nd", "a" * LONGEST])
def test_names_of_files(tmp_path, name):
    assert file_name_problem(name) is None
    assert file_name_from(name) == name
    export_lora(tmp_path, COMPONENTS, name=name)
    assert read_lora(tmp_path / "kohya" / f"{name}.safetensors").components


@pytest.mark.parametrize(
    "name",
    ["", ".hidden", "-rf", "a/b", "a:b", "a>b", "a b", "a\nb", "a\x1b", "a.", "NUL", "com1.x", "é" * LONGEST, "🐼"],
)
def test_names_that_no_file_gets(tmp_path, name):
    assert file_name_problem(name)
    assert not file_name_problem(file_name_from(name))
    with pytest.raises(ValueError, match=r"^this LoRA cannot be exported:"):
        export_lora(tmp_path / "out", COMPONENTS, name=name)
    assert not (tmp_path / "out").exists()


def test_one_form_of_unicode(tmp_path):
    """macOS decomposes names of files; the same word typed is composed."""
    decomposed = unicodedata.normalize("NFD", "Möwe")
    assert decomposed != "Möwe"
    assert file_name_from(decomposed) == "Möwe"
    export_lora(tmp_path, COMPONENTS, name=decomposed)
    assert [path.name for path in (tmp_path / "kohya").iterdir()] == ["Möwe.safetensors"]


@pytest.mark.parametrize("name", ["", "a.b", "lora_A", "a\x1bb"])
def test_names_of_adapters(name):
    model = LlamaForCausalLM(LlamaConfig(**GROUPED))
    config = ResLoraConfig(target_modules=["q_proj"])
    assert adapter_name_problem(name)
    for door in (lambda: attach(model, config, name), lambda: get_peft_model(model, config, name)):
        with pytest.raises(ValueError, match="adapter name: got"):
            door()
    attach(LlamaForCausalLM(LlamaConfig(**GROUPED)), config, "my adapter, 2")
