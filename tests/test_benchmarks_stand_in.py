"""What `benchmarks.run` needs: transforms where torchvision is not installed, and a clock around the parts of a run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import phases, stand_in
from benchmarks.run import program_of, unequal_batches
from dreambooth import ROOT, SUBJECTS
from reslora_diffusion.diffusion.models import load
from reslora_diffusion.diffusion.train import finishing, setup
from tiny import tiny_pipeline_folder

STEPS = """
from torchvision import transforms
from diffusers import StableDiffusionPipeline
from transformers import AutoTokenizer
print(sorted(f.lower() for f in dir(transforms.InterpolationMode) if not f.startswith("_")))
"""


def test_a_script_finds_them_and_the_libraries_do_not(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(STEPS, encoding="utf-8")
    done = subprocess.run(
        [*program_of(tmp_path / "script.py"), "--x"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "lanczos" in done.stdout, done.stderr


def test_they_compute_what_torchvision_documents() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    small = stand_in.Resize(20, stand_in.InterpolationMode.LANCZOS)(image)
    assert small.size == (32, 20)
    found = stand_in.Compose([stand_in.CenterCrop(16), stand_in.ToTensor(), stand_in.Normalize([0.5], [0.5])])(small)
    wanted = torch.tensor(np.asarray(small)[2:18, 8:24]).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(found, wanted)
    torch.manual_seed(0)
    corners = {stand_in.RandomCrop(48).corner(image) for _ in range(500)}
    assert {x for x, _ in corners} == set(range(33))
    assert {y for _, y in corners} == {0, 1, 2}


def test_what_is_installed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.run.find_spec", lambda name: object())
    assert program_of(Path("x.py")) == [sys.executable, "x.py"]


def test_both_scripts_train_equal_batches() -> None:
    data = SUBJECTS / "octopus"  # of five images, diffusers' script trains four and then one
    assert [*unequal_batches(data, 5)] == [*unequal_batches(data, 1)] == []
    (problem,) = unequal_batches(data, 4)
    assert "--batch_size: got 4, wanted a divisor of the 5 images" in problem


def test_every_part_of_a_run_has_its_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((load, "load_pipeline"), (setup, "encode_examples"), (finishing, "finish")):
        monkeypatch.setattr(module, name, getattr(module, name))  # puts them back, which `phases` replaces
    given = {"pretrained_model_name_or_path": tiny_pipeline_folder(), "instance_data_dir": SUBJECTS / "octopus"}
    given |= {"instance_prompt": "sks", "resolution": 64, "max_train_steps": 1, "output_dir": tmp_path / "run"}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    script = str(ROOT / "train_scripts" / "train_dreambooth_reslora.py")
    monkeypatch.setattr(sys, "argv", ["phases", script, *words, "--method", "lora", "--report_to", "none"])
    monkeypatch.setenv(phases.FILE, str(tmp_path / "phases.json"))
    monkeypatch.setenv(phases.BEGAN, str(time.monotonic()))
    assert phases.main() == 0
    spent = json.loads((tmp_path / "phases.json").read_text())
    assert spent.keys() == {"loading", "caching", "preparing", "steps", "saving", "start-up"}
    assert min(spent.values()) > 0


def test_the_full_size_pipeline_has_the_published_numbers_of_parameters() -> None:
    from benchmarks.full_size import pipeline

    with torch.device("meta"):
        pipe = pipeline()
    counts = [sum(p.numel() for p in module.parameters()) for module in (pipe.unet, pipe.vae)]
    assert counts == [859_520_964, 83_653_863]
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 77
