"""Checks of the base: that it exists as a folder, a hub name or one file, and the settings that a file holds."""

import re
from collections.abc import Mapping
from pathlib import Path

from reslora_diffusion.export.single_file import is_single_file, read_single_file

from ...utils.model_files import Files, Unknown
from ...utils.problems import BadInput
from . import DreamBoothOptions

# What makes a folder of a single file. A base may be one.
CLASSES_BY_OPTION = {
    "pretrained_model_name_or_path": "",
    "base_config": "",
    "pretrained_vae_model_name_or_path": "AutoencoderKL",
    "tokenizer_name": "",
}


def missing_models(options: DreamBoothOptions) -> dict[str, str]:
    """Return why no model is found under an option, as far as this machine can tell."""
    problems = {}
    for option in CLASSES_BY_OPTION:
        name = getattr(options, option) or ""
        folder = Path(name)
        if re.match(r"https?://", name):
            problems[option] = f"--{option}: {name} is an address; wanted a folder, or the hub's OWNER/NAME"
        elif folder.is_file() and option == "pretrained_model_name_or_path":
            try:
                read_single_file(folder)
            except BadInput as error:
                problems[option] = f"--{option}: {'; '.join(error.problems)}"
        elif folder.is_file():
            kind = CLASSES_BY_OPTION[option]
            problems[option] = f"--{option}: {name} is a single file; wanted a folder or a hub name" + (
                f" ({kind}.from_single_file({folder.name!r}).save_pretrained('folder') makes one)" if kind else ""
            )
        elif name and not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or len(folder.parts) > 2):
            problems[option] = f"--{option}: {name} is missing; wanted a folder or a hub name"
    option, name = "pretrained_model_name_or_path", options.pretrained_model_name_or_path
    if not name:
        problems[option] = f"--{option} is required"
    elif Path(name).is_dir() and not Path(name, "model_index.json").is_file():
        problems[option] = f"--{option}: {name} has no model_index.json; wanted a diffusers pipeline"
    return problems


def class_of(name: str, revision: str | None) -> str | None:
    """The class of a pipeline, as far as its files on this machine tell."""
    try:
        return Files(name, revision).json("model_index.json").get("_class_name")
    except Unknown:
        return None


def take_single_file(options: DreamBoothOptions, missing: Mapping[str, str]) -> None:
    """Take the settings that a base of one file holds: v-prediction, which stands in no configuration of its family."""
    option = "pretrained_model_name_or_path"
    if option in missing:
        return
    if not is_single_file(options.pretrained_model_name_or_path):
        if options.base_config:
            options.problems.append(
                "--base_config is used only with a --pretrained_model_name_or_path that is one file"
            )
        return
    found = read_single_file(str(options.pretrained_model_name_or_path))
    said = {"prediction_type": found.prediction_type, "rescale_betas_zero_snr": found.zero_terminal_snr or None}
    other = class_of(options.base_config, options.revision) if options.base_config else None
    if other not in (None, found.pipeline_class):
        problem = f"{options.base_config} is a {other}, {found.path} a {found.pipeline_class}; wanted the same"
        options.problems.append(f"--base_config: {problem}")
    own = {name: value for name, value in said.items() if value is not None and getattr(options, name) is None}
    options.update(own)
    if own.get("prediction_type") == "v_prediction":
        zero = " and zero terminal SNR" if found.zero_terminal_snr else ""
        options.notes.append(f"{found.path.name}: v-prediction{zero}, as the file itself says")
    if found.unsaid and options.prediction_type is None:
        options.notes.append(
            f"{found.path.name} does not say what it predicts: it is taken for what {options.config_source} predicts. "
            "Of Stable Diffusion 2.x the models for 768 px predict v, the base models for 512 px noise: "
            "--prediction_type v_prediction or epsilon decides"
        )


def is_on_this_machine(options: DreamBoothOptions) -> bool:
    """Return whether the model is a folder or in the hub's cache; else it takes the hub, and time, to learn more."""
    return Files(options.config_source, options.revision).path("model_index.json") is not None
