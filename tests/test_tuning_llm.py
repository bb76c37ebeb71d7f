"""`reslora tune train-llm` on the embedded language model, for a few steps."""

from pathlib import Path

import pytest
import torch
import yaml

from llm_tiny import load_script
from reslora_diffusion.tuning.command import parse, tune
from reslora_diffusion.tuning.llm import row_losses

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


def test_losses_of_padded_rows_are_those_of_each_row_alone():
    """With random logits; the rows have 3 and 5 tokens of which 2 and 3 are learned."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, 4, 2, -100, -100], [-100, -100, 1, 6, 3]])
    found = row_losses(logits, labels)
    for row, length in enumerate((3, 5)):
        logs = logits[row, :length].log_softmax(-1)
        alone = [-logs[place - 1, label] for place, label in enumerate(labels[row, :length].tolist()) if label >= 0]
        assert float(found[row]) == pytest.approx(float(torch.stack(alone).mean()))
