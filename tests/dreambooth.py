"""What tests of the DreamBooth trainer share: its script as a module, and options for a short run."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from PIL import Image

from reslora_diffusion.diffusion.options.checks import check
from reslora_diffusion.diffusion.train.validating import validate
from tiny import tiny_pipeline_folder

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = ROOT / "assets" / "subjects"
SCRIPT = ROOT / "train_scripts" / "train_dreambooth_reslora.py"
PROMPT = "a sticker of sks animal"
sys.path.insert(0, str(SCRIPT.parent))

import demo  # noqa: E402, F401
import generate  # noqa: E402, F401
import train_dreambooth_reslora as script  # noqa: E402

DEFAULTS = {
    "resolution": 64,
    "instance_data_dir": SUBJECTS / "octopus",
    "instance_prompt": PROMPT,
    "train_batch_size": 2,
    "max_train_steps": 3,
    "calibration_batches": 2,
    "learning_rate": 0.01,
    "seed": 0,
    "report_to": "none",
    "num_inference_steps": 2,
}


def several_sizes(folder: Path) -> dict[str, object]:
    """Options with images of two shapes, masks, captions, and square class images."""
    (folder / "wide").mkdir()
    for number in range(3):
        image = Image.open(SUBJECTS / "cake" / f"{number}.png").convert("RGBA").resize((96, 60))
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(folder / "wide" / f"{number}.png")
        (folder / "wide" / f"{number}.txt").write_text(f"a sticker of cake {number}")
    concept = {"instance_data_dir": str(folder / "wide"), "instance_prompt": "ohwx cake"}
    concept |= {"class_data_dir": str(SUBJECTS / "teapot"), "class_prompt": "a thing", "num_class_images": 2}
    square = {"instance_data_dir": str(SUBJECTS / "octopus"), "instance_prompt": "sks octopus"}
    (folder / "concepts.json").write_text(json.dumps([square, concept]))
    return {
        "instance_data_dir": None,
        "instance_prompt": None,
        "concepts": folder / "concepts.json",
        "with_prior_preservation": True,
        "aspect_ratio_buckets": "auto",
        "alpha_mask": True,
    }


def words(output_dir: Path, **options: object) -> list[str]:
    """The command line of a run on the tiny pipeline: `name=None` leaves an option out, a list is several words."""
    merged = {"pretrained_model_name_or_path": tiny_pipeline_folder(), "output_dir": output_dir} | DEFAULTS | options
    line = []
    for name, value in merged.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            line += [f"--{name}", *map(str, value)]
        elif value is not None:
            line += [f"--{name}", str(value)]
    return line


def arguments(output_dir: Path, **options: object) -> Namespace:
    return script.parse_args(words(output_dir, **options))


def train(output_dir: Path, **options: object) -> Path:
    """A run in this process."""
    return script.main(arguments(output_dir, **options))


def train_without_export(output_dir: Path, **options: object) -> Path:
    """A run in this process up to its last step, with its records and checkpoints; the end, in which it measures the
    merge, exports and proves the files, takes half of a short run."""
    chosen = arguments(output_dir, **options)
    run, first_step = script.prepare(chosen, check(chosen))
    try:
        if first_step == 0:
            validate(run, 0)
        script.train(run, first_step)
    finally:
        run.close()
    return run.output


def environment(*folders: Path) -> dict[str, str]:
    """The environment of a process that finds this repository, `folders`, and what this process finds by PYTHONPATH."""
    path = os.pathsep.join(filter(None, [str(ROOT), *map(str, folders), os.environ.get("PYTHONPATH")]))
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def call(
    output_dir: Path, *prefix: str, changed: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess:
    """A run in a process of its own, by `python script` unless `prefix` says otherwise; `changed` variables."""
    command = [*(prefix or (sys.executable,)), str(SCRIPT), *words(output_dir, **options)]
    variables = environment() | (changed or {})
    return subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
