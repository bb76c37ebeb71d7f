"""The programs as commands, and what a signal does to them with a launcher in between and without."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from dreambooth import ROOT, SCRIPT, environment, words
from reslora_diffusion.cli import app
from reslora_diffusion.diffusion.train.checkpoints import checkpoints_in
from reslora_diffusion.programs import launch_words
from reslora_diffusion.utils.stopping import started_by_a_launcher
from test_train_dreambooth_processes import ACCELERATE, wait_for_steps

RESLORA = [sys.executable, "-m", "reslora_diffusion.cli"]


def start(*command: object, **more: str) -> subprocess.Popen:
    """A command in a session of its own, as a terminal has one."""
    return subprocess.Popen(
        list(map(str, command)),
        env=environment() | more,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def trainings_in(folder) -> list[psutil.Process]:
    """Processes that train into a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(folder) in line and "accelerate.commands.launch" not in line and "reslora_diffusion.cli" not in line:
            found.append(process)
    return found


def wait_until_nothing_trains(folder) -> None:
    end = time.monotonic() + 120
    while trainings_in(folder):
        assert time.monotonic() < end, "it trains on, unattended"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_launcher_that_ends_leaves_no_unattended_training_and_a_checkpoint(tmp_path, number):
    folder = tmp_path / "run"
    launcher = start(*ACCELERATE, SCRIPT, *words(folder, max_train_steps=100_000))
    wait_for_steps(folder, launcher, 2)
    launcher.send_signal(number)
    launcher.wait(timeout=60)
    wait_until_nothing_trains(folder)
    assert len(checkpoints_in(folder)) == 1


@pytest.mark.slow
def test_ctrl_c_under_a_launcher_saves_once(tmp_path):
    """The terminal tells both: the launcher ends at once, and its end is no second Ctrl-C."""
    folder = tmp_path / "run"
    launcher = start(*ACCELERATE, SCRIPT, *words(folder, max_train_steps=100_000))
    wait_for_steps(folder, launcher, 2)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.wait(timeout=60)
    wait_until_nothing_trains(folder)
    assert len(checkpoints_in(folder)) == 1


def test_reslora_train_has_saved_when_it_returns(tmp_path):
    folder = tmp_path / "run"
    process = start(*RESLORA, "train", *words(folder, max_train_steps=100_000))
    wait_for_steps(folder, process, 2)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    (checkpoint,) = checkpoints_in(folder)
    assert f"stopped after step {checkpoint.name.removeprefix('checkpoint-')} of 100000" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_reslora_train_by_two_processes_has_saved_when_it_returns(tmp_path, number):
    folder = tmp_path / "run"
    launch = ["--num_processes", "2", "--main_process_port", "0"]
    process = start(*RESLORA, "train", *launch, *words(folder, max_train_steps=100_000), ACCELERATE_USE_CPU="1")
    wait_for_steps(folder, process, 2)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    assert len(checkpoints_in(folder)) == 1
    assert not trainings_in(folder)


def test_options_of_the_launcher_are_told_from_those_of_the_program():
    assert launch_words(["--rank", "4", "--config", "a.yaml"]) == ([], ["--rank", "4", "--config", "a.yaml"])
    line = ["--config_file=f.yaml", "--rank", "4", "--num_processes", "2"]
    assert launch_words(line) == (["--config_file=f.yaml", "--num_processes", "2"], ["--rank", "4"])


def test_only_processes_of_a_launcher_watch_their_parent():
    assert not started_by_a_launcher({"ACCELERATE_MIXED_PRECISION": "no"})
    assert started_by_a_launcher({"ACCELERATE_DYNAMO_MODE": "default"})
    assert started_by_a_launcher({"TORCHELASTIC_RUN_ID": "none"})


@pytest.mark.parametrize(
    ("command", "option"),
    [("train", "--instance_data_dir"), ("train-llm", "--dataset_name"), ("glue", "--task_name"), ("compare", "--runs")],
)
def test_each_command_is_its_program(tmp_path, command, option):
    done = subprocess.run(
        [*RESLORA, command, "--help"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


def test_exit_codes_are_the_programs(tmp_path):
    done = subprocess.run([*RESLORA, "train", "--rank", "-1"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "--rank: got -1, wanted 1 or more" in done.stderr


def test_env_says_versions_devices_and_the_options_of_a_run(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": ["train.py"], "options": {"rank": 4}}))
    found = json.loads(CliRunner().invoke(app, ["env", str(tmp_path), "--json"]).stdout)
    assert found["options"] == '{"rank": 4}'
    assert {"python", "platform", "torch", "peft", "devices", "threads", "command"} <= found.keys()
    (tmp_path / "run.json").write_text("{")
    broken = CliRunner().invoke(app, ["env", str(tmp_path)])
    assert broken.exit_code == 2
    assert "no run.json that can be read" in broken.stderr
