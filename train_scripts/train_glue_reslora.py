#!/usr/bin/env python
"""Fine-tune a classifier on one of the nine GLUE tasks with LoRA or ResLoRA, export a plain LoRA with its head.

    accelerate launch train_scripts/train_glue_reslora.py --config train_scripts/configs/glue_roberta_large.yaml \\
        --task_name mrpc --output_dir mrpc-reslora

    # Your own rows in a task's columns: folder with train.jsonl and validation.jsonl, "label" a number
    python train_scripts/train_glue_reslora.py --model_name_or_path FacebookAI/roberta-base --task_name rte \\
        --dataset_name my_folder --shortcut middle --num_previous 4 --output_dir my-rte

What comes out, in --output_dir:

    adapter_config.json, adapter_model.safetensors   a plain LoRA and the classifier's head, for PEFT alone
    export_report.json                               what was proved about it
    results.json                                     the task's metrics: as trained, and of the exported file reloaded
    history.json, run.json                           losses and evaluations; command, options, versions
    checkpoint-N/                                    PEFT's folder with the shortcut, and the Trainer's state

GLUE's test labels are hidden, so its validation split is what is reported. The best step is therefore chosen on rows
set apart from train, by the task's first metric, of the merged LoRA.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from reslora_diffusion.llm.checks import check, launcher_problems
from reslora_diffusion.llm.glue import GLUE, measure, prepare, read, task_problems
from reslora_diffusion.llm.model_checks import length_problems
from reslora_diffusion.llm.options import GlueOptions, parse, training_arguments
from reslora_diffusion.utils.output_folder import alone_in
from reslora_diffusion.utils.problems import refuse, run_program

if TYPE_CHECKING:  # what needs torch is imported where it is used: `--help` and bad input should answer at once
    from torch.utils.data import Dataset
    from transformers import EvalPrediction, Trainer, TrainingArguments

DEFAULTS = {"output_dir": "reslora-glue", "learning_rate": 3e-4}


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, judge, export, and return the output folder.

    Raises:
        BadInput: every problem with the options, the data or the model.
    """
    options, values = parse(GlueOptions, argv, DEFAULTS)
    metrics = GLUE[options.task_name].metrics if options.task_name in GLUE else ()
    checkpoint, rows = check(options, values, task_problems(options), lambda: read(options), metrics)
    training = training_arguments(values)
    refuse(launcher_problems(options, training))
    with alone_in(values.output_folder):
        return train(options, training, rows, checkpoint)


def train(
    options: GlueOptions, training: "TrainingArguments", rows: dict[str, Sequence] | None, checkpoint: str | None
) -> Path:
    """Train by options that have been checked; `rows` is None where they have yet to be fetched."""
    import numpy as np
    from peft import PeftModel, TaskType
    from transformers import DataCollatorWithPadding, Trainer, set_seed

    from reslora_diffusion.llm import models
    from reslora_diffusion.llm.adapter_trainer import is_reslora
    from reslora_diffusion.llm.preflight import past_the_end
    from reslora_diffusion.llm.publishing import take_destination
    from reslora_diffusion.llm.rescue import enough_memory, rescued
    from reslora_diffusion.llm.results import export, history, start_record, write_json
    from reslora_diffusion.llm.trainer import ExportedTrainer, calibration_batches, fold_at

    assert options.task_name is not None, "the options were checked"
    task = GLUE[options.task_name]
    kind = TaskType.SEQ_CLS
    config = models.load_config(options, kind, num_labels=task.num_labels)
    context = models.context_length(config)
    refuse([*models.target_problems(config, options, kind), *length_problems(context, options.max_length)])
    tokenizer = models.load_tokenizer(options, config)
    data = prepare(options, tokenizer, rows or read(options), training.seed, models.embedding_rows(config))

    destination = take_destination(training)
    set_seed(training.seed)
    config.pad_token_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    with enough_memory(options, training):
        model = models.add_adapter(models.load_model(options, config, kind), options, kind)
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    calibration = calibration_batches(
        data.train, DataCollatorWithPadding(tokenizer), training, options.calibration_examples
    )

    def metrics(found: "EvalPrediction") -> dict[str, float]:
        return measure(task, np.asarray(found.predictions), np.asarray(found.label_ids))

    with enough_memory(options, training):
        trainer = ExportedTrainer(
            model,
            training,
            data_collator=collate,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=tokenizer,
            compute_metrics=metrics,
            callbacks=[fold_at(options.handover_at, model, calibration)] if options.handover_at else [],
            calibration=calibration,
            distillation_steps=options.distillation_steps,
            options=options,
        )
    refuse(past_the_end(trainer, checkpoint))
    start_record(trainer, options, examples={"train": len(data.train), "validation": len(data.validation)})

    output = trainer.output_folder
    with rescued(trainer, options, "training"):
        trainer.train(resume_from_checkpoint=checkpoint)
    with rescued(trainer, options, "evaluating"):
        results = {"task": options.task_name, "method": options.method, **trainer.outcome(data.validation)}
        if is_reslora(model):
            trainer.merged = False
            results["as trained"] = {
                name: task_metrics(trainer, rows, task.metrics) for name, rows in data.reported.items()
            }
    with rescued(trainer, options, "exporting"):
        export(trainer, options, kind)

    reloaded = PeftModel.from_pretrained(models.load_model(options, config, kind), output)
    settings = replace(training, eval_strategy="no", load_best_model_at_end=False, metric_for_best_model=None)
    judge = Trainer(reloaded, settings, data_collator=collate, processing_class=tokenizer, compute_metrics=metrics)
    results["as exported"] = {name: task_metrics(judge, rows, task.metrics) for name, rows in data.reported.items()}
    if trainer.is_world_process_zero():
        write_json(output / "results.json", results)
        write_json(output / "history.json", history(trainer))
        if destination:
            print(f"pushed to {destination.send(output)}")
        print(f"{options.task_name}, best step {results['best_step']}, the exported file: {results['as exported']}")
    return output


def task_metrics(trainer: "Trainer", rows: Sequence, names: Sequence[str]) -> dict[str, float]:
    """Metrics of rows that are reported on; under a prefix of their own, so that the history does not take them for
    evaluations that a step was chosen by."""
    found = trainer.evaluate(cast("Dataset", rows), metric_key_prefix="reported")
    return {name: found[f"reported_{name}"] for name in names}


if __name__ == "__main__":
    sys.exit(run_program(main))
