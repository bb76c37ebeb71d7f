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

from reslora_diffusion.llm.alignment import problems_of, read
from reslora_diffusion.llm.checks import check, launcher_problems
from reslora_diffusion.llm.model_checks import length_problems
from reslora_diffusion.llm.options import PreferenceOptions, parse, training_arguments
from reslora_diffusion.llm.training_options import TrainingOptions
from reslora_diffusion.utils.output_folder import alone_in
from reslora_diffusion.utils.problems import refuse, run_program

DEFAULTS = {
    "output_dir": "reslora-dpo",
    "learning_rate": 5e-6,
    "num_train_epochs": 1.0,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, export, and return the output folder.

    Raises:
        BadInput: every problem with the options, the data or the model.
    """
    options, values = parse(PreferenceOptions, argv, DEFAULTS)
    checkpoint, rows = check(options, values, problems_of(options, values), lambda: read(options, values.seed))
    with alone_in(values.output_folder):
        return train(options, values, rows, checkpoint)


def train(
    options: PreferenceOptions, values: TrainingOptions, rows: Sequence[dict] | None, checkpoint: str | None
) -> Path:
    """From sound options on; `rows` is None where they have yet to be fetched."""
    from datasets import Dataset
    from peft import TaskType
    from transformers import set_seed
    from trl import DPOConfig

    from reslora_diffusion.llm import models
    from reslora_diffusion.llm.alignment import as_text, batches_for, train_and_export
    from reslora_diffusion.llm.alignment_trainers import PreferenceTrainer
    from reslora_diffusion.llm.encoder import Encoder
    from reslora_diffusion.llm.publishing import take_destination
    from reslora_diffusion.llm.rescue import enough_memory

    kind = TaskType.CAUSAL_LM
    config = models.load_config(options, kind)
    context = models.context_length(config)
    refuse([*models.target_problems(config, options, kind), *length_problems(context, options.max_length)])
    training = training_arguments(
        values,
        DPOConfig,
        beta=options.beta,
        loss_type=options.loss_type,
        max_length=options.max_length or min(1024, context or 1024),
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
        trainer = PreferenceTrainer(
            models.load_model(options, config, kind),
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
