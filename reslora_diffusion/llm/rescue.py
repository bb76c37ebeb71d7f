"""Errors that end a run: what was trained is written before the error is reported.

with enough_memory(options, training):     before the first step: there is nothing to keep
    model = ...
with rescued(trainer, options, "training"):            from then on
    trainer.train()
with rescued(trainer, options, "exporting"):
    ...
"""

import gc
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments

from ..utils.files import write_text
from ..utils.problems import BadInput, Interrupted, Stopped, enough_memory_or, first_line, is_out_of_memory
from .adapter_trainer import SHARDING, AdapterTrainer
from .options import ScriptOptions
from .resuming import checkpoints_in, fault_of

SHOWN = 3
DETAILS = "error.txt"
EXPECTED = (OSError, MemoryError, ValueError, SafetensorError)  # their messages are for users


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


def enough_memory(options: ScriptOptions, training: TrainingArguments) -> AbstractContextManager:
    """Inside, nothing has been trained yet.

    Raises:
        Stopped: the memory does not suffice; says which options need less.
    """
    return enough_memory_or(lambda: memory_advice(options, training))


@contextmanager
def rescued(trainer: AdapterTrainer, options: ScriptOptions, doing: str) -> Iterator[None]:
    """Inside, a trainer trains, evaluates or exports; an error becomes `Stopped`, after what was trained has been kept.

    Raises:
        Stopped: one message on what failed, what is kept, and how to continue; which options need less memory.
        Interrupted: a signal came while it was not training.
    """
    failure: BaseException | None = None
    try:
        yield
    except (BadInput, Stopped, Interrupted):
        raise
    except KeyboardInterrupt as error:
        if doing == "training":  # the second signal: to quit at once
            raise
        failure = error
    except Exception as error:
        failure, frames = error, traceback.format_exc()
    if failure is None:
        return
    failure.__traceback__ = None  # its frames hold the memory of the failed step
    step = trainer.state.global_step
    if isinstance(failure, KeyboardInterrupt):
        raise Interrupted(f"after step {step}, while {doing}; {keep(trainer)}")
    if is_out_of_memory(failure):
        evaluating = not trainer.own_model.training
        where = f"after step {step}" if evaluating else f"in step {step + 1}"
        advice = memory_advice(options, trainer.args, evaluating)
        raise Stopped(f"out of memory {where} ({first_line(failure)}); {keep(trainer)}; {advice}")
    cause = f"{doing} failed: {failure}"
    if not isinstance(failure, EXPECTED):
        cause = f"{doing} failed: {type(failure).__name__}: {first_line(failure)}"
        with suppress(OSError):
            write_text(trainer.output_folder / DETAILS, frames)
            cause += f" (details in {trainer.output_folder / DETAILS})"
    raise Stopped(f"{cause}. {keep(trainer)}") from failure


def keep(trainer: AdapterTrainer) -> str:
    """Write a checkpoint of the last finished step unless there is one, and say what there is and how to continue."""
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
        trainer.own_model.train()
        try:
            trainer._save_checkpoint(trainer.own_model, None)
            folders.insert(0, trainer.output_folder / f"checkpoint-{step}")
        except Exception as error:  # a full disk, memory again: what was there before is still there
            problem = f" (step {step} cannot be written: {first_line(error)}{written_elsewhere(trainer, step)})"
    if not folders:
        return f"nothing is kept in {trainer.output_folder}{problem}"
    return f"{folders[0]} is kept{problem}, continue by --resume_from_checkpoint latest, which also exports it"


def written_elsewhere(trainer: AdapterTrainer, step: int) -> str:
    """Write a checkpoint that the output folder does not take among the temporary files; return where, in words."""
    output = trainer.output_folder
    try:
        trainer.args.output_dir = tempfile.mkdtemp(prefix=f"{output.resolve().name}-")
        trainer._save_checkpoint(trainer.own_model, None)
        place = trainer.output_folder / f"checkpoint-{step}"
        return f"; it is in {place} instead: move it into {output} to continue from it"
    except Exception:  # that disk may be full too
        return ""
    finally:
        trainer.args.output_dir = str(output)
