"""YAML of axolotl and of LLaMA-Factory: each key becomes an option of ours or is answered."""

import json

import pytest
import yaml

from reslora_diffusion.llm import reading
from reslora_diffusion.llm.options import LlmOptions, parse
from reslora_diffusion.llm.other_programs import AXOLOTL, FACTORY, REFUSED, WITHOUT_EFFECT, translate
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.options import facts_of

AXOLOTL_FILE = """
base_model: NousResearch/Llama-3.2-1B
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, q_proj]
wandb_project:
wandb_entity:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
FACTORY_FILE = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine
dataset_dir: {folder}
template: llama3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""


def read(tmp_path, text: str, *words: str) -> tuple[LlmOptions, TrainingOptions]:
    (tmp_path / "other.yaml").write_text(text)
    return parse(LlmOptions, [f"--config={tmp_path / 'other.yaml'}", *words], {"output_dir": "out"})


def test_axolotls_example_is_understood(tmp_path, capsys):
    options, training = read(tmp_path, AXOLOTL_FILE, "--shortcut", "middle")
    assert training.problems == []
    wanted = {"model_name_or_path": "NousResearch/Llama-3.2-1B", "dataset_name": "teknium/GPT4-LLM-Cleaned", "rank": 16}
    wanted |= {"lora_alpha": 32, "load_in_4bit": True, "packing": True, "max_length": 2048, "drop_long": True}
    wanted |= {"target_modules": ["gate_proj", "down_proj", "q_proj"], "dtype": "bfloat16", "shortcut": "middle"}
    wanted |= {"attn_implementation": "flash_attention_2", "validation_fraction": 0.1, "lora_dropout": 0.05}
    assert {name: getattr(options, name) for name in wanted} == wanted
    wanted = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "optim": "adamw_bnb_8bit", "warmup_steps": 0.1}
    wanted |= {"lr_scheduler_type": "cosine", "eval_steps": 1 / 8, "eval_strategy": "steps", "learning_rate": 2e-4}
    assert {name: getattr(training, name) for name in wanted} == wanted
    said = capsys.readouterr().out
    assert "is a file of axolotl's" in said
    for name in ("model_type", "dataset_prepared_path", "eval_sample_packing", "special_tokens", "bf16"):
        assert f"axolotl's {name}: " in said


def test_llama_factorys_example_is_understood(tmp_path, capsys):
    columns = {"prompt": "question", "query": "given", "response": "answer"}
    info = {"mine": {"file_name": "rows.jsonl", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    options, training = read(tmp_path, FACTORY_FILE.replace("{folder}", str(tmp_path)), "--rank", "4")
    assert training.problems == []
    wanted = {"dataset_name": str(tmp_path / "rows.jsonl"), "rank": 4, "target_modules": ["all-linear"]}
    wanted |= {"columns": {"prompt": "question", "input": "given", "response": "answer"}, "cut_long": True}
    wanted |= {"max_train_examples": 1000, "dtype": "bfloat16"}
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert (training.save_strategy, training.eval_strategy, training.save_steps) == ("steps", "no", 500)
    assert training.load_best_model_at_end is False
    said = capsys.readouterr().out
    for name in ("template 'llama3'", "do_train", "plot_loss", "preprocessing_num_workers"):
        assert f"LLaMA-Factory's {name}: " in said


def test_what_is_not_done_here_is_refused_by_key(tmp_path):
    file = yaml.safe_load(AXOLOTL_FILE) | {
        "rl": "dpo",
        "relora": True,
        "chat_template": "jinja",
        "nonsense": 1,
    }
    sets = [
        {"path": "a", "split": "x"},
        {"path": "b", "type": "own", "field_output": "said", "shards": 3},
        {"type": "alpaca"},
    ]
    file |= {"datasets": sets, "adapter": "llama-adapter", "val_set_size": "much"}
    problems = "\n".join(translate(file).problems)
    for part in (
        "rl: preferences",
        "relora: is not",
        "chat_template: got 'jinja', and only the tokenizer's own is used",
        "datasets: b: got type own, wanted alpaca",
        "datasets: b: shards: not understood",
        "datasets: number 3 has no path",
        "val_set_size: got 'much', which is not understood",
        "nonsense: is not",
    ):
        assert part in problems
    assert "adapter: got 'llama-adapter', wanted lora or qlora" in problems
    del file["adapter"]
    assert "trains the whole model" in "\n".join(translate(file).problems)
    dpo = translate({"stage": "dpo", "dataset": "none_such", "pissa_init": True})
    assert [part in problem for part, problem in zip(("stage", "dataset", "pissa_init"), dpo.problems, strict=True)]
    sets = [{"path": "a", "split": "x", "field_output": "b"}, {"path": "b", "field_output": "said"}]
    problems = "\n".join(translate(file | {"datasets": sets}).problems)
    assert "got x, None as dataset_train_split, wanted one for all" in problems
    assert "response is in column 'b' and 'said', wanted one name" in problems


def test_zero_is_a_value_and_a_share_of_nothing_trains_on_all_rows():
    """Both programs read 0 so; here it counted as not given: 6 % warm-up, and a tenth of the rows set apart."""
    for file in (yaml.safe_load(AXOLOTL_FILE), {"stage": "sft", "model_name_or_path": "a"}):
        share = "val_set_size" if "base_model" in file else "val_size"
        found = translate(file | {"warmup_steps": 0, "warmup_ratio": None, share: 0, "lora_dropout": 0})
        assert (found.values["warmup_steps"], found.values["lora_dropout"]) == (0, 0)
        assert round(found.values["validation_fraction"] * 10**6) == 0
        assert found.values["eval_strategy"] == "no"
        assert found.values["load_best_model_at_end"] is False
        assert "eval_steps" not in found.values
        assert any("all rows but one of a set are learned" in note for note in found.notes)
    assert translate(yaml.safe_load(AXOLOTL_FILE) | {"evals_per_epoch": 0}).values["eval_strategy"] == "no"


@pytest.mark.parametrize(
    ("evaluations", "saves", "epochs", "wanted"),
    [
        (4, 1, 1, {"eval_steps": 0.25, "eval_strategy": "steps", "save_steps": 0.25, "save_strategy": "steps"}),
        (1, 4, 1, {"eval_strategy": "epoch", "save_strategy": "epoch", "save_steps": 0.25}),
        (1, 1, 1, {"eval_strategy": "epoch", "save_strategy": "epoch"}),
        (0.5, 0.5, 2, {"eval_strategy": "epoch", "save_strategy": "epoch"}),
        (None, 1, 1, {"save_strategy": "epoch"}),
        (4, 1, 3, {"eval_steps": 1 / 12, "eval_strategy": "steps", "save_steps": 1 / 3, "save_strategy": "steps"}),
    ],
)
def test_once_in_a_run_is_not_at_every_step(evaluations, saves, epochs, wanted):
    """A share of 1 of all steps is a number of steps to transformers: 1, at each of which it would save."""
    given = {"evals_per_epoch": evaluations, "saves_per_epoch": saves, "num_epochs": epochs}
    values = translate(yaml.safe_load(AXOLOTL_FILE) | given).values
    assert {name: value for name, value in values.items() if name.startswith(("eval_st", "save_st"))} == wanted


def test_defaults_that_decide_what_is_trained_are_those_of_the_program(tmp_path):
    """Read in axolotl's schemas (commit 067b021) and LLaMA-Factory's arguments (ff6d4d1)."""
    bare = "base_model: a\nadapter: lora\nlearning_rate: 2e-4\ndatasets: [{path: rows.jsonl}]\n"
    options, training = read(tmp_path, bare)
    assert training.problems == []
    assert (options.max_length, options.drop_long, options.dataset_name) == (512, True, "rows.jsonl")
    found = [training.per_device_train_batch_size, training.num_train_epochs, training.lr_scheduler_type]
    assert [*found, training.warmup_steps, training.learning_rate, training.seed] == [1, 1, "cosine", 0.03, 2e-4, 42]
    options, training = read(tmp_path, "stage: sft\nmodel_name_or_path: a\n")
    found = [options.rank, options.target_modules, options.max_length, options.cut_long]
    assert found == [8, ["all-linear"], 2048, True]
    assert (training.learning_rate, training.warmup_steps, training.num_train_epochs) == (5e-5, 0, 3)


def test_named_templates_need_a_tokenizer_that_brings_one(tmp_path):
    file = yaml.safe_load(AXOLOTL_FILE) | {"chat_template": "llama3", "base_model": str(tmp_path)}
    assert any("'llama3': the chat template of" in note for note in translate(file).notes)  # nothing there that tells
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert any("chat_template: got 'llama3'" in problem for problem in translate(file).problems)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert not translate(file).problems
    factory = {"stage": "sft", "model_name_or_path": str(tmp_path), "template": "qwen3_nothink"}
    assert any("template 'qwen3_nothink': the chat template of" in note for note in translate(factory).notes)


def test_what_changes_memory_alone_and_what_has_another_name(tmp_path):
    plugins = ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]
    file = yaml.safe_load(AXOLOTL_FILE) | {"plugins": plugins, "cut_cross_entropy": True, "neftune_noise_alpha": 5}
    file |= {"group_by_length": True, "gradient_checkpointing": "offload", "liger_layer_norm": True}
    file["datasets"] = [
        {"path": "a", "split": "train[:10%]", "message_field_role": "from", "message_field_content": "value"}
    ]
    found = translate(file)
    assert found.problems == []
    wanted = {"chunked_loss": True, "neftune_noise_alpha": 5, "train_sampling_strategy": "group_by_length"}
    wanted |= {"gradient_checkpointing": True, "dataset_train_split": "train[:10%]"}
    assert {name: found.values[name] for name in wanted} == wanted
    liger = translate(file | {"plugins": ["axolotl.integrations.liger.LigerPlugin", *plugins]}).values
    assert (liger["use_liger_kernel"], "chunked_loss" in liger) == (True, False)


def test_llama_factorys_two_data_sets_are_learned_together(tmp_path):
    """Its examples say `dataset: identity,alpaca_en_demo`: a file for each, here with columns of other names in one."""
    info = {
        "identity": {"file_name": "identity.json"},
        "talks": {
            "file_name": "talks.json",
            "formatting": "sharegpt",
            "columns": {"messages": "turns", "system": "persona"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    rows = [{"instruction": f"Who are you, {n}?", "input": "", "output": f"I am {n}."} for n in range(5)]
    (tmp_path / "identity.json").write_text(json.dumps(rows))
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    talks = [{"turns": turns, "persona": f"Add {n}."} for n in range(4)]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    text = f"stage: sft\nmodel_name_or_path: a\ndataset: identity,talks\ndataset_dir: {tmp_path}\n"
    options, training = read(tmp_path, text)
    assert training.problems == []
    found = reading.read(options, seed=0)
    assert [len(found.talks[split]) for split in ("train", "validation", "test")] == [7, 2, 0]
    assert len(found.rows["train"]) == 7
    first, last = found.talks["train"][0], found.talks["train"][-1]
    assert first[0]["content"].startswith("Who are you")
    assert [turn["role"] for turn in last] == ["system", "user", "assistant"]
    notes = "\n".join(found.notes)
    assert "identity.json train: 4 rows, read as instruction (instruction, output, input)" in notes
    assert "talks.json train: 3 rows, read as messages (turns, persona)" in notes


def test_a_file_of_our_own_stays_one():
    assert translate({"model_name_or_path": "a", "rank": 8}) is None


@pytest.mark.parametrize("names", [AXOLOTL, FACTORY])
def test_what_keys_become_are_options_that_exist(names):
    known = facts_of(LlmOptions).keys() | facts_of(TrainingOptions).keys()
    assert set(names.values()) <= known
    answered = {*REFUSED, *WITHOUT_EFFECT["axolotl"], *WITHOUT_EFFECT["LLaMA-Factory"]}
    assert not answered & names.keys()
