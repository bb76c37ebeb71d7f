"""Quantised bases: shortcuts over layers whose weights are not floats, by each back-end that is installed, and the
script's options for them."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm_tiny import GROUPED, ROOT, SHORTCUTS, batch, config, load_script, randomise
from reslora_diffusion import calibrate, explain, get_adapter, merged_factors, merged_forward
from reslora_diffusion.export import export_peft
from reslora_diffusion.export.outputs import packed_unit
from reslora_diffusion.llm.checks import option_problems
from reslora_diffusion.llm.methods import schedule_problems
from reslora_diffusion.llm.model_checks import stored_problems
from reslora_diffusion.llm.options import LlmOptions
from reslora_diffusion.llm.quantising import quantisation
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.problems import BadInput


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
    assert not get_adapter(model).skipped
    fitted = merged_factors(model)
    get_adapter(model).config.merge_method = "paper_weight"  # needs norms of the base's weights
    by_weight = merged_factors(model)
    assert all(f.lora_A.isfinite().all() for f in by_weight.values())
    if shortcut in ("input", "middle"):
        assert not all(torch.equal(f.lora_A, fitted[name].lora_A) for name, f in by_weight.items())
    get_adapter(model).config.merge_method = "least_squares"
    export_peft(tmp_path, fitted, dtype=torch.float32, model=model)
    model.eval()
    with torch.no_grad():
        with merged_forward(model):
            expected = model(**batch("llama")).logits
        loaded = PeftModel.from_pretrained(quantise(wide_llama()), tmp_path).eval()
        found = loaded(**batch("llama")).logits
        if packed_unit(model):  # in bfloat16: other sums of the same factors round differently
            with model.disable_adapter():
                effect = (model(**batch("llama")).logits - expected).norm()
            assert (found - expected).norm() < 0.05 * effect
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_script_trains_beside_a_rounded_base(backend, bits, tmp_path):
    pytest.importorskip(backend)
    if (backend, bits) == ("torchao", 4) and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    wide_llama().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a} + {b}", "response": str(a + b)} for a in range(4) for b in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    script = load_script("train_llm_reslora")
    folder = ROOT / "assets" / "tiny-llm"
    words = [f"--model_name_or_path={folder}", f"--dataset_name={tmp_path / 'rows.jsonl'}", "--max_steps=3"]
    words += [f"--output_dir={tmp_path / 'out'}", f"--load_in_{bits}bit=true", f"--quantized_by={backend}"]
    words += ["--warmup_steps=0", "--learning_rate=1e-2", "--rank=2", "--disable_tqdm=true", "--dtype=bfloat16"]
    output = script.main([*words, "--dataloader_pin_memory=false", "--export_dtype=float32"])
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"
    held = json.loads((output / "run.json").read_text())["held_in"]
    assert held["trained"] == "float32"
    assert "int8" in held["frozen"] or backend == "torchao"
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), output)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        moved = loaded(ids).logits
        with loaded.disable_adapter():
            assert (loaded(ids).logits - moved).abs().max() > 1e-3


def test_four_bits_are_those_of_qlora():
    pytest.importorskip("bitsandbytes")
    found = quantisation(LlmOptions(load_in_4bit=True, dtype="bfloat16"))
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("nf4", True)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantisation(LlmOptions()) is None


def test_what_cannot_be_quantised_is_said_at_once(tmp_path):
    def problems(**options):
        return "\n".join(option_problems(LlmOptions(model_name_or_path=str(tmp_path), **options)))

    assert "got both, wanted one" in problems(load_in_4bit=True, load_in_8bit=True)
    assert "does nothing without" in problems(quantized_by="torchao")
    assert "got 'gptq', wanted bitsandbytes, torchao" in problems(quantized_by="gptq", load_in_4bit=True)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bitsandbytes", {"save_merged_model": True}, "merging would round its weights again"),
        ("gptq", {"load_in_4bit": True}, "is quantised already (gptq); wanted it without"),
        ("awq", {}, "such layers carry no shortcuts; wanted --method lora"),
        ("gptq", {}, None),
    ],
)
def test_a_base_that_is_stored_quantised_is_looked_at_before_its_weights(tmp_path, method, options, message):
    config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = stored_problems(LlmOptions(model_name_or_path=str(tmp_path), **options))
    assert (message in found[0]) if message else not found


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            "restart:merge=true",
            "restart: merge changes the base's weights, and these are quantised and would be rounded",
        ),
        ("prune", "prune: quantised weights cannot be cut into"),
    ],
)
def test_a_method_that_must_merge_into_a_quantised_base_is_refused_before_weights_are_read(
    tmp_path, stored, schedule, message
):
    """It was said once the weights were there; of `prune` it was said that the model had no heads."""
    quantisation = {"quantization_config": {"quant_method": "bitsandbytes"}} if stored else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | quantisation))
    options = LlmOptions(model_name_or_path=str(tmp_path), schedule=schedule, shortcut="none", load_in_4bit=not stored)
    training = TrainingOptions(max_steps=40, load_best_model_at_end=False)
    found = [*schedule_problems(options, training)]
    assert any(message in problem for problem in found), found
    options.load_in_4bit = False
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert not [*schedule_problems(options, training)]


def test_ligers_loss_would_pass_an_adapter_of_the_output_layer_by(tmp_path):
    script = load_script("train_llm_reslora")
    with pytest.raises(BadInput) as caught:
        script.main([f"--output_dir={tmp_path / 'out'}", "--use_liger_kernel=true", "--target_modules=lm_head"])
    assert any("passes its adapter by" in problem for problem in caught.value.problems)
