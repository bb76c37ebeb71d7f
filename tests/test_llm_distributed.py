"""Two processes on a CPU train what one does: gradients, calibration and answers are shared out and put together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_tiny import ROOT
from test_llm_script import folders, words  # noqa: F401  (a fixture)

SCRIPT = ROOT / "train_scripts" / "train_llm_reslora.py"


def launch(processes: int, arguments: list[str]) -> None:
    """`torchrun` with gloo: `accelerate launch --cpu --num_processes 2` starts a single process."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(SCRIPT), *arguments]
    settings = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def results(output: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(output / "adapter_model.safetensors"), json.loads((output / "results.json").read_text())


def options(batch_size: int) -> dict:
    return {
        "shortcut": "middle",
        "num_previous": 2,
        "optim": "sgd",  # Adam would turn rounding of tiny gradients into whole steps
        "learning_rate": 1.0,
        "warmup_steps": 0,
        "per_device_train_batch_size": batch_size,
        "load_best_model_at_end": False,
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_equal_one(folders, tmp_path):  # noqa: F811
    launch(1, words(folders, tmp_path / "one", **options(4)))
    launch(2, words(folders, tmp_path / "two", **options(2)))
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"].startswith("2, ")
    (one, found_one), (two, found_two) = results(tmp_path / "one"), results(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    assert found_two["exact_match"] == found_one["exact_match"]
    assert found_two["merging"]["loss_merged"] == pytest.approx(found_one["merging"]["loss_merged"], abs=1e-4)
