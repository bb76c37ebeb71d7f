"""YAML of axolotl and of LLaMA-Factory: each key becomes an option of ours or is answered."""

import json

import pytest
import yaml

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
        "neftune_noise_alpha": 5,
        "chat_template": "chatml",
        "nonsense": 1,
    }
    file |= {"datasets": [{"path": "a", "type": "alpaca"}, {"path": "b", "type": "alpaca"}], "adapter": "llama-adapter"}
    problems = "\n".join(translate(file).problems)
    for part in (
        "rl: preferences",
        "neftune",
        "got 'chatml', wanted tokenizer_default",
        "nonsense: is not",
    ):
        assert part in problems
    assert "datasets: got 2, wanted one" in problems
    assert "adapter: got 'llama-adapter', wanted lora or qlora" in problems
    del file["adapter"]
    assert "trains the whole model" in "\n".join(translate(file).problems)
    dpo = translate({"stage": "dpo", "dataset": "none_such", "pissa_init": True})
    assert [part in problem for part, problem in zip(("stage", "dataset", "pissa_init"), dpo.problems, strict=True)]


def test_a_file_of_our_own_stays_one():
    assert translate({"model_name_or_path": "a", "rank": 8}) is None


@pytest.mark.parametrize("names", [AXOLOTL, FACTORY])
def test_what_keys_become_are_options_that_exist(names):
    known = facts_of(LlmOptions).keys() | facts_of(TrainingOptions).keys()
    assert set(names.values()) <= known
    answered = {*REFUSED, *WITHOUT_EFFECT["axolotl"], *WITHOUT_EFFECT["LLaMA-Factory"]}
    assert not answered & names.keys()
