"""The command line of the language-model scripts, which is read without the class that most of its options are of."""

import json
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields

import pytest
from peft import TaskType
from torch import nn
from transformers import HfArgumentParser, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from llm_tiny import MODELS, ROOT
from reslora_diffusion.llm import models, options
from reslora_diffusion.llm.checks import check, launcher_problems
from reslora_diffusion.llm.model_checks import SAME_NAMES, length_problems, stored_layers, stored_problems
from reslora_diffusion.llm.options import GlueOptions, LlmOptions, parse, training_arguments
from reslora_diffusion.llm.resuming import checkpoint_of
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.model_files import Files
from reslora_diffusion.utils.options import option
from reslora_diffusion.utils.problems import BadInput

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers about names that it still accepts
HEAVY = ("torch", "peft", "accelerate", "diffusers", "datasets")


def test_offered_options_are_those_of_the_class():
    """Names are the same, and so are defaults, but for those that the scripts choose."""
    real = {item.name: item for item in fields(TrainingArguments)}
    ours = {item.name: item for item in fields(TrainingOptions) if "facts" in item.metadata}
    assert ours.keys() <= real.keys()
    assert len(ours) > 90
    changed = {
        name for name, item in ours.items() if item.default is not MISSING and item.default != real[name].default
    }
    assert changed == {
        "learning_rate",
        "warmup_steps",
        "eval_strategy",
        "save_strategy",
        "save_total_limit",
        "load_best_model_at_end",
        "logging_steps",
        "seed",
    }


def test_an_option_that_the_installed_version_lacks_is_said(monkeypatch):
    @dataclass
    class Newer(TrainingOptions):
        brand_new: bool = option(False, "Of a later version.")

    monkeypatch.setattr(options, "TrainingOptions", Newer)
    assert training_arguments(parse(LlmOptions, [], {})[1]).seed == 0
    with pytest.raises(BadInput, match="--brand_new: the installed version of transformers has no such"):
        training_arguments(parse(LlmOptions, ["--brand_new"], {})[1])


def test_all_problems_of_a_command_line_and_a_file_come_in_one_message(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("num_train_epochs: some\neval_strategy: no\naccelerator_config: {split_batches: true}\n")
    words = [f"--config={path}", "--rank=many", "--learning_rat=1", "--save_strategy=never", "--no_eval_base", "stray"]
    words += ["--per-device-train-batch-size", "2", "--seed"]
    chosen, training = parse(LlmOptions, words, {"output_dir": str(tmp_path / "out")})
    assert (chosen.eval_base, training.per_device_train_batch_size, training.eval_strategy) == (False, 2, "no")
    assert training.accelerator_config == '{"split_batches": true}'
    problems = [
        "--num_train_epochs: got 'some', wanted a number",
        "unknown option --learning_rat (did you mean --learning_rate?)",
        "got 'stray', which belongs to no option",
        "--rank: got 'many', wanted a whole number",
        "--save_strategy: got 'never', wanted no, steps, epoch, best",
        "--seed: got nothing, wanted a whole number",
    ]
    assert training.problems == problems
    with pytest.raises(BadInput) as error:
        check(chosen, training, [], list)
    assert error.value.problems[: len(problems)] == problems
    assert "--model_name_or_path: got nothing, wanted a folder or a hub name" in error.value.problems


def test_values_become_training_arguments_as_the_class_makes_them(tmp_path):
    words = ["--learning_rate=0.01", "--report_to=none", "--eval_strategy=no", "--optim=sgd"]
    words += ['--gradient_checkpointing_kwargs={"use_reentrant": false}', "--lr_scheduler_type=cosine", "--use_cpu"]
    words += [
        "--save_strategy=no",
        "--load_best_model_at_end=false",
        f"--output_dir={tmp_path}",
        "--debug=underflow_overflow",
    ]
    made = training_arguments(parse(LlmOptions, words, {})[1])
    (expected,) = HfArgumentParser([TrainingArguments]).parse_args_into_dataclasses(
        [*words, "--warmup_steps=0.06", "--save_total_limit=2", "--logging_steps=10", "--seed=0"]
        + ["--remove_unused_columns=false"]
    )
    assert made.to_dict() == expected.to_dict()
    with pytest.raises(BadInput, match="load_best_model_at_end"):
        training_arguments(parse(LlmOptions, ["--eval_strategy=no"], {})[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_deepspeed_creates_weights_in_the_precision_that_was_asked_for(dtype, monkeypatch):
    """Its configuration alone decides that, and is the shipped one again when DeepSpeed wraps the model."""
    shipped = json.loads((ROOT / "train_scripts" / "configs" / "accelerate" / "deepspeed_zero3.json").read_text())
    live = dict(shipped)
    monkeypatch.setattr(models, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(models, "deepspeed_config", lambda: live)
    with models.held_in(dtype):
        enabled = [name for name in ("bf16", "fp16") if live.get(name, {}).get("enabled")]
        assert enabled == {"bfloat16": ["bf16"], "float16": ["fp16"], "float32": []}[dtype]
    assert live == shipped


def test_zero3_does_not_quietly_train_in_another_precision_than_was_asked_for(monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    given = training_arguments(parse(LlmOptions, ["--use_cpu"], {})[1])
    assert list(launcher_problems(LlmOptions(), given)) == []
    (problem,) = launcher_problems(LlmOptions(dtype="bfloat16"), given)
    assert problem.startswith("--dtype bfloat16: DeepSpeed ZeRO-3 does not train float32 adapters on a base in another")


def test_several_gpus_of_one_process_are_refused_where_batches_cannot_be_shared_out(tmp_path):
    """`torch.nn.DataParallel` ended in an error in the first step, with the model in memory."""
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    given = LlmOptions(attn_implementation="flash_attention_2", packing=True, chunked_loss=True)
    assert list(launcher_problems(given, training)) == []
    training._n_gpu = 2
    found = list(launcher_problems(given, training))
    assert [problem.partition(":")[0] for problem in found] == [
        "--method reslora",
        "--packing with flash_attention_2",
        "--chunked_loss",
    ]
    assert all("accelerate launch --num_processes 2, or CUDA_VISIBLE_DEVICES=0" in problem for problem in found)
    assert list(launcher_problems(LlmOptions(method="lora"), training)) == []


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_files_of_a_model_tell_its_layers_as_its_modules_do(tmp_path, name):
    model = MODELS[name][0]()
    model.save_pretrained(tmp_path)
    linear = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert stored_layers(Files(str(tmp_path), None).shapes("")) == dict(sorted(linear.items()))
    given = {"model_name_or_path": str(tmp_path), "rank": 33, "max_length": 4096}
    chosen = LlmOptions(**given, target_modules=["qq_proj", next(iter(linear)).rpartition(".")[2]])
    found = stored_problems(chosen)
    context = length_problems(models.context_length(model.config), 4096)
    assert found == [*context, *models.target_problems(model.config, chosen, TaskType.CAUSAL_LM)]
    assert len(found) >= 2
    head = GlueOptions(**given | {"max_length": 9, "rank": 4}, target_modules=["classifier", "out_proj"])
    assert stored_problems(head) == []  # a file of no classifier does not tell what a classifier has


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"model_type": "mixtral"},
        {"model_type": "gpt_neox"},
    ],
    ids=["quantised", "converted by type", "converted by class"],
)
def test_files_whose_tensors_are_called_otherwise_do_not_tell(tmp_path, change):
    MODELS["llama"][0]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    asked = LlmOptions(model_name_or_path=str(tmp_path), target_modules=["qq_proj"])
    assert len(stored_problems(asked)) == 1
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert stored_problems(asked) == []


@pytest.mark.parametrize("kind", sorted(SAME_NAMES))
def test_transformers_converts_no_tensor_of_models_that_keep_their_names(kind):
    conversion = pytest.importorskip("transformers.conversion_mapping", reason="transformers 4 converts no names")
    assert not conversion.get_checkpoint_conversion_mapping(kind)
    classes = [mapping[kind] for mapping in (MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if kind in mapping]
    assert classes
    assert not any(conversion.get_checkpoint_conversion_mapping(name) for name in classes)


@pytest.mark.parametrize("content", [None, b"{", b"\xff"], ids=["none", "cut off", "no text"])
def test_files_that_cannot_be_read_are_bad_input(tmp_path, content):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    words = [f"--output_dir={tmp_path}", f"--resume_from_checkpoint={tmp_path / 'checkpoint-1'}"]
    if content is not None:
        (tmp_path / "checkpoint-1" / "adapter_config.json").write_bytes(content)
    chosen, values = parse(LlmOptions, words, {})
    with pytest.raises(BadInput, match="adapter_config.json cannot be read"):
        checkpoint_of(values, chosen)
    (tmp_path / "run.yaml").write_bytes(content or b"[")
    with pytest.raises(BadInput, match="does not parse"):
        parse(LlmOptions, [*words, f"--config={tmp_path / 'run.yaml'}"], {})


ANSWERS = {  # words -> what is said, all without torch
    "--help": "--gradient_accumulation_steps",
    "--no_such_option 1": "unknown option --no_such_option",
    "--learning_rat 1": "did you mean --learning_rate",
    "--rank many": "--rank: got 'many', wanted a whole number",
    "--warmup_steps many": "--warmup_steps: got 'many', wanted a number",
    "--config /nowhere.yaml": "--config /nowhere.yaml: No such file",
    "--model_name_or_path /nowhere/model": "/nowhere/model: there is no such folder",
    "--model_name_or_path tests": "has no config.json",
    "--task_name rte --dataset_name /nowhere.jsonl": "/nowhere.jsonl: there is no such file",
    "--model_name_or_path assets/tiny-llm --max_length 9999": "--max_length: got 9999, wanted at most",
    "--model_name_or_path assets/tiny-llm --rank 999 --target_modules q_proj": "--rank: got 999, larger than model.",
    "--shortcut input --num_previous 3": "num_previous: got 3, wanted 1 or 0",
    "--method lora --shortcut block": "--shortcut: does nothing with --method lora",
    "--resume_from_checkpoint nowhere": "no checkpoint there",
}


@pytest.mark.parametrize("script", ["train_llm_reslora", "train_glue_reslora"])
def test_what_needs_no_torch_is_answered_without_it(script):
    answers = {
        words.removeprefix("" if "glue" in script else "--task_name rte "): said for words, said in ANSWERS.items()
    }
    code = (
        "import sys; from contextlib import redirect_stdout; from io import StringIO; from pathlib import Path\n"
        f"sys.path.insert(0, 'train_scripts'); import {script} as script\n"
        "from reslora_diffusion.utils.problems import BadInput\n"
        f"for words, wanted in {answers!r}.items():\n"
        "    with redirect_stdout(StringIO()) as said:\n"
        "        try: script.main(words.split() + ['--output_dir=/tmp/nowhere-at-all'])\n"
        "        except BadInput as error: print(error)\n"
        "        except SystemExit as left: assert left.code == 0\n"
        "    assert wanted in said.getvalue(), (words, said.getvalue())\n"
        f"    assert not set({HEAVY}) & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
