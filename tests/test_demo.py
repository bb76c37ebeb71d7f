"""The demo: three processes that share nothing but files, one sheet, one plot, one JSON, three lines."""

import ast
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from dreambooth import ROOT, SUBJECTS, demo, environment, generate, train
from tiny import tiny_pipeline_folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return {method: train(folder / method, method=method, train_text_encoder=True) for method in ("lora", "reslora")}


def test_generating_needs_nothing_of_ours():
    tree = ast.parse((ROOT / "train_scripts" / "generate.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("reslora") for name in imported)


def test_each_column_is_generated_by_its_own_file_from_the_same_noise(tmp_path, exported):
    words = ["--pretrained_model_name_or_path", str(tiny_pipeline_folder()), "--output_dir", str(tmp_path)]
    words += ["--lora", *(f"{name}={folder}" for name, folder in exported.items())]
    words += ["--prompt", "a dog", "a cat", "--seed", "3", "4", "--num_inference_steps", "2"]
    generate.main(generate.parse_args(words))
    for label, folder in (("base", None), *exported.items()):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
        pipe.set_progress_bar_config(disable=True)
        if folder:
            pipe.load_lora_weights(folder)
        image = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(4)).images[0]
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / label / "1-4.png")))
        assert len(list((tmp_path / label).iterdir())) == 4


def test_the_sheet_has_a_column_for_each_model(tmp_path):
    args = demo.parse_args(["--output_dir", str(tmp_path)])
    for number, label in enumerate(("base", *demo.RUNS)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for n in range(len(demo.BACKGROUNDS)):
            for seed in demo.SEEDS:
                Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(tmp_path / "images" / label / f"{n}-{seed}.png")
    sheet = np.asarray(Image.open(demo.draw_sheet(args)))
    places = [np.nonzero((sheet == (80 * number, 0, 0)).all(-1))[1] for number in (1, 2)]
    assert places[0].size == places[1].size > 0
    assert places[0].max() < places[1].min()


def test_a_run_that_fails_ends_the_demo_with_its_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train_scripts" / "demo.py", "--output_dir", tmp_path, "--rank", "0"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--rank: got 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    command = [sys.executable, ROOT / "train_scripts" / "demo.py", "--max_train_steps", "3", "--output_dir", tmp_path]
    command += ["--pretrained_model_name_or_path", tiny_pipeline_folder(), "--instance_data_dir", SUBJECTS / "cake"]
    for _ in range(2):  # the second time over the first's files
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-3:]
    assert [line.split(":")[0] for line in last] == [
        str(tmp_path / name) for name in ("contact_sheet.png", "loss.png", "demo.json")
    ]
    assert "LOAD REPORT" not in done.stderr
    assert "Warning" not in done.stderr
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["settings"]["max_train_steps"] == 3
    assert set(figures["runs"]) == {"LoRA", "ResLoRA"}
    for run in figures["runs"].values():
        assert run["merge_report"]["loss_trained"] < run["merge_report"]["loss_base"]
        assert run["run"]["versions"]["torch"]
        assert run["export_report"]["loaders"]
    assert Image.open(tmp_path / "contact_sheet.png").width > 600
    for method in demo.RUNS.values():  # what the app's Race tab shows
        samples = sorted(path.parent.name for path in (tmp_path / method / "samples").glob("step-*/[0-1]-0.png"))
        assert samples == [f"step-{step:06d}" for step in range(4) for _ in range(demo.WATCHED)]
