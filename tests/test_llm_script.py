"""train_llm_reslora.py from end to end on a tiny model: what it writes, how it resumes, what it refuses."""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from hub import Hub
from llm_tiny import load_script
from reslora_diffusion.export import fuse
from reslora_diffusion.llm import reading
from reslora_diffusion.llm.generation import generate
from reslora_diffusion.llm.options import LlmOptions
from reslora_diffusion.llm.resuming import fault_of
from reslora_diffusion.llm.tasks import TASKS
from reslora_diffusion.llm.trainer import ExportedTrainer
from reslora_diffusion.utils.problems import BadInput, Interrupted, Stopped

script = load_script("train_llm_reslora")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers about names that it still accepts


def sums(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(count)]
    return [
        {"Body": f"Mia has {a} hats.", "Question": f"And {b} more?", "Equation": f"( {a} + {b} )", "Answer": str(a + b)}
        for a, b in pairs
    ]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama with its tokenizer, a task in SVAMP's columns, and conversations."""
    root = tmp_path_factory.mktemp("llm")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["Mia has hats. The answer is"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(wrapped),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    for part in (model, wrapped):
        part.save_pretrained(root / "model")
    for split, count in (("train", 24), ("validation", 6), ("test", 7)):
        write_lines(root / "task" / f"{split}.jsonl", sums(count, seed=len(split)))
    write_lines(root / "talks" / "train.jsonl", [{"prompt": f"say {i}", "response": f"{i} it is"} for i in range(20)])
    return {name: root / name for name in ("model", "task", "talks")}


def words(folders: dict[str, Path], output: Path, **options) -> list[str]:
    defaults = {
        "model_name_or_path": folders["model"],
        "dataset_name": folders["task"],
        "task": "svamp",
        "output_dir": output,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
        "max_new_tokens": 4,
        "rank": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "export_dtype": "float32",
    }
    given = {name: value for name, value in (defaults | options).items() if value is not None}
    return [f"--{name}={value}" for name, value in given.items()]


def run(folders: dict[str, Path], output: Path, **options) -> Path:
    return script.main(words(folders, output, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora"},
        {"shortcut": "input"},
        {"shortcut": "block", "num_previous": 2},
        {"shortcut": "middle", "num_previous": "all", "packing": True, "max_length": 100},
    ],
)
def test_a_run_leaves_a_plain_lora_and_its_records(folders, tmp_path, options):
    output = run(folders, tmp_path / "out", **options)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == (6 if options.get("shortcut") == "block" else 2)
    assert not config.keys() & {"shortcut", "num_previous", "merge_method"}
    results = json.loads((output / "results.json").read_text())
    trained = set() if options.get("method") == "lora" else {"as trained"}
    assert results["exact_match"].keys() == {"base", "as exported"} | trained
    record = json.loads((output / "run.json").read_text())
    assert record["examples"] == {"train": 24, "validation": 6, "test": 7}
    assert record["options"]["task"] == "svamp"
    history = json.loads((output / "history.json").read_text())
    assert [row["step"] for row in history if "eval_exact_match" in row] == [2, 4]
    assert results["best_metric"] == max(row["eval_exact_match"] for row in history if "eval_exact_match" in row)
    assert len((output / "predictions.jsonl").read_text().splitlines()) == 7
    if trained:
        assert results["merging"]["loss_merged"] == pytest.approx(results["merging"]["loss_trained"], abs=0.2)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["model"]), output).eval()
    with torch.no_grad():
        ids = torch.tensor([[1, 50, 51, 52]])
        moved = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - moved).abs().max() > 1e-3


def test_the_exported_file_gives_the_recorded_answers(folders, tmp_path):
    output = run(folders, tmp_path / "out", shortcut="middle", num_previous=2)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["model"]), output)
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    task = TASKS["svamp"]
    rows = [json.loads(line) for line in (folders["task"] / "test.jsonl").read_text().splitlines()]
    prompts = [tokenizer(f"{task.ask(row)}\n").input_ids for row in rows]
    expected = [json.loads(line)["response"] for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert generate(model, tokenizer, prompts, max_new_tokens=4) == expected


def test_a_stopped_run_continues_to_the_same_end(folders, tmp_path):
    options = {"shortcut": "middle", "lora_dropout": 0.1, "load_best_model_at_end": False}
    whole = run(folders, tmp_path / "whole", **options)
    run(folders, tmp_path / "parts", **options)
    (tmp_path / "parts" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    again = run(folders, tmp_path / "again", **options, resume_from_checkpoint=tmp_path / "checkpoint-2")
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert len(json.loads((again / "history.json").read_text())) == len(
        json.loads((whole / "history.json").read_text())
    )


def test_handover_exports_exactly_what_was_trained(folders, tmp_path):
    options = {"shortcut": "input", "handover_at": 0.5, "load_best_model_at_end": False}
    output = run(folders, tmp_path / "out", **options)
    results = json.loads((output / "results.json").read_text())
    assert results["shortcut"] == "none"
    assert results["merging"]["gap"] == pytest.approx(0, abs=1e-6)
    assert json.loads((output / "checkpoint-4" / "adapter_config.json").read_text())["shortcut"] == "none"
    resumed = run(folders, tmp_path / "more", **options, resume_from_checkpoint=output / "checkpoint-4", max_steps=6)
    assert json.loads((resumed / "results.json").read_text())["shortcut"] == "none"


def test_distillation_leaves_a_smaller_distance_and_a_plain_lora(folders, tmp_path):
    options = {"shortcut": "middle", "num_previous": "all", "calibration_examples": 32, "learning_rate": 0.02}
    output = run(folders, tmp_path / "out", **options, distillation_steps=60)
    results = json.loads((output / "results.json").read_text())
    assert results["distillation"]["kept"]
    assert 0 < results["distillation"]["after"] < results["distillation"]["before"]
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_conversations_without_a_task_and_a_merged_model(folders, tmp_path):
    output = run(
        folders, tmp_path / "out", task=None, dataset_name=folders["talks"], shortcut="block", save_merged_model=True
    )
    results = json.loads((output / "results.json").read_text())
    assert results["test"] == {}
    assert results["best_metric"] > 0
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["model"]), output)
    ids = torch.tensor([[1, 50, 51, 52]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(output / "merged")("a").input_ids


def test_a_merged_model_keeps_the_precision_of_its_base(folders, tmp_path):
    """One merge: what `reslora merge` writes is what `--save_merged_model` writes, whatever was trained in."""
    shutil.copytree(folders["model"], tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folders["model"], dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    options = {"task": None, "dataset_name": folders["talks"], "max_steps": 2, "warmup_steps": 0}
    output = run(folders, tmp_path / "out", model_name_or_path=tmp_path / "model", save_merged_model=True, **options)
    report = fuse(output, str(tmp_path / "model"), tmp_path / "fused")
    assert report.precisions == {"model": "BF16"}
    merged, fused = (load_file(folder / "model.safetensors") for folder in (output / "merged", tmp_path / "fused"))
    assert merged.keys() == fused.keys()
    assert all(torch.equal(merged[name], fused[name]) for name in merged)


def test_a_base_that_nothing_can_be_merged_into_is_said_at_once(folders, tmp_path):
    shutil.copytree(folders["model"], tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/pytorch_model.bin").write_bytes(b"")
    found = problems(folders, tmp_path, model_name_or_path=tmp_path / "model", save_merged_model=True)
    assert any(p.startswith("--save_merged_model: ") and "holds no safetensors weights" in p for p in found)


def test_the_end_that_is_taught_is_written_where_generation_finds_it(folders, tmp_path, capsys):
    """A base model whose end token is </s>, with a chat template that closes turns by <s>."""
    shutil.copytree(folders["model"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{{ bos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"task": None, "dataset_name": folders["talks"], "max_steps": 2, "warmup_steps": 0}
    output = run(folders, tmp_path / "out", model_name_or_path=tmp_path / "model", save_merged_model=True, **options)
    shown = capsys.readouterr().out
    assert "answers end with '<s>' (1)" in shown
    assert "the base's generation does not stop there" in shown
    for folder in (output, output / "merged"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 1]
    run(folders, tmp_path / "plain", **options)
    shown = capsys.readouterr().out
    assert "answers end with '</s>' (2)" in shown
    assert "does not stop there" not in shown
    assert GenerationConfig.from_pretrained(tmp_path / "plain").eos_token_id == 2


def test_options_from_a_file_and_the_command_line_wins(folders, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rank: 3\nshortcut: block\ntarget_modules: [q_proj, up_proj]\n")
    output = script.main([*words(folders, tmp_path / "out", max_steps=2, warmup_steps=0), f"--config={file}"])
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 4  # --rank=2 and one predecessor
    assert json.loads((output / "run.json").read_text())["options"]["target_modules"] == ["q_proj", "up_proj"]


def test_what_is_about_to_happen_is_said_first(folders, tmp_path, capsys):
    options = {"max_steps": None, "eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "no"}
    more = {"shortcut": "block", "num_previous": 2, "gradient_accumulation_steps": 2, "target_modules": "v_proj"}
    run(folders, tmp_path / "out", task=None, dataset_name=folders["talks"], **options | more)
    shown = capsys.readouterr().out.splitlines()
    for line in (
        "on cpu: the frozen base in float32, adapters in float32",
        "ResLoRA, shortcut block, num_previous 2: rank 2, lora_alpha 4, scale 2; 288 trained parameters",
        "adamw_torch_fused: learning rate 0.01, linear, warm-up 0.06 of the steps, weight decay 0",
        "6 steps of 8 examples x 2 accumulated; 18 in a pass over the data",
    ):
        assert line in shown
    assert any(line.startswith("only 6 steps: the 3 passes of the default are few") for line in shown)


def test_out_of_memory_keeps_the_last_step_and_says_what_needs_less(folders, tmp_path, monkeypatch):
    step = ExportedTrainer.training_step

    def out_of_memory(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return step(self, *args, **kwargs)

    options = {"shortcut": "middle", "load_best_model_at_end": False}
    whole = run(folders, tmp_path / "whole", **options)
    monkeypatch.setattr(ExportedTrainer, "training_step", out_of_memory)
    with pytest.raises(Stopped) as caught:
        run(folders, tmp_path / "out", **options)
    message = str(caught.value)
    assert "out of memory in step 4 (CUDA out of memory. Tried to allocate 2.00 GiB.)" in message
    assert "checkpoint-3 is kept, continue by --resume_from_checkpoint latest" in message
    advice = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2, --gradient_checkpointing true, --dtype"
    assert f"these options need less: {advice} bfloat16" in message
    monkeypatch.setattr(ExportedTrainer, "training_step", step)
    resumed = run(folders, tmp_path / "out", **options, resume_from_checkpoint="latest")
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_a_checkpoint_from_before_the_evaluation_of_its_step_continues_bit_for_bit(folders, tmp_path):
    """Each step is an epoch here: it is saved, and evaluated after that."""
    options = {"per_device_train_batch_size": 24, "eval_strategy": "epoch", "save_steps": 1, "eval_steps": None}
    options |= {"keep_best": False, "max_steps": 3, "lora_dropout": 0.4, "save_total_limit": 9}
    whole = run(folders, tmp_path / "whole", **options)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    resumed = run(folders, tmp_path / "out", **options, resume_from_checkpoint="latest")
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("harm", ["a blocked path", "an error of a library"])
def test_what_was_trained_is_kept_if_the_export_fails(folders, tmp_path, monkeypatch, harm):
    """No checkpoint is written on the way: without a rescue, all that was trained would be gone."""
    options = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "shortcut": "middle"}
    options |= {"task": None, "dataset_name": folders["talks"], "max_new_tokens": None}
    whole = run(folders, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        if harm == "a blocked path":
            (tmp_path / "out" / "export_report.json").mkdir(parents=True)
        else:
            patch.setattr(ExportedTrainer, "outcome", lambda *args: {}["nothing"])
        with pytest.raises(Stopped) as caught:
            run(folders, tmp_path / "out", **options)
    assert "exporting failed" in str(caught.value) or "evaluating failed" in str(caught.value)
    assert "checkpoint-4 is kept, continue by --resume_from_checkpoint latest" in str(caught.value)
    if harm == "a blocked path":
        (tmp_path / "out" / "export_report.json").rmdir()
    else:
        assert "nothing" in (tmp_path / "out" / "error.txt").read_text()
    resumed = run(folders, tmp_path / "out", **options, resume_from_checkpoint="latest")
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_what_is_not_finite_is_said_by_its_cause(folders, tmp_path):
    """NaN in the base is no matter of a learning rate; a learning rate that wrecks the adapters overwrites nothing."""
    broken = AutoModelForCausalLM.from_pretrained(folders["model"])
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    shutil.copytree(folders["model"], tmp_path / "model")
    broken.save_pretrained(tmp_path / "model")
    options = {"task": None, "dataset_name": folders["talks"], "max_new_tokens": None}
    found = problems(folders, tmp_path, **options, model_name_or_path=tmp_path / "model")
    assert "1 tensor of the model holds NaN or infinity: model.layers.1.mlp.up_proj.weight" in found[0]
    options |= {"eval_strategy": "no", "load_best_model_at_end": False, "save_steps": 1, "max_steps": 6}
    options |= {"learning_rate": 1e38, "max_grad_norm": 0, "warmup_steps": 0, "optim": "sgd"}
    with pytest.raises(Stopped, match="the adapters are not finite after step .*A lower --learning_rate may help"):
        run(folders, tmp_path / "out", **options)
    for left in (tmp_path / "out").glob("checkpoint-*"):
        assert fault_of(left) is None


# --------------------------------------------------------------------------------------------------- the hub


def test_what_is_uploaded_is_the_exported_lora_and_no_file_holds_the_token(folders, tmp_path, hub, capsys, monkeypatch):
    there = hub(Hub())
    given = words(folders, tmp_path / "out", push_to_hub=True, hub_model_id="nobody/sks", hub_token="hf_secret")
    monkeypatch.setattr(sys, "argv", ["train_llm_reslora.py", *given, "--push_to_hub_token", "other"])
    output = script.main(given)
    assert "pushed to https://huggingface.co/nobody/sks/commit/1" in capsys.readouterr().out
    local = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    assert there.files.keys() == {name for name in local if not name.startswith("checkpoint-")}
    card = there.files["README.md"].decode()
    assert "library_name: peft" in card
    assert "- reslora" in card
    assert "A LoRA of rank 4 for" in card  # --rank=2 and one predecessor
    assert "| as exported | " in card
    assert json.loads(there.files["adapter_config.json"])["peft_type"] == "LORA"
    assert there.files["adapter_model.safetensors"] == local["adapter_model.safetensors"].read_bytes()
    assert {"checkpoint-2/training_args.bin", "run.json"} <= local.keys()
    for name, path in local.items():
        assert b"hf_secret" not in path.read_bytes(), name
    command = json.loads(local["run.json"].read_text())["command"]
    assert "--hub_token=..." in command
    assert command[-2:] == ["--push_to_hub_token", "..."]


def test_a_repository_that_cannot_be_written_to_is_said_before_weights_are_read(folders, tmp_path, hub, monkeypatch):
    hub(Hub(403))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    given = {"push_to_hub": True, "hub_model_id": "nobody/sks", "hub_token": "hf_secret"}
    found = problems(folders, tmp_path, **given)
    assert any("--push_to_hub: nobody/sks cannot be written to" in problem for problem in found)


def test_a_hub_out_of_reach_is_said_once_and_soon(folders, tmp_path, hub, waits, monkeypatch):
    def refused(request):
        raise httpx.ConnectError("Name or service not known")

    hub(refused)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = problems(folders, tmp_path, model_name_or_path="nobody/no-such-model")
    assert waits == []
    assert len(found) == 1
    assert "nobody/no-such-model: it is not on this machine, and https://huggingface.co cannot be reached" in found[0]
    assert "Name or service not known" in found[0]


# ------------------------------------------------------------------------------------------------- bad input


def problems(folders, tmp_path, **options) -> list[str]:
    with pytest.raises(BadInput) as caught:
        run(folders, tmp_path / "out", **options)
    return caught.value.problems


def test_all_option_faults_come_together(folders, tmp_path):
    found = problems(
        folders,
        tmp_path,
        shortcut="sideways",
        task="sums",
        dtype="int4",
        max_length=0,
        prompt_template="no",
        rank=0,
        lora_alpha=-1,
    )
    for part in (
        "sideways",
        "--task: got 'sums'",
        "--dtype: got 'int4'",
        "--max_length",
        "{prompt}",
        "--rank: got 0",
        "--lora_alpha: got -1",
    ):
        assert any(part in problem for problem in found), part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "qq_proj"}, "'qq_proj' matches nothing; the model has down_proj"),
        ({"rank": 33}, None),
        ({"method": "lora", "shortcut": "block"}, "--shortcut: does nothing with --method lora"),
        ({"max_length": 500}, "wanted at most 128, the model's context"),
        ({"max_length": 20}, "more tokens than --max_length 20"),
        ({"dataset_name": "no-such-folder/data.jsonl"}, "no such file"),
        ({"task": None}, "no 'prompt' in row"),
        ({"model_name_or_path": "/no-such-folder"}, "no such folder"),
        ({"shortcut": "block", "handover_at": 0.5}, "--handover_at: does nothing here"),
        ({"shortcut": "block", "distillation_steps": 9}, "--distillation_steps: does nothing here"),
        ({"method": "lora", "distillation_steps": 9}, "--distillation_steps: does nothing with --method lora"),
        ({"resume_from_checkpoint": "nowhere"}, "no checkpoint there"),
        ({"optim": "no_such_optimizer"}, "no_such_optimizer"),
        ({"report_to": "wandb"}, "--report_to wandb needs the package wandb, which is not installed"),
        ({"report_to": "wandd"}, "--report_to: got 'wandd', wanted azure_ml"),
        ({"metric_for_best_model": "accuracy"}, "--metric_for_best_model: got 'accuracy', wanted loss, exact_match"),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "unknown option --hub_strategy"),
        ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere: cannot be made or written to"),
        ({"shortcutt": "block"}, "did you mean --shortcut"),
        (
            {"shortcut": "middle", "activation_checkpointing_kwargs": '{"use_reentrant": true}'},
            "wanted use_reentrant=false",
        ),
    ],
)
def test_one_clear_error(folders, tmp_path, options, message):
    if message is None:
        options, message = options | {"target_modules": "k_proj"}, "--rank: got 33, larger than"
    assert any(message in problem for problem in problems(folders, tmp_path, **options))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("kind", "config"), [("an encoder-decoder", T5Config()), ("", BertConfig(is_decoder=False))])
def test_models_of_another_task_are_refused_before_their_weights_are_read(folders, tmp_path, kind, config):
    config.save_pretrained(tmp_path / "model")
    if kind:
        found = problems(folders, tmp_path, model_name_or_path=tmp_path / "model")
        assert any(kind in problem and "wanted a causal language model" in problem for problem in found)


@pytest.mark.parametrize("method", ["lora", "reslora"])
def test_an_adapted_output_layer_that_is_the_embedding_is_not_merged(folders, tmp_path, method):
    """The exported LoRA is right; merged into the weight that both share, it would change the embedding as well."""
    tied = AutoModelForCausalLM.from_pretrained(folders["model"])
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    shutil.copytree(folders["model"], tmp_path / "model")
    tied.save_pretrained(tmp_path / "model")
    options = {"model_name_or_path": tmp_path / "model", "target_modules": "lm_head", "method": method}
    found = problems(folders, tmp_path, **options, save_merged_model=True)
    assert len(found) == 1
    assert found[0].startswith("--save_merged_model: lm_head share their weight with other layers")
    output = run(folders, tmp_path / "out", **options, max_steps=2, warmup_steps=0)
    assert (output / "adapter_model.safetensors").is_file()


def test_bad_lines_are_shown_by_number(folders, tmp_path):
    write_lines(tmp_path / "data" / "train.jsonl", [{"prompt": "a", "response": "b"}])
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write('\n{"prompt": "c"\n')
    found = problems(folders, tmp_path, task=None, dataset_name=tmp_path / "data")
    assert any("train.jsonl line 2: the line is empty" in problem for problem in found)
    assert any("train.jsonl line 3: not JSON" in problem for problem in found)


def test_what_is_not_read_is_said(folders, tmp_path):
    write_lines(tmp_path / "data" / "train.jsonl", [{"prompt": "a", "response": "b", "source": "web", "id": None}] * 4)
    write_lines(tmp_path / "data" / "dev.jsonl", [{"prompt": "a", "response": "b"}])
    found = reading.read(LlmOptions(dataset_name=str(tmp_path / "data")), seed=0).notes
    assert f"{tmp_path / 'data'}: files that are not read: dev.jsonl" in found
    assert "train: columns that are not read: source" in found


def test_rows_are_shown_by_their_place_in_the_file_though_some_are_set_apart(folders, tmp_path):
    rows = [{"prompt": f"say {i}", "response": "it is"} for i in range(12)]
    rows[7] = {"prompt": "say 7"}
    write_lines(tmp_path / "rows.jsonl", rows)
    options = {"task": None, "dataset_name": tmp_path / "rows.jsonl", "validation_fraction": 0.5}
    assert any("no 'response' in row 8;" in problem for problem in problems(folders, tmp_path, **options))
    rows[7] = {"prompt": "say 7", "response": "it is " * 20}
    write_lines(tmp_path / "rows.jsonl", rows)
    assert any("row 8 (" in p for p in problems(folders, tmp_path, **options, max_length=40))


def test_an_earlier_run_is_not_overwritten(folders, tmp_path):
    run(folders, tmp_path / "out", max_steps=2)
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert any("holds checkpoints of an earlier run" in problem for problem in problems(folders, tmp_path))
    other = problems(folders, tmp_path, resume_from_checkpoint="latest", rank=4)
    assert any("was trained with r 2, got 4" in problem for problem in other)
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert any("holds an adapter already" in problem for problem in problems(folders, tmp_path))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == weights


def test_a_signal_finishes_the_step_and_saves_and_the_run_goes_on_bit_for_bit(folders, tmp_path):
    options = {"eval_strategy": "no", "load_best_model_at_end": False, "lr_scheduler_type": "constant", "task": None}
    options |= {"dataset_name": folders["talks"], "shortcut": "middle", "max_new_tokens": None}
    output, handlers = tmp_path / "out", [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def ask() -> None:
        while not list(output.glob("checkpoint-*/checksums.json")):  # one of them: old ones are removed
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(
        Interrupted, match=r"after step \d+ of 100000; continue by --resume_from_checkpoint latest"
    ) as told:
        run(folders, output, max_steps=100_000, save_steps=2, save_total_limit=2, **options)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    done = int(str(told.value).split()[2])
    assert (output / f"checkpoint-{done}" / "checksums.json").is_file()
    assert not (output / "adapter_model.safetensors").exists()
    steps = done + 2
    run(folders, output, max_steps=steps, save_steps=steps, resume_from_checkpoint="latest", **options)
    whole = run(folders, tmp_path / "whole", max_steps=steps, save_steps=steps, **options)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (output, whole))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
