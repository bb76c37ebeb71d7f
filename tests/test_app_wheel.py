"""The wheel holds what the page needs: installed alone, far from the source, it finds and runs the training script."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("build", reason="build is not installed: pip install '.[dev]'")

from app_fixtures import make_pipeline

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("app", "reslora_diffusion", "train_scripts")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
TRAIN = """
import sys
from pathlib import Path
from PIL import Image
from reslora_diffusion.app.trainer import Trainer
from reslora_diffusion.app.training import Method, TrainRequest
trainer = Trainer(Path("trained").resolve(), sys.argv[1], 64)
asked = TrainRequest("a cat", Method.INPUT, max_train_steps=1, rank=2, train_batch_size=1)
training = trainer.start(asked, [Image.new("RGB", (64, 64), "teal")], "me")
assert training.process.wait() == 0, training.log()
print(*training.adapters())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the source and installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    python = [sys.executable, "-m"]
    build = ["build", "--wheel", "--no-isolation", "--outdir", folder, source]
    subprocess.run([*python, *build], check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run([*python, *install], check=True, capture_output=True)
    return folder / "site"


def run_with(site: Path, cwd: Path, *words: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_is_in_the_wheel_and_answers(site, tmp_path):
    found = run_with(site, tmp_path, "-c", "from reslora_diffusion.app.trainer import SCRIPT; print(SCRIPT)").strip()
    assert Path(found) == (site / "reslora_diffusion" / "train_scripts" / "train_dreambooth_reslora.py").resolve()
    for words in ([found], ["-m", "reslora_diffusion.train_scripts.train_dreambooth_reslora"]):
        assert "--instance_data_dir" in run_with(site, tmp_path, *words, "--help")


def test_the_programs_are_commands_of_the_wheel(site, tmp_path):
    for command, option in (("train", "--instance_data_dir"), ("train-llm", "--dataset_name"), ("glue", "--task_name")):
        assert option in run_with(site, tmp_path, "-m", "reslora_diffusion.cli", command, "--help")


def test_the_page_says_that_the_embedded_pipeline_is_elsewhere(site, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "reslora_diffusion.app"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "give --base the folder of a pipeline" in done.stderr


def test_a_training_is_started_from_the_wheel(site, tmp_path):
    make_pipeline(tmp_path / "base")
    adapter = run_with(site, tmp_path, "-c", TRAIN, tmp_path / "base").strip()
    assert Path(adapter).is_file()
    assert Path(adapter).is_relative_to(tmp_path / "trained")


def test_nothing_generic_lands_in_site_packages(site):
    assert sorted(p.name for p in site.iterdir() if not p.name.endswith(".dist-info") and p.name != "bin") == [
        "reslora_diffusion"
    ]


def test_reslora_compare_and_train_answer_from_the_wheel(site, tmp_path):
    for words in (["compare", "--help"], ["train", "--help"], ["train-llm", "--help"], ["glue", "--help"]):
        start = f"import sys; sys.argv = ['reslora', *{words!r}]; from reslora_diffusion.cli import main; main()"
        assert "usage" in run_with(site, tmp_path, "-c", start).lower()
