"""`reslora tune train-llm` on the embedded language model, for a few steps."""

import signal
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from llm_tiny import load_script
from reslora_diffusion.llm.options import LlmOptions
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.tuning.command import parse, tune
from reslora_diffusion.tuning.llm import Language, read, row_losses
from reslora_diffusion.tuning.settings import Settings
from reslora_diffusion.tuning.space import Space
from reslora_diffusion.utils.problems import BadInput, Interrupted

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "tiny-llm"


def test_the_language_model_trainer_is_tuned_and_trained_with_what_was_found(tmp_path):
    line = ["--model_name_or_path", MODEL, "--dataset_name", MODEL / "word_problems", "--task", "svamp", "--rank", "2"]
    line += ["--method", "lora", "--learning_rate", "1e-5", "--max_steps", "600", "--per_device_train_batch_size", "2"]
    line += ["--max_eval_examples", "8", "--max_train_examples", "40", "--output_dir", tmp_path / "out"]
    own = ["--share", "0.5", "--trial_steps", "3", "--trials", "3", "--held_out_draws", "8"]
    settings, program, words = parse([*own, "train-llm", *map(str, line)])
    found = tune(program, words, settings, lambda facts: None)
    assert found.trials == 3
    assert found.gain.draws == 4
    assert found.best in ({"learning_rate": 4e-5, "lora_alpha": 4.0}, {"learning_rate": 1e-5, "lora_alpha": 32.0})
    config = tmp_path / "out" / "tune" / "run.yaml"
    assert yaml.safe_load(config.read_text()).items() >= {"rank": 2, "load_best_model_at_end": True}.items()
    script = load_script("train_llm_reslora")
    output = script.main(["--config", str(config), "--max_steps", "2", "--max_new_tokens", "2", "--eval_base", "false"])
    assert (output / "adapter_model.safetensors").is_file()


def words(tmp_path, *more):
    line = ["--model_name_or_path", MODEL, "--dataset_name", MODEL / "word_problems", "--task", "svamp", "--rank", "2"]
    line += ["--max_eval_examples", "8", "--max_train_examples", "40", "--output_dir", tmp_path / "out", *more]
    return list(map(str, line))


def test_the_steps_of_a_packed_training_are_counted_in_packs(tmp_path):
    more = ["--packing", "true", "--max_length", "256", "--per_device_train_batch_size", "1", "--num_train_epochs", "1"]
    trainee = Language(read(words(tmp_path, *more)), 8)
    tokens = sum(len(example["input_ids"]) for example in trainee.data.train)
    assert tokens / 256 <= trainee.steps < 40 / 2


def test_what_a_file_of_axolotl_says_is_in_what_was_given(tmp_path):
    """`run.yaml` is made of it."""
    (tmp_path / "axolotl.yaml").write_text(yaml.safe_dump({"adapter": "lora", "base_model": str(MODEL), "lora_r": 2}))
    command = read(["--config", str(tmp_path / "axolotl.yaml"), *words(tmp_path)[2:]])
    assert command.given["model_name_or_path"] == str(MODEL)
    assert command.options.rank == command.given["rank"] == 2


def test_a_trial_that_diverges_does_not_end_the_search(tmp_path):
    trainee, seen = Language(read(words(tmp_path, "--max_steps", "600")), 8), []
    spent = trainee.train({"learning_rate": 1e30}, 3, [1, 2, 3], lambda step, losses: seen.append(losses))
    assert not np.isfinite(seen[-1]).any()
    assert spent.total > 0


@pytest.mark.parametrize("step", [1, 2])
def test_ctrl_c_ends_the_search_also_while_the_last_step_of_a_trial_is_measured(tmp_path, step):
    trainee = Language(read(words(tmp_path, "--max_steps", "600")), 8)

    def report(measured, losses):
        if measured == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        trainee.train({}, 2, [1, 2], report)


def test_points_are_options_of_the_language_model_trainer():
    point = {"learning_rate": 1e-3, "lora_alpha": 1.0, "rank": 4, "method": "reslora-block", "lr_scheduler": "cosine"}
    found = Space(point, list(point), Language.names).options(point)
    assert found["lr_scheduler_type"] == "cosine"
    assert found.keys() <= {item.name for kind in (LlmOptions, TrainingOptions) for item in fields(kind)}


def test_schedules_of_which_the_last_step_is_used_are_refused(tmp_path):
    """`run.yaml` asks for the best step, which the training would refuse."""
    more = ["--schedule", "ranks:ratio=0.5", "--load_best_model_at_end", "false", "--shortcut", "none"]
    with pytest.raises(BadInput, match="--schedule ranks: a search is for a run that keeps its best step"):
        tune("train-llm", words(tmp_path, *more), Settings())


def test_too_few_rows_to_measure_on_are_refused(tmp_path):
    with pytest.raises(BadInput, match="validation has 2 rows that can be measured on, wanted 4 or more"):
        Language(read(words(tmp_path, "--max_eval_examples", "2")), 8)


def test_losses_of_padded_rows_are_those_of_each_row_alone():
    """With random logits; the rows have 3 and 5 tokens of which 2 and 3 are learned."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, 4, 2, -100, -100], [-100, -100, 1, 6, 3]])
    found = row_losses(logits, labels)
    for row, length in enumerate((3, 5)):
        logs = logits[row, :length].log_softmax(-1)
        alone = [-logs[place - 1, label] for place, label in enumerate(labels[row, :length].tolist()) if label >= 0]
        assert float(found[row]) == pytest.approx(float(torch.stack(alone).mean()))
