"""Where the memory does not suffice: what was trained is written, and three options that need less are named.

with enough_memory(options, training):     before the first step: there is nothing to keep
    model = ...
with rescued(trainer, options):            from then on
    trainer.train()
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainingArguments

from ..utils.hub import first_line
from ..utils.problems import Stopped, is_out_of_memory
from .options import ScriptOptions
from .resuming import checkpoints_in, fault_of
from .trainer import SHARDING, ExportedTrainer

SHOWN = 3


def memory_advice(options: ScriptOptions, training: TrainingArguments, evaluating: bool = False) -> str:
    """The three options that save the most memory, among those that are not used yet."""
    batch, longest = training.per_device_train_batch_size, options.max_length or 1024
    smaller = f"--per_device_train_batch_size {batch // 2}"
    accumulated = f"--gradient_accumulation_steps {2 * training.gradient_accumulation_steps}"
    answers = training.per_device_eval_batch_size
    choices = [
        (evaluating and answers > 1, f"--per_device_eval_batch_size {answers // 2}"),
        (batch > 1 and not evaluating, f"{smaller} {accumulated}"),
        (not training.gradient_checkpointing and not evaluating, "--gradient_checkpointing true"),
        (options.dtype == "float32", "--dtype bfloat16"),
        (evaluating and getattr(options, "num_beams", 1) > 1, "--num_beams 1"),
        (True, f"--max_length {max(1, longest // 2)}"),
        (evaluating and hasattr(options, "max_new_tokens"), "a smaller --max_new_tokens"),
        (True, f"a --rank below {options.rank}"),
        (True, "--optim adafactor"),
    ]
    return f"these options need less: {', '.join([text for applies, text in choices if applies][:SHOWN])}"


@contextmanager
def enough_memory(options: ScriptOptions, training: TrainingArguments) -> Iterator[None]:
    """Inside, nothing has been trained yet.

    Raises:
        Stopped: the memory does not suffice; says which options need less.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = first_line(error)
    if failure:
        raise Stopped(f"out of memory before the first step ({failure}); {memory_advice(options, training)}")


@contextmanager
def rescued(trainer: ExportedTrainer, options: ScriptOptions) -> Iterator[None]:
    """Inside, a trainer trains, evaluates and exports.

    Raises:
        Stopped: the memory did not suffice; says what is kept, how to continue, and which options need less.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = first_line(error)
    if failure is None:  # the frames of the failed step are gone by now, and their memory with them
        return
    evaluating = not trainer.own_model.training
    where = f"after step {trainer.state.global_step}" if evaluating else f"in step {trainer.state.global_step + 1}"
    advice = memory_advice(options, trainer.args, evaluating)
    raise Stopped(f"out of memory {where} ({failure}); {keep(trainer)}; {advice}")


def keep(trainer: ExportedTrainer) -> str:
    """Write a checkpoint of the last finished step unless there is one, and say what there is."""
    step = trainer.state.global_step
    folders = [folder for folder in checkpoints_in(trainer.output_folder) if fault_of(folder) is None]
    alone = trainer.accelerator.num_processes == 1 and trainer.accelerator.distributed_type not in SHARDING
    problem = ""
    if step and alone and not any(folder.name == f"checkpoint-{step}" for folder in folders):
        if trainer.optimizer is not None:
            trainer.optimizer.zero_grad()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            trainer.own_model.train()
            trainer._save_checkpoint(trainer.own_model, None)
            folders.insert(0, trainer.output_folder / f"checkpoint-{step}")
        except Exception as error:  # a full disk, memory again: what was there before is still there
            problem = f" (step {step} cannot be written: {first_line(error)})"
    if not folders:
        return f"nothing is kept{problem}"
    return f"{folders[0]} is kept{problem}, continue by --resume_from_checkpoint latest"
