#!/usr/bin/env python
"""Teach a causal language model which of two answers is preferred, by TRL's DPOTrainer, with LoRA or ResLoRA.

    reslora dpo --model_name_or_path Qwen/Qwen3-0.6B --dtype bfloat16 --dataset_name preferences.jsonl \\
        --shortcut block --rank 8 --output_dir my-dpo

A row is {"prompt": ..., "chosen": ..., "rejected": ...}, texts or lists of turns; the prompt may stand in both answers
instead. The loss raises the likelihood of the chosen answer over the rejected one, each against the base's own:

    - log sigmoid(beta (log p(chosen) / p_base(chosen) - log p(rejected) / p_base(rejected)))

and the base is the model with its adapter off, so nothing is held twice. What comes out in --output_dir is a plain
LoRA, as from train_llm_reslora.py; `--help` lists our options and those of `transformers.TrainingArguments`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from reslora_diffusion.llm.alignment import Aligned, run_checked
from reslora_diffusion.llm.options import PreferenceOptions, training_arguments
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.problems import run_program

DEFAULTS = {"output_dir": "reslora-dpo", "learning_rate": 5e-6}


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, export, and return the output folder.

    Raises:
        BadInput: every problem with the options, the data or the model.
    """
    return run_checked(PreferenceOptions, argv, DEFAULTS, train)


def train(options: PreferenceOptions, values: TrainingOptions, given: Aligned | None, checkpoint: str | None) -> Path:
    """Train by options that have been checked; `given` is None where rows have yet to be fetched."""
    from trl import DPOConfig

    from reslora_diffusion.llm.alignment_run import AlignmentRun
    from reslora_diffusion.llm.alignment_trainers import PreferenceTrainer

    run = AlignmentRun.prepare(options, given, values.seed)
    training = training_arguments(
        values, DPOConfig, beta=options.beta, loss_type=options.loss_type, max_length=run.longest
    )
    return run.train(PreferenceTrainer, training, checkpoint)


if __name__ == "__main__":
    sys.exit(run_program(main))
