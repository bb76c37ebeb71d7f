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

from reslora_diffusion.llm.alignment import problems_of, read
from reslora_diffusion.llm.checks import check, launcher_problems
from reslora_diffusion.llm.model_checks import length_problems
from reslora_diffusion.llm.options import RewardOptions, parse, training_arguments
from reslora_diffusion.llm.tasks import TASKS
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.output_folder import alone_in
from reslora_diffusion.utils.problems import refuse, run_program

DEFAULTS = {
    "output_dir": "reslora-grpo",
    "learning_rate": 1e-6,
    "num_train_epochs": 1.0,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, export, and return the output folder.

    Raises:
        BadInput: every problem with the options, the data or the model.
    """
    options, values = parse(RewardOptions, argv, DEFAULTS)
    checkpoint, rows = check(options, values, problems_of(options, values), lambda: read(options, values.seed))
    with alone_in(values.output_folder):
        return train(options, values, rows, checkpoint)


def train(options: RewardOptions, values: TrainingOptions, rows: Sequence[dict] | None, checkpoint: str | None) -> Path:
    """From sound options on; `rows` is None where they have yet to be fetched."""
    from datasets import Dataset
    from peft import TaskType
    from transformers import set_seed
    from trl import GRPOConfig

    from reslora_diffusion.llm import models
    from reslora_diffusion.llm.alignment import Reward, as_text, batches_for, train_and_export
    from reslora_diffusion.llm.alignment_trainers import RewardTrainer
    from reslora_diffusion.llm.encoder import Encoder
    from reslora_diffusion.llm.publishing import take_destination
    from reslora_diffusion.llm.rescue import enough_memory

    kind = TaskType.CAUSAL_LM
    config = models.load_config(options, kind)
    context = models.context_length(config)
    refuse([*models.target_problems(config, options, kind), *length_problems(context, options.max_length)])
    training = training_arguments(
        values,
        GRPOConfig,
        beta=options.beta,
        num_generations=options.num_generations,
        max_completion_length=options.max_new_tokens,
        temperature=options.temperature,
    )
    refuse(launcher_problems(options, training))
    tokenizer = models.load_tokenizer(options, config)
    encoder = Encoder(tokenizer, rows=models.embedding_rows(config))
    rows = rows if rows is not None else read(options, training.seed)
    longest = options.max_length or min(1024, context or 1024)
    batches = batches_for(rows, encoder, training, options.calibration_examples, longest)
    destination = take_destination(training)
    set_seed(training.seed)
    with enough_memory(options, training):
        trainer = RewardTrainer(
            models.load_model(options, config, kind),
            reward_funcs=Reward(TASKS[str(options.task)]),
            args=training,
            train_dataset=Dataset.from_list(as_text(rows, encoder)),
            processing_class=tokenizer,
            peft_config=models.adapter_config(options, kind),
            options=options,
        )
    output = train_and_export(trainer, options, batches, checkpoint)
    if destination and trainer.is_world_process_zero():
        print(f"pushed to {destination.send(output)}")
    return output


if __name__ == "__main__":
    sys.exit(run_program(main))
