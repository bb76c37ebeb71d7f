"""Errors that end a run: the trained adapter is written before the error is reported.

    with rescued(run, "merging"):
        ...                    after an error a checkpoint is written, then `Stopped` says what failed and what is kept

Inside `Run.changing`, adapters and optimizer are half-way between two steps and cannot be kept; the newest checkpoint
is named instead. Where the output folder takes no checkpoint, the folder for temporary files may.
"""

import gc
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from ...utils.files import write_text
from ...utils.problems import BadInput, Interrupted, Stopped, enough_memory_or, first_line, is_out_of_memory, listing
from ..options import DreamBoothOptions
from .checkpoints import checkpoints_in
from .session import Run

DETAILS = "error.txt"
CONTINUE = "continue by --resume_from_checkpoint latest"
EXPECTED = (OSError, MemoryError, ValueError)  # their messages are for users; others are faults of the program


def memory_advice(options: DreamBoothOptions, training: bool = True) -> str:
    """The three options that save the most memory, among those that are not used yet."""
    several = options.train_batch_size > 1
    smaller = max(1, options.train_batch_size // 2)
    accumulated = options.gradient_accumulation_steps * 2
    choices = [
        (several and training, f"--train_batch_size {smaller} --gradient_accumulation_steps {accumulated}"),
        (training and not options.gradient_checkpointing, "--gradient_checkpointing"),
        (options.mixed_precision in (None, "no"), "--mixed_precision bf16"),
        (True, f"a --resolution below {options.resolution}"),
        (options.train_text_encoder, "--no-train_text_encoder"),
        (options.enable_t5_ti, "--no-enable_t5_ti"),
        (options.rank > 1, f"a --rank below {options.rank}"),
        (True, "--optimizer adamw8bit"),
        (True, "--validation_prompt left out"),
    ]
    return f"these options need less: {', '.join([text for applies, text in choices if applies][:3])}"


def release_memory() -> None:
    """Free the memory of a failed computation."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def enough_memory(options: DreamBoothOptions) -> AbstractContextManager:
    """Inside, nothing has been trained yet; raises `Stopped` with advice where the memory does not suffice."""
    return enough_memory_or(lambda: memory_advice(options))


@contextmanager
def rescued(run: Run, doing: str) -> Iterator[None]:
    """Inside, an error that ends the run is turned into `Stopped`, after what was trained has been written.

    Raises:
        Stopped: one line on what failed, what is kept where, and how to go on.
        Interrupted: a signal came while it was not training.
    """
    failure, quit_at_once = None, False
    try:
        yield
    except (BadInput, Stopped, Interrupted):
        raise
    except KeyboardInterrupt:
        if doing == "training":
            raise
        quit_at_once = True
    except Exception as error:
        failure, frames = error, traceback.format_exc()
    if quit_at_once:
        run.keep(run.step)
        raise Interrupted(f"after step {run.step}, while {doing}; {CONTINUE}")
    if failure is None:
        return
    failure.__traceback__ = None  # its frames hold the memory of the failed step
    release_memory()
    if is_out_of_memory(failure):
        cause = f"out of memory in step {run.step + 1} ({first_line(failure)}); {memory_advice(run.options)}"
        if doing != "training":
            cause = f"out of memory while {doing} ({first_line(failure)})"
    else:
        cause = f"{doing} failed: {type(failure).__name__}: {first_line(failure)}"
        if isinstance(failure, EXPECTED):
            cause = f"{doing} failed: {failure}"
        else:
            with suppress(OSError):
                write_text(run.output / DETAILS, frames)
                cause += f" (details in {run.output / DETAILS})"
    raise Stopped(f"{cause}. {kept(run)}") from failure


def kept(run: Run) -> str:
    """Write the state of the last whole step, and say where it is."""
    there = [path.name for path in checkpoints_in(run.output)]
    older = f"in {run.output}: {listing(reversed(there)) or 'no checkpoint'}"
    if run.step == 0:
        return f"No step was done; {older}"
    if not run.settled:
        return f"The step was half done and is not kept; {older}" + (f"; {CONTINUE}" if there else "")
    if problem := run.adapters.health_problem():
        return f"The adapters are not kept ({problem}); {older}"
    try:
        run.keep(run.step)
    except Stopped as error:
        return f"{error}; {older}"
    except Exception as error:  # a device that answers nothing any more
        return f"The last step could not be kept ({first_line(error)}); {older}"
    return f"Kept: checkpoint-{run.step} in {run.output} with all that was trained; {CONTINUE}, which also exports it"
