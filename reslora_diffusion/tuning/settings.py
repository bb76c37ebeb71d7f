"""Settings of a search."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.environment import is_installed, unwritable
from ..utils.options import option, value_problems

DIMENSIONS = ("learning_rate", "lora_alpha", "rank", "method", "lr_scheduler")
EVALUATIONS = 3  # of each trial, at equal distances; after each but the last it may be stopped
TRIALS_IN_SHARE = 6  # whole trials that the share of the time is divided into; stopping makes room for more
FEWEST_STEPS = 6  # of a trial
FOLDER, RUN, FACTS, PLOT = "tune", "run.yaml", "tune.json", "tune.png"  # what a search leaves, in its folder


@dataclass
class Settings:
    """Search learning rate and alpha for a training: reslora tune [--option VALUE ...] train|train-llm [ITS OPTIONS]"""

    share: float = option(0.3, "Time for the search, as a share of the training's time.", above=0, below=1)
    search: list[str] = option(
        ["learning_rate", "lora_alpha"], f"What is searched: one or more of {', '.join(DIMENSIONS)}."
    )
    trial_steps: int | None = option(
        None, "Steps of a trial (default: a sixth of the share of the training's steps).", at_least=EVALUATIONS
    )
    trials: int | None = option(None, "But at most so many trials.", at_least=2)
    held_out_draws: int = option(
        32, "Draws of held-out images with fixed noise, or rows of text, that a trial is measured on.", at_least=4
    )
    folder: str | None = option(None, "Where the study and what it finds are written (default: OUTPUT_DIR/tune).")
    storage: str | None = option(
        None, "Optuna's storage: a journal file, or an address such as sqlite:///study.db (default: in the folder)."
    )
    problems: list[str] = field(default_factory=list)

    def place(self, output_dir: str) -> Path:
        """The folder of the study."""
        return Path(self.folder) if self.folder else Path(output_dir) / FOLDER

    def steps_of_a_trial(self, whole: int) -> int:
        """Return the number of steps of a trial, given those of the whole training."""
        own = round(self.share * whole / TRIALS_IN_SHARE)
        return min(whole, self.trial_steps or max(FEWEST_STEPS, own))


def setting_problems(settings: Settings) -> Iterator[str]:
    """Problems with the search's own options."""
    yield from settings.problems
    yield from value_problems(settings)
    for name in settings.search:
        if name not in DIMENSIONS:
            yield f"--search: got {name!r}, wanted {', '.join(DIMENSIONS)}"
    if not is_installed("optuna"):
        yield "reslora tune needs the package optuna, which is not installed: pip install 'reslora-diffusion[tune]'"
    if settings.folder and (reason := unwritable(Path(settings.folder))):
        yield f"--folder {settings.folder}: cannot be made or written to: {reason}"
