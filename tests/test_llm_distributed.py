"""Two processes on a CPU train what one does: replicated (DDP), and sharded as in the shipped configurations.

Gradients, calibration and answers are shared out and put together.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_tiny import ROOT
from test_llm_script import folders, words  # noqa: F401  (a fixture)

SCRIPT = ROOT / "train_scripts" / "train_llm_reslora.py"
CONFIGS = ROOT / "train_scripts" / "configs" / "accelerate"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "lora_dropout": 0.1}


def launch(processes: int, arguments: list[str], sharded_by: str | None = None) -> None:
    done = launched(processes, arguments, sharded_by)
    assert done.returncode == 0, done.stderr[-3000:]


def launched(processes: int, arguments: list[str], sharded_by: str | None = None) -> subprocess.CompletedProcess[str]:
    """`torchrun` with gloo: `accelerate launch --cpu --num_processes 2` starts a single process."""
    program = [ROOT / "tests" / "sharded.py", SCRIPT] if sharded_by else [SCRIPT]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *map(str, program), *arguments]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings |= shipped_settings(sharded_by) if sharded_by else {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True)


def shipped_settings(name: str) -> dict[str, str]:
    """The environment that `accelerate launch --config_file` gives its processes, which here are not on GPUs."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = [f"--config_file={CONFIGS / name}.yaml", "--num_processes=2", "--main_process_port=0", "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    given = {key: value for key, value in env.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    return given | {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


def test_a_refused_export_is_said_once(folders, tmp_path):  # noqa: F811
    """One step of a warm-up leaves lora_B at zero. The second process neither waits for the first nor raises."""
    options = {"task": None, "dataset_name": folders["talks"], "max_steps": 1, "warmup_steps": 1, "save_strategy": "no"}
    done = launched(
        2, words(folders, tmp_path / "out", **options, save_steps=None, eval_strategy="no", eval_steps=None)
    )
    assert done.returncode == 1
    assert done.stderr.count("the adapter changes nothing") == 1, done.stderr[-3000:]
    assert "reslora_diffusion/llm" not in done.stderr  # torchrun has a traceback of its own, of no file of ours


def results(output: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(output / "adapter_model.safetensors"), json.loads((output / "results.json").read_text())


def assert_same(one: Path, two: Path, by: str, atol: float) -> None:
    assert json.loads((two / "run.json").read_text())["processes"] == f"2, {by}"
    (factors, found), (others, found_two) = results(one), results(two)
    assert factors.keys() == others.keys()
    assert max(value.abs().max() for name, value in factors.items() if "lora_B" in name) > 0.1
    for name, value in factors.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=atol)
    assert found_two["exact_match"] == found["exact_match"]
    assert found_two["best_step"] == found["best_step"]
    assert found_two["merging"]["loss_merged"] == pytest.approx(found["merging"]["loss_merged"], abs=1e-4)


def options(batch_size: int, shortcut: str = "middle") -> dict:
    return {
        "shortcut": shortcut,
        "num_previous": 1 if shortcut == "input" else 2,
        "optim": "sgd",  # Adam would turn rounding of tiny gradients into whole steps
        "learning_rate": 1.0,
        "warmup_steps": 0,
        "per_device_train_batch_size": batch_size,
    }


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):  # noqa: F811
    """Runs of one process, by shortcut."""
    root, found = tmp_path_factory.mktemp("alone"), {}

    def run(shortcut: str) -> Path:
        if shortcut not in found:
            launch(1, words(folders, root / shortcut, **options(4, shortcut)))
            found[shortcut] = root / shortcut
        return found[shortcut]

    return run


def test_two_processes_equal_one(folders, alone, tmp_path):  # noqa: F811
    launch(2, words(folders, tmp_path / "two", **options(2)))
    assert_same(alone("middle"), tmp_path / "two", "DistributedType.MULTI_CPU", atol=1e-5)


@pytest.mark.parametrize(
    "schedule", ["coto", "restart:stages=2,momentum=0.5,warmup=0", "restart:stages=2,merge=true", "ranks:every=1"]
)
def test_two_processes_follow_one_schedule(schedule, folders, tmp_path):  # noqa: F811
    """One of them computes with gates on the device, as DDP waits for a gradient of every factor, the other without."""
    more = {"shortcut": "block", "schedule": schedule}
    for processes in (1, 2):
        launch(processes, words(folders, tmp_path / str(processes), **options(4 // processes) | more))
    assert_same(tmp_path / "1", tmp_path / "2", "DistributedType.MULTI_CPU", atol=1e-5)


def test_two_processes_prune_alike(folders, tmp_path):  # noqa: F811
    more = {"shortcut": "none", "schedule": "prune:ratio=0.5,every=1", "load_best_model_at_end": False}
    for processes in (1, 2):
        given = options(4 // processes) | more | {"target_modules": "all-linear"}
        launch(processes, words(folders, tmp_path / str(processes), **given))
    one, two = (load_file(tmp_path / count / "pruned" / "model.safetensors") for count in ("1", "2"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_sharded_by_fsdp2_they_equal_one(shortcut, folders, alone, tmp_path):  # noqa: F811
    launch(2, words(folders, tmp_path / "two", **options(2, shortcut)), "fsdp2")
    assert_same(alone(shortcut), tmp_path / "two", "DistributedType.FSDP", atol=5e-5)


@pytest.mark.parametrize("shortcut", ["block", "middle"])
def test_the_first_process_alone_may_read_the_weights(shortcut, folders, alone, tmp_path):  # noqa: F811
    """The second has them on the meta device until the first sends them."""
    assert shipped_settings("fsdp2_ram_efficient")["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    launch(2, words(folders, tmp_path / "two", **options(2, shortcut)), "fsdp2_ram_efficient")
    assert_same(alone(shortcut), tmp_path / "two", "DistributedType.FSDP", atol=5e-5)


@pytest.mark.parametrize("shortcut", ["block", "middle"])
def test_sharded_by_zero3_they_equal_one(shortcut, folders, alone, tmp_path):  # noqa: F811
    pytest.importorskip("deepspeed")
    launch(2, words(folders, tmp_path / "two", **options(2, shortcut)), "deepspeed_zero3")
    assert_same(alone(shortcut), tmp_path / "two", "DistributedType.DEEPSPEED", atol=5e-5)


@pytest.mark.parametrize("by", ["fsdp2", "deepspeed_zero3"])
def test_a_sharded_run_resumes_to_the_same_end_and_its_checkpoints_are_peft_s(by, folders, tmp_path):  # noqa: F811
    if by == "deepspeed_zero3":
        pytest.importorskip("deepspeed")
    given = options(2) | ADAM | {"load_best_model_at_end": False, "save_merged_model": by == "fsdp2"}
    launch(2, words(folders, tmp_path / "whole", **given), by)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    launch(2, words(folders, tmp_path / "again", **given, resume_from_checkpoint=checkpoint), by)
    whole, again = results(tmp_path / "whole")[0], results(tmp_path / "again")[0]
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)

    def base():
        return AutoModelForCausalLM.from_pretrained(folders["model"])

    stored = PeftModel.from_pretrained(base(), checkpoint)
    assert stored.peft_config["default"].peft_type == "RESLORA"
    assert all(p.numel() and p.abs().max() > 0 for n, p in stored.named_parameters() if "lora_" in n)
    if by == "fsdp2":
        ids = torch.tensor([[1, 50, 51, 52]])
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "merged")
        exported = PeftModel.from_pretrained(base(), tmp_path / "again")
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, exported(ids).logits, rtol=1e-4, atol=1e-4)
            assert (merged(ids).logits - base()(ids).logits).abs().max() > 1e-3
