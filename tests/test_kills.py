"""Runs that are killed at any event of the file system go on, bit for bit, and leave nothing half-written.

A child process counts what it does to files of its run, by Python's audit events, and kills itself at one of them. A
second one continues by `--resume_from_checkpoint latest`. What it exports must be what an undisturbed run exports.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dreambooth import PROMPT, train
from test_llm_script import folders as language_model  # noqa: F401, a fixture
from test_llm_script import run as run_llm
from tiny import tiny_pipeline_folder

pytestmark = pytest.mark.slow
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
KILLS = 13  # of each of the four runs below
PLAIN = {"task": None, "eval_strategy": "no", "load_best_model_at_end": False, "max_new_tokens": None}
DIFFUSION = {
    "block": {"shortcut": "block", "num_previous": 2, "train_text_encoder": True},
    "middle, handed over, averaged": {"shortcut": "middle", "handover": 0.5, "use_ema": True},
    "lora with class images": {
        "method": "lora",
        "with_prior_preservation": True,
        "class_prompt": "an animal",
        "num_class_images": 2,
        "validation_prompt": [PROMPT],
        "num_validation_images": 1,
        "validation_steps": 2,
    },
}


def changes_a_file(event: str, args: tuple) -> bool:
    return event in EVENTS and (event != "open" or "w" in str(args[1]) or "a" in str(args[1]) or args[1] is None)


def forked(program: Callable[[], object], folder: Path, die_at: int | None = None) -> tuple[int, int]:
    """Run a program in a child process; returns its status, and how many events there were in `folder`."""
    count = folder.with_name("count")
    count.write_bytes(b"")
    child = os.fork()
    if child == 0:
        seen = 0
        tally = os.open(count, os.O_WRONLY | os.O_APPEND)

        def hook(event: str, args: tuple) -> None:
            nonlocal seen
            if changes_a_file(event, args) and str(args[0]).startswith(str(folder)):
                seen += 1
                os.write(tally, b".")
                if seen == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            program()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), count.stat().st_size


def check_that_kills_lose_nothing(tmp_path: Path, run: Callable[..., object], result: str) -> None:
    """`run(folder, **options)` trains; `result` is what it exports."""
    tiny_pipeline_folder()  # made once, for all children
    whole = tmp_path / "whole" / "run"
    whole.parent.mkdir()
    status, events = forked(lambda: run(whole), whole)
    assert status == 0
    assert events > KILLS
    wanted = load_file(whole / result)
    for number in range(KILLS):
        die_at = 1 + number * (events - 1) // (KILLS - 1)
        folder = tmp_path / str(die_at) / "run"
        folder.parent.mkdir()
        status, _ = forked(lambda folder=folder: run(folder), folder, die_at)
        assert status == -signal.SIGKILL, f"event {die_at} of {events} was not reached"
        status, _ = forked(lambda folder=folder: run(folder, resume_from_checkpoint="latest"), folder)
        assert status == 0, f"killed at event {die_at} of {events}, it did not go on"
        found = load_file(folder / result)
        assert found.keys() == wanted.keys()
        unlike = [name for name in found if not np.array_equal(found[name], wanted[name])]
        assert unlike == [], f"killed at event {die_at} of {events}, it came out otherwise"
        hidden = [path for path in folder.rglob(".*") if path.name not in (".DS_Store",)]
        assert hidden == [], f"killed at event {die_at} of {events}, it left something behind"


@pytest.mark.parametrize("name", DIFFUSION)
def test_a_diffusion_run_that_is_killed_goes_on(tmp_path, name):
    options = {"max_train_steps": 4, "checkpointing_steps": 1, "checkpoints_total_limit": 2} | DIFFUSION[name]

    def run(folder: Path, **more: object) -> None:
        if "class_prompt" in options:
            more["class_data_dir"] = folder.with_name("classes")
        train(folder, **options | more)

    check_that_kills_lose_nothing(tmp_path, run, "pytorch_lora_weights.safetensors")


def test_a_language_model_run_that_is_killed_goes_on(tmp_path, language_model):  # noqa: F811
    options = {
        "shortcut": "middle",
        "dataset_name": language_model["talks"],
        "max_steps": 4,
        "save_steps": 1,
        **PLAIN,
    }

    def run(folder: Path, **more: object) -> None:
        run_llm(language_model, folder, **options | more)

    check_that_kills_lose_nothing(tmp_path, run, "adapter_model.safetensors")
