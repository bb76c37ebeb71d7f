"""The embedded language model: its problems, its recipe, and what is shipped."""

import ast
import json
import operator
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_tiny import ROOT, load_script
from reslora_diffusion.llm.encoding import encode, encode_prompt
from reslora_diffusion.llm.tasks import TASKS, read_number, usable

problems = load_script("word_problems")
recipe = load_script("pretrain_tiny_llm")
ASSET = ROOT / "assets" / "tiny-llm"
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def worked_out(node: ast.expr) -> float:
    """An equation's value by Python's own grammar."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](worked_out(node.left), worked_out(node.right))
    return ast.literal_eval(node)


def value_of(equation: str) -> float:
    return worked_out(ast.parse(equation, mode="eval").body)


def test_answers_are_the_values_of_their_equations():
    rng = random.Random(1)
    for _ in range(300):
        for question, answer in (problems.pretraining_problem(rng), problems.bare_sum(rng)):
            assert "{" not in question
            assert value_of(answer.split(". The")[0]) == float(read_number(answer))
    for row in problems.held_out_split("test"):
        assert value_of(row["Equation"]) == float(row["Answer"])
        assert 1 <= int(row["Answer"]) <= 144
        numbers = {word.strip(".,") for word in row["Equation"].split() if word.isdecimal()} - {"1"}
        assert numbers <= {word.strip(".,?") for word in f"{row['Body']} {row['Question']}".split()}


def test_no_sentence_of_the_held_out_task_is_in_pretraining():
    def sentences(text: str) -> set[str]:
        return {part.strip() for part in text.replace("?", ".").split(".") if part.strip()}

    known = set().union(*(sentences(template.text) for template in problems.PRETRAINING))
    new = set().union(*(sentences(story.body) for story in problems.HELD_OUT))
    new |= {question.strip("?") for story in problems.HELD_OUT for question, _, _ in story.questions}
    assert len(new) > 30
    assert not known & new


def test_splits_share_no_problem_and_do_not_change():
    splits = {name: problems.held_out_split(name) for name in problems.SPLITS}
    assert {name: len(rows) for name, rows in splits.items()} == problems.SPLITS
    seen = [row["Body"] + row["Question"] for rows in splits.values() for row in rows]
    assert len(set(seen)) == len(seen)
    assert splits["test"] == problems.held_out_split("test")
    assert splits["test"] != problems.held_out_split("test", seed=1)
    assert usable(TASKS["svamp"], splits["train"], "train")[1] == []


def test_documentation_strings_are_many_and_different():
    texts = recipe.documentation_strings()
    assert len(texts) > 3000
    assert len(set(texts)) == len(texts)
    assert all(len(text) > 40 for text in texts)


def arguments(folder, *more: str):
    words = ["--work_dir", str(folder / "work"), "--output_dir", str(folder / "model"), "--batch_size", "2"]
    return [*words, "--checkpointing_minutes", "0", "--problems", "4", "--device", "cpu", *more]


def test_a_killed_recipe_ends_like_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "documentation_strings", lambda: ["Return the sum of a sequence of numbers. " * 3])
    recipe.main(arguments(tmp_path / "whole", "--steps", "4"))
    saved = []
    save = recipe.save_training_state

    def save_twice(*args, **kwargs):
        saved.append(save(*args, **kwargs))
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "save_training_state", save_twice)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments(tmp_path / "parts", "--steps", "4"))
    assert not (tmp_path / "parts" / "model" / "model.safetensors").exists()
    monkeypatch.setattr(recipe, "save_training_state", save)
    recipe.main(arguments(tmp_path / "parts", "--steps", "4"))
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert value.dtype == torch.float16
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
    text = (tmp_path / "parts" / "model" / "README.md").read_text()
    for part in ("--steps 4", "processor time", "exact match on the held-out task", "Llama"):
        assert part in text


# ------------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForCausalLM.from_pretrained(ASSET), AutoTokenizer.from_pretrained(ASSET)


def test_shipped_files_are_small_and_the_task_is_the_generated_one():
    assert sum(file.stat().st_size for file in ASSET.rglob("*") if file.is_file()) < 10e6
    for split in problems.SPLITS:
        lines = (ASSET / "word_problems" / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == problems.held_out_split(split)


def test_shipped_model_is_a_llama_in_single_precision(shipped):
    model, tokenizer = shipped
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.num_hidden_layers == 8
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer)


def test_shipped_tokenizer_splits_numbers_and_forgets_nothing(shipped):
    tokenizer = shipped[1]
    text = 'Żółw  has 1234 shells;\n\t"quoted" — ok.'
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("1234", add_special_tokens=False).input_ids)
    assert pieces == ["1", "2", "3", "4"]
    talk = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "( 2 + 2 ). The answer is 4."}]
    example = encode(talk, tokenizer)
    assert tokenizer.decode(example["input_ids"]) == "<s>Question: 2 + 2\nAnswer: ( 2 + 2 ). The answer is 4.</s>"
    prompt = encode_prompt(talk[:1], tokenizer)
    assert example["input_ids"][: len(prompt)] == prompt


def test_shipped_model_knows_its_problems_and_not_the_held_out_ones(shipped):
    model, tokenizer = shipped
    figures = json.loads((ASSET / "evaluation.json").read_text())["exact_match"]
    settings = recipe.parse_args(["--problems", "60"])
    for name, questions, low, high in (
        ("like_pretraining", recipe.pretraining_questions(tokenizer, settings), 0.6, 1.0),
        ("held_out_test", recipe.held_out_questions(tokenizer, settings), 0.0, 0.25),
    ):
        found = recipe.evaluate_generations(model, tokenizer, questions, read_number, max_new_tokens=40, batch_size=60)
        assert low <= found.exact_match <= high
        assert low <= figures[name]["exact_match"] <= high


@pytest.mark.slow
def test_the_demo_in_its_shortest_form(tmp_path):
    load_script("demo_llm").main(["--num_train_epochs", "1", "--output_dir", str(tmp_path)])
    figures = json.loads((tmp_path / "demo.json").read_text())
    for run in figures["runs"].values():
        same, of = map(int, run["same_responses_after_reload"].split(" of "))
        assert same >= 0.99 * of
        assert run["exact_match"] > figures["base_exact_match"]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
