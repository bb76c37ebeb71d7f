"""Configurations of other trainers, read as they are.

    translate(content, path)   options here, by name, and what was translated and what was not; None if it is ours

kohya's scripts (TOML), kohya_ss (the JSON of its presets), datasets of kohya's scripts (TOML with subsets), jobs of
ai-toolkit (YAML), configurations and concepts of OneTrainer (JSON).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import ai_toolkit, kohya, kohya_gui, onetrainer
from .kohya_dataset import is_datasets
from .translation import Translation

__all__ = ["Translation", "translate"]


def translate(content: Mapping[str, Any], path: Path) -> Translation | None:
    """The configuration of another trainer in options of this one; None if the names in it are not another's."""
    if kohya_gui.is_preset(content):
        return kohya.translated(kohya_gui.as_script(content), f"{path.name}, a preset of kohya_ss")
    if ai_toolkit.process_of(content):
        return ai_toolkit.translated(content, f"{path.name}, a job of ai-toolkit", str(path))
    if ai_toolkit.is_job(content):
        return ai_toolkit.refused(content, f"{path.name}, a job of ai-toolkit")
    if onetrainer.is_config(content):
        return onetrainer.translated(content, f"{path.name}, a configuration of OneTrainer")
    if is_datasets(content) or isinstance(content.get("datasets"), dict):
        found = Translation(f"{path.name}, a file of kohya's datasets")
        found.problems.append("it says what to train on, not how; wanted it as --concepts")
        return found
    if kohya.is_config(content):
        return kohya.translated(kohya.flat(content), f"{path.name}, a configuration of kohya's scripts")
    return None
