#!/usr/bin/env python
"""Reward a causal language model for right answers that it finds itself, by TRL's GRPOTrainer, with LoRA or ResLoRA.

    reslora grpo --model_name_or_path Qwen/Qwen3-0.6B --dtype bfloat16 --task gsm8k --num_generations 8 \\
        --shortcut block --rank 8 --output_dir my-grpo

To each question of a task (gsm8k, svamp, mathqa, ...) the model generates several answers; one that is right by the
task's own rule (see tasks.py) counts 1, others 0, and answers better than their group's mean become likelier. What
comes out in --output_dir is a plain LoRA, as from train_llm_reslora.py; `--help` lists our options and those of
`transformers.TrainingArguments`. A batch (--per_device_train_batch_size times processes) has to be a multiple of
--num_generations.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from reslora_diffusion.llm.alignment import Aligned, run_checked
from reslora_diffusion.llm.options import RewardOptions, training_arguments
from reslora_diffusion.llm.tasks import TASKS
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.problems import run_program

DEFAULTS = {"output_dir": "reslora-grpo", "learning_rate": 1e-6}


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, export, and return the output folder.

    Raises:
        BadInput: every problem with the options, the data or the model.
    """
    return run_checked(RewardOptions, argv, DEFAULTS, train)


def train(options: RewardOptions, values: TrainingOptions, given: Aligned | None, checkpoint: str | None) -> Path:
    """Train by options that have been checked; `given` is None where rows have yet to be fetched."""
    from trl import GRPOConfig

    from reslora_diffusion.llm.alignment import Reward
    from reslora_diffusion.llm.alignment_run import AlignmentRun
    from reslora_diffusion.llm.alignment_trainers import RewardTrainer

    run = AlignmentRun.prepare(options, given, values.seed)
    training = training_arguments(
        values,
        GRPOConfig,
        beta=options.beta,
        num_generations=options.num_generations,
        max_completion_length=options.max_new_tokens,
        temperature=options.temperature,
    )
    return run.train(RewardTrainer, training, checkpoint, reward_funcs=Reward(TASKS[str(options.task)]))


if __name__ == "__main__":
    sys.exit(run_program(main))
