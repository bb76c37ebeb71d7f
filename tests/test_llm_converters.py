"""Converters of other programs, which do not run here: what they ask of a folder, and that ours gives the same LoRA.

The rules were read in llama.cpp's `convert_lora_to_gguf.py` (commit 0b03ada) and in mlx-lm's `utils.load_model` (commit
d78bf58e), which its converter reads a merged model with; docs/llm.md says what came out when both were run.
"""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from llm_tiny import adapted, build, config, randomise
from reslora_diffusion import calibrate, merged_factors
from reslora_diffusion.export import export_peft


def as_llama_cpp_reads(folder) -> dict[str, torch.Tensor]:
    """Deltas of the weights by name: B A lora_alpha / rank, the rank being that of each tensor, one alpha for all."""
    parameters = json.loads((folder / "adapter_config.json").read_text())
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        kind = "A" if ".lora_A.weight" in name else "B"
        assert ".lora_A.weight" in name or ".lora_B.weight" in name, f"{name}: the converter ends here"
        base = name.replace("base_model.model.", "").replace(f".lora_{kind}.weight", ".weight")
        pairs.setdefault(base, {})[kind] = tensor.float()
    alpha = float(parameters["lora_alpha"])
    return {name: pair["B"] @ pair["A"] * (alpha / pair["B"].shape[1]) for name, pair in pairs.items()}


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_llama_cpp_scales_our_factors_as_peft_does(shortcut, use_rslora, tmp_path):
    settings = config("llama", shortcut=shortcut, num_previous=1, use_rslora=use_rslora)
    model = randomise(get_peft_model(build("llama"), settings)).eval()
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
    calibrate(model, [{"input_ids": row[None]} for row in ids], lambda model, batch: model(**batch))
    factors = merged_factors(model)
    export_peft(tmp_path, factors, base_model="a/b", dtype=torch.float32, model=model)
    found = as_llama_cpp_reads(tmp_path)
    assert found.keys() == {f"{name}.weight" for name in factors}
    for name, f in factors.items():
        wanted = f.scaling * f.lora_B.double() @ f.lora_A.double()
        torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-4, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/b"


def test_names_of_our_tensors_are_those_of_the_base(tmp_path):
    model = adapted("llama", shortcut="block")
    export_peft(tmp_path, merged_factors(model), dtype=torch.float32, model=model)
    base = dict(build("llama").named_parameters())
    for name, delta in as_llama_cpp_reads(tmp_path).items():
        assert base[name].shape == delta.shape


def test_a_merged_model_is_what_mlx_reads(tmp_path):
    """config.json without a quantisation, and weights in model*.safetensors, under the names of the model."""
    model = adapted("llama", shortcut="block").merge_and_unload()
    model.save_pretrained(tmp_path)
    weights = {name for file in tmp_path.glob("model*.safetensors") for name in load_file(file)}
    assert weights == {name for name, _ in build("llama").named_parameters()}
    assert not json.loads((tmp_path / "config.json").read_text()).keys() & {"quantization", "quantization_config"}


def test_llama_cpp_refuses_whole_modules_and_the_export_says_so(tmp_path):
    settings = config("llama", shortcut="block", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = randomise(get_peft_model(build("llama"), settings)).eval()
    model.get_base_model().model.embed_tokens.modules_to_save["default"].weight.data += 0.1
    report = export_peft(tmp_path, merged_factors(model), dtype=torch.float32, model=model)
    assert "vLLM and llama.cpp take factors alone" in str(report)
    with pytest.raises(AssertionError, match=r"embed_tokens\.weight: the converter ends here"):
        as_llama_cpp_reads(tmp_path)
