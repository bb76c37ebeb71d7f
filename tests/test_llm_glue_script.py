"""train_glue_reslora.py from end to end on a tiny RoBERTa, and the shipped configurations of both scripts."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    TrainingArguments,
)

from llm_tiny import ROOT, load_script
from reslora_diffusion.llm import checks, reading
from reslora_diffusion.llm.glue import GLUE, task_problems
from reslora_diffusion.llm.options import GlueOptions, LlmOptions, parse, training_arguments
from reslora_diffusion.llm.tasks import TASKS
from reslora_diffusion.utils.problems import BadInput

script = load_script("train_glue_reslora")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers about names that it still accepts
WORDS = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghij"]
CONFIGS = sorted((ROOT / "train_scripts" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    RobertaModel(
        RobertaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=40,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    return folder


def write_task(folder: Path, name: str, count: int = 40) -> Path:
    """Rows in the task's columns; the label says whether the first text begins with an early letter."""
    task, rng = GLUE[name], random.Random(0)
    folder.mkdir()
    for split in ("train", *task.reported):
        rows = []
        for _ in range(count):
            texts = [" ".join(rng.choices("abcdefghij", k=5)) for _ in task.columns]
            place = "abcdefghij".index(texts[0][0])
            label = place / 2 if task.num_labels == 1 else place * task.num_labels // 10
            rows.append(dict(zip(task.columns, texts, strict=True)) | {"label": label, "idx": len(rows)})
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def words(base: Path, task: str, data: Path, output: Path, **options) -> list[str]:
    defaults = {
        "model_name_or_path": base,
        "task_name": task,
        "dataset_name": data,
        "output_dir": output,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "shortcut": "middle",
        "num_previous": 2,
        "max_length": 30,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "export_dtype": "float32",
    }
    return [f"--{name}={value}" for name, value in (defaults | options).items()]


@pytest.mark.parametrize("task", ["cola", "stsb", "mnli"])
def test_a_task_is_learned_and_exported_with_its_head(base, tmp_path, task):
    data = write_task(tmp_path / "data", task)
    output = script.main(words(base, task, data, tmp_path / "out"))
    results = json.loads((output / "results.json").read_text())
    assert results["as exported"].keys() == set(GLUE[task].reported)
    assert all(metrics.keys() == set(GLUE[task].metrics) for metrics in results["as exported"].values())
    chosen = [
        row for row in json.loads((output / "history.json").read_text()) if f"eval_{GLUE[task].metrics[0]}" in row
    ]
    best = max(chosen, key=lambda row: row[f"eval_{GLUE[task].metrics[0]}"])
    assert (results["best_step"], results["best_metric"]) == (best["step"], best[f"eval_{GLUE[task].metrics[0]}"])
    assert json.loads((output / "run.json").read_text())["examples"] == {"train": 36, "validation": 4}
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["modules_to_save"]) == ("LORA", "SEQ_CLS", ["classifier"])

    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=GLUE[task].num_labels)
    loaded = PeftModel.from_pretrained(plain, output).eval()
    rows = [json.loads(line) for line in (data / f"{GLUE[task].reported[0]}.jsonl").read_text().splitlines()]
    texts = [[row[column] for row in rows] for column in GLUE[task].columns]
    inputs = AutoTokenizer.from_pretrained(base)(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = loaded(**inputs).logits.numpy()
    found = script.measure(GLUE[task], logits, np.array([row["label"] for row in rows]))
    assert found == pytest.approx(results["as exported"][GLUE[task].reported[0]], abs=1e-6)


def test_plain_lora_and_block(base, tmp_path):
    data = write_task(tmp_path / "data", "rte")
    options = {"num_train_epochs": 1}
    lora = words(base, "rte", data, tmp_path / "lora", method="lora", **options)
    script.main([word for word in lora if not word.startswith(("--shortcut", "--num_previous"))])
    block = script.main(words(base, "rte", data, tmp_path / "block", **options | {"shortcut": "block"}))
    results = json.loads((block / "results.json").read_text())
    assert results["as trained"] == results["as exported"]
    assert "as trained" not in json.loads((tmp_path / "lora" / "results.json").read_text())


def test_bad_input(base, tmp_path):
    data = write_task(tmp_path / "data", "mrpc")

    def problems(**options) -> str:
        with pytest.raises(BadInput) as caught:
            script.main(words(base, "mrpc", data, tmp_path / "out", **options))
        return str(caught.value)

    assert "--task_name: got 'sst'" in problems(task_name="sst")
    assert "no 'question1' in row" in problems(task_name="qqp")
    assert "has no split 'validation_matched'" in problems(task_name="mnli")
    assert "'q_proj' matches nothing; the model has" in problems(target_modules="q_proj")
    assert "wanted at most 40" in problems(max_length=50)
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps({"sentence1": "a", "sentence2": "b", "label": -1}) + "\n")
    assert "label -1 in row 41 (rows 41), wanted a number from 0 to 1" in problems()


# ------------------------------------------------------------------------------------- shipped configurations


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configurations_parse_and_pass_the_checks(file):
    glue = file.stem.startswith("glue")
    extra = ["--task_name=rte", "--output_dir=out"] if glue and "mnli" not in file.stem else []
    kind, defaults = (GlueOptions, script.DEFAULTS) if glue else (LlmOptions, load_script("train_llm_reslora").DEFAULTS)
    options, values = parse(kind, [f"--config={file}", *extra], defaults)
    problems = checks.option_problems(options) + checks.training_problems(values, options)
    assert problems + (task_problems(options) if glue else reading.option_problems(options)) == []
    training = training_arguments(values)
    assert isinstance(training, TrainingArguments)
    assert (options.rank, options.lora_dropout, training.weight_decay) == (4, 0.1, 0.1)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 128
    assert (options.lora_alpha, training.learning_rate) == ((16, 3e-4) if glue else (8, 1e-4))
    assert file.read_text().startswith("# ResLoRA's paper")


def test_there_is_a_configuration_for_every_task_of_the_paper():
    assert {file.stem for file in CONFIGS} == {
        "glue_roberta_large",
        "glue_roberta_large_mnli",
        *(f"{task}_llama2_7b" for task in TASKS if TASKS[task].source),
    }


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_ram_efficient", "deepspeed_zero3"])
def test_accelerate_reads_its_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file

    file = ROOT / "train_scripts" / "configs" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == 8
    assert str(config.distributed_type).endswith("FSDP" if "fsdp2" in name else "DEEPSPEED")
    assert yaml.safe_load(file.read_text())["compute_environment"] == "LOCAL_MACHINE"
