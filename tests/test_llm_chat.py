"""`reslora chat`, `reslora evaluate` and what is asked of a base and an adapter before their weights are read."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from llm_tiny import GROUPED, ROOT, randomise
from reslora_diffusion import ResLoraConfig
from reslora_diffusion.cli import app
from reslora_diffusion.llm.adapters import Pair
from reslora_diffusion.llm.chat import Chat
from reslora_diffusion.llm.generation import generate
from reslora_diffusion.utils.problems import BadInput

FOLDER = ROOT / "assets" / "tiny-llm"
QUESTION = "Tom has 12 pens and gets 7 more. How many pens does Tom have now?"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    model = randomise(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")))
    model.save_pretrained(folder := tmp_path_factory.mktemp("lora"))
    return folder


def test_base_and_adapter_answer_side_by_side(adapter):
    shown = CliRunner().invoke(
        app, ["chat", str(FOLDER), str(adapter), "--message", QUESTION, "--max_new_tokens", "12"]
    )
    assert shown.exit_code == 0, shown.output
    model, tokenizer = Pair(str(FOLDER), str(adapter)).load("cpu")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    ids = ids["input_ids"] if hasattr(ids, "keys") else ids
    with_adapter = generate(model, tokenizer, [ids], max_new_tokens=12)[0]
    with model.disable_adapter():
        alone = generate(model, tokenizer, [ids], max_new_tokens=12)[0]
    assert with_adapter != alone
    found = Chat(model, tokenizer, max_new_tokens=12).ask(QUESTION)
    assert found == {"base": alone, "adapter": with_adapter}
    row = next(line for line in shown.output.splitlines() if alone[:10] in line)
    assert with_adapter.split()[0] in row


def test_each_has_a_conversation_of_its_own(adapter):
    model, tokenizer = Pair(str(FOLDER), str(adapter)).load("cpu")
    talk = Chat(model, tokenizer, max_new_tokens=4)
    first = talk.ask(QUESTION)
    talk.ask("And then?")
    for name, messages in talk.talks.items():
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        assert messages[1]["content"] == first[name]
    talk.start_again()
    assert talk.talks == {"base": [], "adapter": []}


def test_an_unmerged_checkpoint_answers_too(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    config = ResLoraConfig(r=2, target_modules="all-linear", shortcut="middle", task_type="CAUSAL_LM")
    model = randomise(get_peft_model(model, config)).eval()
    model.save_pretrained(tmp_path)
    loaded, _ = Pair(str(FOLDER), str(tmp_path)).load("cpu")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_an_adapter_for_another_base_is_refused_before_weights(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    narrow = LlamaForCausalLM(LlamaConfig(**GROUPED | {"hidden_size": 16, "num_hidden_layers": 1}))
    narrow.save_pretrained(tmp_path / "narrow")
    found = list(Pair(str(tmp_path / "narrow"), str(adapter)).problems())
    assert len(found) == 2
    assert "is for another base" in found[0]
    assert "has no model.layers.1." in found[0]
    assert "of the base (" in found[1]
    shown = CliRunner().invoke(app, ["chat", str(tmp_path / "narrow"), str(adapter), "--message", "a"])
    assert shown.exit_code == 2
    assert "2 problems" in shown.output
    assert not list(Pair(str(FOLDER), str(adapter)).problems())


def test_all_that_is_wrong_with_a_pair_comes_together(adapter, tmp_path):
    found = list(Pair("./nowhere", str(tmp_path / "none" / "at" / "all"), "int4").problems())
    assert [part in problem for part, problem in zip(("--dtype", "no such folder", "is no folder"), found, strict=True)]
    shutil.copytree(adapter, tmp_path / "odd")
    (tmp_path / "odd" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    assert list(Pair(str(FOLDER), str(tmp_path / "odd")).problems()) == [
        f"{tmp_path / 'odd'}: is of type LOHA, wanted LORA or RESLORA"
    ]
    (tmp_path / "odd" / "adapter_config.json").write_text("[")
    assert "cannot be read" in next(Pair(str(FOLDER), str(tmp_path / "odd")).problems())
    with pytest.raises(BadInput):
        Pair(str(FOLDER), str(tmp_path / "odd")).load()


def test_lm_evals_tasks_measure_both(adapter, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"text": f"{a} + {b} is", "choices": [str(a + b), "no"], "label": 0} for a in range(3) for b in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: tiny_sums\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: label\ndoc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    words = ["evaluate", str(FOLDER), str(adapter), "--tasks", "tiny_sums", "--include_path", str(tmp_path)]
    shown = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "scores.json")])
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "scores.json").read_text())["tiny_sums"]
    assert found.keys() == {"acc,none", "acc_stderr,none"}  # and nothing that only describes the task
    scores = found["acc,none"]
    assert scores.keys() == {"base", "adapter"}
    assert all(0 <= value <= 1 for value in scores.values())


def test_evaluation_says_what_is_missing(adapter, monkeypatch):
    shown = CliRunner().invoke(app, ["evaluate", "./nowhere", str(adapter), "--tasks", " "])
    assert shown.exit_code == 2
    assert "./nowhere: there is no such folder" in shown.output
    assert "--tasks: got nothing" in shown.output


def test_scores_that_could_not_be_written_are_refused_first(adapter, tmp_path):
    words = ["evaluate", str(FOLDER), str(adapter), "--tasks", "tiny_sums"]
    for output in (tmp_path, tmp_path / "nowhere" / "scores.json"):
        shown = CliRunner().invoke(app, [*words, "--output", str(output)])
        assert shown.exit_code == 2
        assert "cannot be written" in shown.output


def test_a_question_and_its_answer_share_the_tokens_that_there_are(adapter):
    model, tokenizer = Pair(str(FOLDER), str(adapter)).load("cpu")
    short, long = [5, 6, 7], [5, 6, 7, 8, 9]
    found = generate(model, tokenizer, [short, long, [5] * 9], max_new_tokens=6, max_total_tokens=7)
    wanted = [generate(model, tokenizer, [prompt], max_new_tokens=7 - len(prompt))[0] for prompt in (short, long)]
    assert found == [*wanted, ""]
    assert len(set(found)) == 3
