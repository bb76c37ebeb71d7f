"""Generation with shortcuts: the key-value cache, left padding, batches, beams, and what is exported."""

import json

import pytest
import torch
from safetensors.torch import save_file

from forks import run_forked
from llm_tiny import DECODERS, SHORTCUTS, adapted, batch, build, config
from reslora_diffusion import calibrate, get_adapter, merged_factors, merged_forward
from reslora_diffusion.export import export_peft

PROMPTS = [[1, 11, 12, 13, 14, 15, 16], [1, 21, 22], [1, 31, 32, 33, 34]]
NEW = 8


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def generate(model, prompts: list[list[int]] = PROMPTS, **kwargs) -> torch.Tensor:
    inputs = padded(prompts)
    model.generation_config.eos_token_id = None  # so that all are equally long
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :]


def step_by_step(model, prompt: list[int]) -> list[int]:
    """Greedy decoding of one prompt that runs the whole text through the model for every token."""
    ids = torch.tensor([prompt])
    for _ in range(NEW):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", DECODERS)
def test_cached_generation_is_uncached_generation(name, shortcut):
    model = adapted(name, shortcut=shortcut, num_previous=1 if shortcut == "input" else None).double()
    cached = generate(model, use_cache=True)
    assert cached.tolist() == generate(model, use_cache=False).tolist()
    assert cached.tolist() == [step_by_step(model, prompt) for prompt in PROMPTS]  # the padding on the left is not seen
    with model.disable_adapter():
        assert cached.tolist() != generate(model).tolist()
    assert not get_adapter(model).skipped


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_logits_of_a_long_prompt_and_then_single_tokens(shortcut):
    model = adapted("llama", shortcut=shortcut).double()
    ids = batch("llama", tokens=12)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        out = model(input_ids=ids[:, :9], use_cache=True)
        parts = [out.logits]
        for position in range(9, 12):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beam_search_of_a_batch_is_that_of_each_prompt(name, shortcut):
    model = adapted(name, shortcut=shortcut).double()
    together = generate(model, num_beams=3, use_cache=True)
    assert together.tolist() == generate(model, num_beams=3, use_cache=False).tolist()
    assert together.tolist() == [generate(model, [prompt], num_beams=3)[0].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_other_ways_to_the_same_greedy_text(shortcut):
    model = adapted("llama", shortcut=shortcut).double()
    greedy = generate(model).tolist()
    assert generate(model, cache_implementation="static").tolist() == greedy
    alone = generate(model, PROMPTS[:1]).tolist()
    assert generate(model, PROMPTS[:1], prompt_lookup_num_tokens=2).tolist() == alone
    assert generate(model, PROMPTS[:1], assistant_model=build("llama").double()).tolist() == alone


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_each_of_two_adapters_generates_as_if_it_were_alone(shortcut):
    model = adapted("llama", shortcut=shortcut).double()
    first = generate(model).tolist()
    model.add_adapter("other", config("llama", shortcut="block"))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.double().set_adapter("other")
    second = generate(model).tolist()
    model.set_adapter("default")
    assert generate(model).tolist() == first
    with model.disable_adapter():
        assert generate(model).tolist() == generate(build("llama").double()).tolist()
    model.delete_adapter("default")
    model.set_adapter("other")
    assert generate(model).tolist() == second != first


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_encoder_decoder_generates_with_its_cache(shortcut):
    model = adapted("t5", shortcut=shortcut).double()
    ids = torch.tensor([[11, 12, 13, 14, 2], [21, 22, 2, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": NEW, "do_sample": False}
    cached = model.generate(**inputs, use_cache=True)
    assert cached.tolist() == model.generate(**inputs, use_cache=False).tolist()
    assert model.generate(**inputs, num_beams=2).shape[0] == 2
    with model.disable_adapter():
        assert cached.tolist() != model.generate(**inputs).tolist()


LOADER = """
import json, sys
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

root = Path(root)
inputs = load_file(root / "inputs.safetensors")
base = AutoModelForCausalLM.from_pretrained
found = {}
for shortcut in shortcuts:
    models = {
        "adapter": PeftModel.from_pretrained(base(root / "base"), root / shortcut / "adapter").eval(),
        "merged": base(root / shortcut / "merged").eval(),
    }
    found[shortcut] = {}
    for kind, model in models.items():
        model.generation_config.eos_token_id = None
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        found[shortcut][kind] = out.tolist()
    try:
        PeftModel.from_pretrained(base(root / "base"), root / shortcut / "unmerged")
    except KeyError as error:
        found[shortcut]["refusal"] = str(error)
assert not any(name.startswith("reslora") for name in sys.modules)
print(json.dumps(found))
"""


def test_merged_and_exported_models_generate_alike_without_this_package(tmp_path):
    inputs, expected = padded(PROMPTS), {}
    build("llama").save_pretrained(tmp_path / "base")
    for shortcut in SHORTCUTS:
        folder = tmp_path / shortcut
        model = adapted("llama", shortcut=shortcut)
        calibrate(model, [batch("llama", seed) for seed in range(4)], lambda model, inputs: model(**inputs))
        with merged_forward(model):
            expected[shortcut] = generate(model).tolist()
        model.save_pretrained(folder / "unmerged")
        export_peft(folder / "adapter", merged_factors(model), dtype=torch.float32, model=model)
        model.merge_and_unload().save_pretrained(folder / "merged")
    save_file(inputs, tmp_path / "inputs.safetensors")
    run = run_forked(f"root, shortcuts = {str(tmp_path)!r}, {SHORTCUTS!r}\n{LOADER}")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    prompt = inputs["input_ids"].shape[1]
    assert len({str(tokens) for tokens in expected.values()}) == 3
    for shortcut in SHORTCUTS:
        for kind in ("adapter", "merged"):
            assert [row[prompt:] for row in found[shortcut][kind]] == expected[shortcut]
        assert "RESLORA" in found[shortcut]["refusal"]
