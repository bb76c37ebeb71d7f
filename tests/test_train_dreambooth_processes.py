"""The DreamBooth script as a program: signals, kills, full disks, launchers, and several processes."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dreambooth import ROOT, SCRIPT, call, environment, train, train_without_export, words
from reslora_diffusion.diffusion.options.launcher import started_alone
from reslora_diffusion.diffusion.train.checkpoints import checkpoints_in
from reslora_diffusion.utils.output_folder import alone_in
from reslora_diffusion.utils.problems import BadInput, Stopped
from tiny import tiny_pipeline_folder

WEIGHTS = "pytorch_lora_weights.safetensors"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def start(output, **options) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *words(output, **options)]
    return subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(output, process, steps) -> None:
    """Until the metrics of a run show that many steps."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        path = output / "metrics.jsonl"
        if path.is_file() and path.read_text().count('"loss"') >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("the run took no steps")


def state(checkpoint) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "state" / "state.safetensors")


def assert_same(first, second) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(  # tests/test_programs.py sends SIGINT to `reslora train`, which runs the same
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM], ids=lambda number: number.name
)
def test_a_signal_finishes_the_step_saves_and_exits_with_0(tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, max_train_steps=100_000)
    wait_for_steps(folder, process, 2)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    (checkpoint,) = checkpoints_in(folder)
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"stopped after step {done} of 100000; continue by --resume_from_checkpoint latest" in said
    assert (checkpoint / WEIGHTS).is_file()
    assert not (folder / WEIGHTS).exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, done + 1))

    train(folder, max_train_steps=done + 2, resume_from_checkpoint="latest", checkpointing_steps=done + 2)
    whole = train_without_export(tmp_path / "whole", max_train_steps=done + 2, checkpointing_steps=done + 2)
    name = f"checkpoint-{done + 2}"
    assert_same(state(folder / name), state(whole / name))


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tmp_path, capsys):
    folder = tmp_path / "run"
    process = start(folder, max_train_steps=100_000, checkpointing_steps=2)
    wait_for_steps(folder, process, 5)
    process.kill()
    process.communicate()
    last = checkpoints_in(folder)[-1]
    done = int(last.name.removeprefix("checkpoint-"))

    # What a kill half-way through the next checkpoint leaves, and what a power cut can leave.
    partial = folder / f".checkpoint-{done + 2}.partial" / "state"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "state.safetensors").write_bytes(b"half")
    torn = folder / f"checkpoint-{done + 4}"
    shutil.copytree(last, torn)
    whole = (torn / "state" / "state.safetensors").read_bytes()
    (torn / "state" / "state.safetensors").write_bytes(whole[: len(whole) // 2])

    steps = done + 3
    train(folder, max_train_steps=steps, checkpointing_steps=steps, resume_from_checkpoint="latest")
    assert f"continuing from {last}" in capsys.readouterr().out
    assert not list(folder.glob(".*"))
    straight = train_without_export(tmp_path / "whole", max_train_steps=steps, checkpointing_steps=steps)
    assert_same(state(folder / f"checkpoint-{steps}"), state(straight / f"checkpoint-{steps}"))


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    said = f"another run is writing to {tmp_path / 'run'}; wanted another folder"
    with alone_in(tmp_path / "run"), pytest.raises(BadInput, match=re.escape(said)):
        train(tmp_path / "run")
    with alone_in(tmp_path / "run"):
        pass


def test_a_disk_that_is_full_stops_the_run_and_spoils_nothing(tmp_path):
    folder = train(tmp_path / "run", max_train_steps=2, checkpointing_steps=2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "checkpoint" in str(path)}
    options = {"resume_from_checkpoint": "latest", "max_train_steps": 6, "checkpointing_steps": 2}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # a checkpoint's state is larger
    try:
        with pytest.raises(Stopped, match="checkpoint-4 cannot be written"):
            train(folder, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-2"]
    assert not list(folder.glob(".checkpoint*"))
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_program_imports_nothing_heavy_to_answer_for_its_options():
    code = "import sys, train_dreambooth_reslora as s; s.parse_args(['--rank', '8']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(SCRIPT.parent),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False", done.stderr


# ------------------------------------------------------------------------------------------------ two processes

TWO = """
import os, sys
import torch.distributed
sys.path[:0] = [{tests!r}]
import dreambooth
dreambooth.script.main(dreambooth.script.parse_args(sys.argv[1:]))
assert torch.distributed.get_world_size() == 2, torch.distributed.get_world_size()
print("world size", torch.distributed.get_world_size())
"""


LAUNCHED = {"ACCELERATE_DYNAMO_MODE": "default"}
ALONE = LAUNCHED | {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}  # by `accelerate launch --cpu --num_processes 2`


def test_a_run_that_a_launcher_started_alone_says_so(tmp_path, monkeypatch, capsys):
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    train(tmp_path / "run", dry_run=True)
    assert "1 process trains: accelerate launch was asked for several" in capsys.readouterr().out


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_of_two_is_noticed(tmp_path):
    done = call(tmp_path / "run", *ACCELERATE, "--cpu", "--num_processes", "2", dry_run=True)
    assert done.returncode == 0, done.stderr
    assert "1 process trains: accelerate launch was asked for several" in done.stdout
    assert "`ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 ...`" in done.stdout


def test_who_was_started_alone_is_told_by_the_environment():
    assert started_alone(ALONE)
    for other in ({}, LAUNCHED, {"MASTER_ADDR": "a-cluster"}, ALONE | {"RANK": "0"}, ALONE | {"PMI_SIZE": "2"}):
        assert not started_alone(other), other


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shortcut", "launch"),
    [("input", TORCHRUN), ("block", [*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=0"])],
    ids=["torchrun", "accelerate launch"],
)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, shortcut, launch):
    program = tmp_path / "program.py"
    program.write_text(TWO.format(tests=str(ROOT / "tests")))
    options = {
        "shortcut": shortcut,
        "train_text_encoder": True,
        "with_prior_preservation": True,
        "class_data_dir": ROOT / "assets" / "subjects" / "panda",
        "class_prompt": "a sticker of an animal",
        "num_class_images": 3,
        "max_train_steps": 3,
        "checkpointing_steps": 3,
        "pretrained_model_name_or_path": tiny_pipeline_folder(),
        "learning_rate": 1e-3,
    }
    done = subprocess.run(
        [*launch, str(program), *words(tmp_path / "two", **options)],
        env=environment() | {"ACCELERATE_USE_CPU": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("world size 2") == 2
    assert "2 processes" in done.stdout
    one = train(tmp_path / "one", **options | {"train_batch_size": 4})
    first, second = state(tmp_path / "two" / "checkpoint-3"), state(one / "checkpoint-3")
    for name in first:
        if "lora_" in name and not name.startswith("optimizer"):
            torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=2e-5)
    exported = [load_file(folder / WEIGHTS) for folder in (tmp_path / "two", one)]
    for name in exported[0]:
        if name.endswith("lora_A.weight"):
            deltas = [tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float() for tensors in exported]
            torch.testing.assert_close(*deltas, rtol=0.05, atol=1e-5 + 0.01 * deltas[1].abs().max().item())


SHARDED = """
import sys
import torch
from torch.distributed.tensor import DTensor
sys.path[:0] = [{tests!r}]
import dreambooth
from reslora_diffusion.diffusion.models import load as models
shard = models.shard
def counted(denoiser, device):
    whole = sum(p.numel() for p in denoiser.parameters() if not p.requires_grad)
    shard(denoiser, device)
    held = [p.to_local().numel() for p in denoiser.parameters() if isinstance(p, DTensor)]
    print("world size", torch.distributed.get_world_size(), "held", round(sum(held) / whole, 2))
    assert all(p.requires_grad != isinstance(p, DTensor) for p in denoiser.parameters())
models.shard = counted
dreambooth.script.main(dreambooth.script.parse_args(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_sharded_base_trains_the_same_adapter(tmp_path):
    """The shipped configuration is run: FSDP 2, two processes, each with half of the frozen base."""
    program = tmp_path / "program.py"
    program.write_text(SHARDED.format(tests=str(ROOT / "tests")))
    options = {
        "shortcut": "middle",
        "max_train_steps": 3,
        "checkpointing_steps": 3,
        "pretrained_model_name_or_path": tiny_pipeline_folder(),
        "learning_rate": 1e-3,
        "gradient_checkpointing": True,
        "validation_prompt": ["a sticker of sks animal"],
        "num_validation_images": 1,
    }
    config = ROOT / "train_scripts" / "configs" / "accelerate" / "fsdp2.yaml"
    done = subprocess.run(
        [
            *ACCELERATE,
            "--config_file",
            str(config),
            "--num_processes",
            "2",
            str(program),
            *words(tmp_path / "two", **options),
        ],
        env=environment() | {"ACCELERATE_USE_CPU": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held 0.5") == 2, done.stdout
    one = train(tmp_path / "one", **options | {"train_batch_size": 4})
    first, second = state(tmp_path / "two" / "checkpoint-3"), state(one / "checkpoint-3")
    for name in first:
        if "lora_" in name and not name.startswith("optimizer"):
            torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("launcher", "options", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "wanted fsdp_version: 2"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "wanted zero_stage 2, or FSDP 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            {},
            "leaves every process but the first without the text encoders' weights",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            {"merge_method": "paper_weight"},
            "--merge_method paper_weight reads whole weights",
        ),
    ],
)
def test_a_launcher_that_does_not_fit_is_refused(tmp_path, monkeypatch, launcher, options, said):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=said):
        train(tmp_path / "run", **options)


# ------------------------------------------------------------------------------------------------ diffusers' own test

BASE = {
    "instance_prompt": "photo",
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 2,
    "seed": None,
    "calibration_batches": None,
    "report_to": None,
    "num_inference_steps": None,
    "learning_rate": None,
}
FULL = BASE | {"learning_rate": 5.0e-04, "scale_lr": True, "lr_scheduler": "constant", "lr_warmup_steps": 0}


@pytest.mark.slow
class TestAsDiffusersTestsItsOwnScript:
    """Commands and assertions of examples/dreambooth/test_dreambooth_lora.py, on a pipeline that needs no network."""

    def launch(self, folder, **options) -> None:
        done = call(folder, *ACCELERATE, **options)
        assert done.returncode == 0, done.stderr

    def test_lora(self, tmp_path):
        self.launch(tmp_path, **FULL)
        keys = load_file(tmp_path / WEIGHTS).keys()
        assert all("lora" in key for key in keys)
        assert all(key.startswith("unet") for key in keys)

    def test_with_text_encoder(self, tmp_path):
        self.launch(tmp_path, **FULL, train_text_encoder=True)
        keys = load_file(tmp_path / WEIGHTS).keys()
        assert any(key.startswith("text_encoder") for key in keys)
        assert all(key.startswith(("unet", "text_encoder")) for key in keys)

    def test_checkpoints_total_limit(self, tmp_path):
        self.launch(tmp_path, **BASE | {"max_train_steps": 6}, checkpoints_total_limit=2, checkpointing_steps=2)
        assert {name for name in os.listdir(tmp_path) if "checkpoint" in name} == {"checkpoint-4", "checkpoint-6"}

    def test_checkpoints_total_limit_removes_multiple_checkpoints(self, tmp_path):
        self.launch(tmp_path, **BASE | {"max_train_steps": 4}, checkpointing_steps=2)
        assert {name for name in os.listdir(tmp_path) if "checkpoint" in name} == {"checkpoint-2", "checkpoint-4"}
        self.launch(
            tmp_path,
            **BASE | {"max_train_steps": 8},
            checkpointing_steps=2,
            resume_from_checkpoint="checkpoint-4",
            checkpoints_total_limit=2,
        )
        assert {name for name in os.listdir(tmp_path) if "checkpoint" in name} == {"checkpoint-6", "checkpoint-8"}
