#!/usr/bin/env python
"""Fine-tune a causal language model with LoRA or ResLoRA, judge it by the answers it generates, export a plain LoRA.

    accelerate launch train_scripts/train_llm_reslora.py --config train_scripts/configs/gsm8k_llama2_7b.yaml

    # Your own data: one JSON object per line, {"prompt": ..., "response": ...} or {"messages": [...]}
    accelerate launch train_scripts/train_llm_reslora.py --model_name_or_path Qwen/Qwen3-0.6B --dtype bfloat16 \\
        --dataset_name my_data.jsonl --shortcut block --rank 8 --packing true --output_dir my-lora

    # The embedded model, on two CPU cores, in two minutes:
    python train_scripts/train_llm_reslora.py --model_name_or_path assets/tiny-llm --task svamp \\
        --dataset_name assets/tiny-llm/word_problems --learning_rate 3e-3 --max_new_tokens 40 --output_dir tiny-lora

    # Five seeds at three learning rates, one run after the other; the same command continues:
    reslora train-llm --seeds 5 --grid learning_rate=1e-4,3e-4,1e-3 --output_dir runs ...

What comes out, in --output_dir:

    adapter_config.json, adapter_model.safetensors   a plain LoRA for PEFT and vLLM, which need nothing of ours
    export_report.json                               what was proved about it
    generation_config.json                           the base's, and the tokens that answers were taught to end with
    results.json                                     exact match on the test rows: base, as trained, as exported
    predictions.jsonl                                every test answer of the exported LoRA
    history.json, run.json                           losses and evaluations; command, options, versions
    checkpoint-N/                                    PEFT's folder with the shortcut, and the Trainer's state

Every evaluation is of the merged LoRA; the best step is chosen on validation rows; test rows are used once, at the end.
`--resume_from_checkpoint latest` continues. `--help` lists our options and those of `transformers.TrainingArguments`.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reslora_diffusion.llm import reading
from reslora_diffusion.llm.checks import check, launcher_problems
from reslora_diffusion.llm.model_checks import length_problems
from reslora_diffusion.llm.options import LlmOptions, parse, training_arguments
from reslora_diffusion.utils.output_folder import alone_in
from reslora_diffusion.utils.problems import refuse, run_program, say

if TYPE_CHECKING:  # what needs torch is imported where it is used: `--help` and bad input should answer at once
    from transformers import TrainingArguments

    from reslora_diffusion.llm.data import Data
    from reslora_diffusion.llm.trainer import ExportedTrainer

DEFAULTS = {"output_dir": "reslora-llm"}


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, judge, export, and return the output folder.

    Raises:
        BadInput: every problem with the options, the data or the model.
    """
    options, values = parse(LlmOptions, argv, DEFAULTS)
    checkpoint, rows = check(
        options,
        values,
        reading.option_problems(options),
        lambda: reading.read(options, values.seed),
        metrics=["exact_match"] if options.task else [],
    )
    training = training_arguments(values)
    refuse(launcher_problems(options, training))
    with alone_in(values.output_folder):
        return train(options, training, rows, checkpoint)


def train(
    options: LlmOptions, training: "TrainingArguments", rows: reading.Reading | None, checkpoint: str | None
) -> Path:
    """Train by options that have been checked; `rows` is None where they have yet to be fetched."""
    from peft import TaskType
    from transformers import set_seed

    from reslora_diffusion.llm import data as llm_data
    from reslora_diffusion.llm import models
    from reslora_diffusion.llm.chunked_loss import ChunkedLossProbe
    from reslora_diffusion.llm.encoding import Collator, pack_examples, uses_flash_attention
    from reslora_diffusion.llm.packed_attention import attend_in_parts
    from reslora_diffusion.llm.preflight import past_the_end
    from reslora_diffusion.llm.pruning import pruning_problems
    from reslora_diffusion.llm.publishing import take_destination
    from reslora_diffusion.llm.rescue import enough_memory, rescued
    from reslora_diffusion.llm.results import export, history, start_record, together, write_json
    from reslora_diffusion.llm.trainer import ExactMatch, ExportedTrainer, PackingProbe, calibration_batches, fold_at

    kind = TaskType.CAUSAL_LM
    config = models.load_config(options, kind)
    context = models.context_length(config)
    problems = [*models.target_problems(config, options, kind), *length_problems(context, options.max_length)]
    refuse([*problems, *pruning_problems(config, options, kind)])
    tokenizer = models.load_tokenizer(options, config)
    options.max_length = options.max_length or min(1024, context or 1024)
    stops = models.stored_stops(options, config)
    data = llm_data.prepare(
        options, tokenizer, rows or reading.read(options, training.seed), models.embedding_rows(config), stops
    )
    data.notes += models.end_notes(tokenizer, data.ends, stops)
    say(data.notes)
    destination = take_destination(training)
    set_seed(training.seed)
    with enough_memory(options, training):
        base = models.load_model(options, config, kind)
        models.stop_at(base, data.ends)
        model = models.add_adapter(base, options, kind)
    alone = not training.torch_compile and training.n_gpu <= 1  # lists of lengths are neither compiled nor shared out
    parts = options.packing and alone and attend_in_parts(model, options.max_length)
    collate = Collator(tokenizer.pad_token_id, lengths=uses_flash_attention(model), parts=parts)
    calibration = calibration_batches(
        data.train, Collator(tokenizer.pad_token_id, multiple_of=1), training, options.calibration_examples
    )
    exact_match = None
    if data.read is not None:
        exact_match = ExactMatch(
            data.validation_questions,
            data.read,
            tokenizer,
            options.max_new_tokens,
            training.per_device_eval_batch_size,
            options.num_beams,
            options.max_total_tokens,
        )
    with enough_memory(options, training):
        trainer = ExportedTrainer(
            model,
            training,
            data_collator=collate,
            train_dataset=pack_examples(data.train, options.max_length) if options.packing else data.train,
            eval_dataset=data.validation,
            processing_class=tokenizer,
            callbacks=[fold_at(options.handover_at, model, calibration)] if options.handover_at else [],
            calibration=calibration,
            distillation_steps=options.distillation_steps,
            options=options,
            exact_match=exact_match,
        )
    if options.packing:
        trainer.add_callback(PackingProbe(collate, data.train, trainer.accelerator))
    if options.chunked_loss:
        trainer.add_callback(ChunkedLossProbe(collate(data.train[:2]), trainer.accelerator))
    counts = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test_questions)}
    refuse(past_the_end(trainer, checkpoint))
    start_record(trainer, options, examples=counts, notes=data.notes)

    output = trainer.output_folder
    with rescued(trainer, options, "training"):
        trainer.train(resume_from_checkpoint=checkpoint)
    with rescued(trainer, options, "evaluating"):
        results = {"task": options.task, "method": options.method, **trainer.outcome(data.validation)}
        results |= judge(trainer, options, data)
    with rescued(trainer, options, "exporting"):
        if trainer.is_world_process_zero():
            write_json(output / "results.json", results)
            write_json(output / "history.json", history(trainer))
            models.save_generation(base, output)
        export(trainer, options, kind)
        with together(trainer):
            if trainer.is_world_process_zero():
                print("\n".join(f"{name}: {value}" for name, value in results["test"].items()))
                if options.save_merged_model:
                    models.save_merged(options, output, tokenizer)
    if destination and trainer.is_world_process_zero():
        print(f"pushed to {destination.send(output)}")
    trainer.accelerator.wait_for_everyone()
    return output


def judge(trainer: "ExportedTrainer", options: LlmOptions, data: "Data") -> dict[str, Any]:
    """Exact match on the test rows, of the calibrated adapter and of the base."""
    from reslora_diffusion.llm.adapter_trainer import is_reslora
    from reslora_diffusion.llm.trainer import merged

    exact_match, model = trainer.exact_match, trainer.adapted
    if exact_match is None or data.test_read is None or not data.test_questions:
        return {"test": {}}
    test = replace(exact_match, questions=data.test_questions, read=data.test_read)
    with model.disable_adapter():
        answered = {"base": test.evaluate(model, trainer.accelerator)} if options.eval_base else {}
    if is_reslora(model):
        answered["as trained"] = test.evaluate(model, trainer.accelerator)
    with merged(model):
        answered["as exported"] = test.evaluate(model, trainer.accelerator)
    if trainer.is_world_process_zero():
        answered["as exported"].write(trainer.output_folder / "predictions.jsonl")
    return {
        "test": {name: str(found) for name, found in answered.items()},
        "exact_match": {name: found.exact_match for name, found in answered.items()},
    }


if __name__ == "__main__":
    sys.exit(run_program(main))
