"""`reslora tune train-llm` on the embedded language model, for a few steps."""

from pathlib import Path

import yaml

from llm_tiny import load_script
from reslora_diffusion.tuning.command import parse, tune

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
    assert found.best["learning_rate"] == 4e-5
    config = tmp_path / "out" / "tune" / "run.yaml"
    assert yaml.safe_load(config.read_text()).items() >= {"rank": 2, "load_best_model_at_end": True}.items()
    script = load_script("train_llm_reslora")
    output = script.main(["--config", str(config), "--max_steps", "2", "--max_new_tokens", "2", "--eval_base", "false"])
    assert (output / "adapter_model.safetensors").is_file()
