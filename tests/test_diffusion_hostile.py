"""Files of strangers, and what a failing disk makes of ours: a value or one message, whatever they hold."""

import json
import shutil

import pytest

from dreambooth import SUBJECTS, arguments
from reslora_diffusion.diffusion.options.checks import check
from reslora_diffusion.diffusion.train.history import History, read_history
from reslora_diffusion.utils.model_files import Files, Unknown
from reslora_diffusion.utils.problems import BadInput
from tiny import tiny_pipeline_folder

BROKEN = [b"", b"{", b"[]", b"5", b'"x"', b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe\0"]
EMPTY = [b"{}", b'{"_class_name": 5}']
HEADERS = [b"[]", b'{"a": 1}', b'{"a.weight": {"dtype": 5, "shape": "x"}}', b"[" * 90_000]


@pytest.fixture
def base(tmp_path):
    """A copy of the tiny pipeline, whose files may be spoiled."""
    return shutil.copytree(tiny_pipeline_folder(), tmp_path / "base")


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_configurations_that_hold_something_else_are_one_message(tmp_path, base, file):
    for content in BROKEN if file.startswith("scheduler") else BROKEN + EMPTY:  # a scheduler may leave out everything
        (base / file).write_bytes(content)
        with pytest.raises(BadInput, match=str(base)):
            check(arguments(tmp_path / "out", pretrained_model_name_or_path=base))


def test_headers_and_indices_that_hold_something_else_tell_nothing(tmp_path):
    place = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    place.parent.mkdir()
    for header in HEADERS:
        place.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(Unknown):
            Files(str(tmp_path), None).shapes("unet")
    place.unlink()
    for content in BROKEN + EMPTY:
        place.with_name(f"{place.name}.index.json").write_bytes(content)
        with pytest.raises(Unknown):
            Files(str(tmp_path), None).shapes("unet")


def test_a_run_goes_on_whatever_its_metrics_hold(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    others = [b"5", b"[]", b'{"loss": 1}', b'{"step": "x"}', b"\xff", b"[" * 100_000, b"{"]
    lines = [json.dumps(rows[0]).encode(), *others, json.dumps(rows[1]).encode()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_history(tmp_path) == rows
    assert History(tmp_path, first_step=1).rows == rows[:1]


def test_captions_and_images_that_hold_something_else_are_one_message(tmp_path):
    folder = shutil.copytree(SUBJECTS / "octopus", tmp_path / "images")
    for line in (b"[1]", b"[" * 100_000, b'{"file_name": ["a"], "text": "x"}', b'{"file_name": "0.png", "text": 5}'):
        (folder / "metadata.jsonl").write_bytes(line)
        with pytest.raises(BadInput, match="metadata.jsonl, line 1: got"):
            check(arguments(tmp_path / "out", instance_data_dir=folder))
