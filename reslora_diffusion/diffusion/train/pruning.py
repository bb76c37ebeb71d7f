"""`--schedule prune` for images: what is checked before weights are read, and the smaller denoiser at the end.

<output_dir>/pruned/                the denoiser, for `reslora_diffusion.methods.pruning.load_pruned`
<output_dir>/pruning_report.json    sizes and losses before and after, heads and channels left in each block
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...methods.pruning import Slimmed, find_structures, save_pruned
from ...methods.pruning.structures import chosen
from ...methods.schedules import Prune
from ...methods.schedules.settings import PruneSettings
from ...utils.files import write_text
from ..models.architecture import is_target
from ..models.attn_processor import unset_attn_processors
from ..models.meta_pipeline import MetaPipeline
from ..options import DreamBoothOptions
from .schedules import settings_of
from .validation import fixed_noise_loss

if TYPE_CHECKING:
    from .session import Run

FOLDER, REPORT = "pruned", "pruning_report.json"


def pruning_problems(options: DreamBoothOptions, base: MetaPipeline) -> Iterator[str]:
    """Yield why this denoiser cannot be pruned by the settings, which are sound; nothing without `--schedule prune`."""
    settings = settings_of(options)
    if not isinstance(settings, PruneSettings):
        return
    structures = find_structures(base.denoiser)
    targets = base.targets(options)[base.family.denoiser]
    adapted = {name for one in structures for name in one.layers if is_target(name, targets)}
    picked = chosen(structures, settings.parts, settings.spare)
    for problem in settings.structure_problems(structures, picked, adapted):
        yield f"--schedule: prune: {problem}"


@dataclass(frozen=True)
class PruningReport:
    """Losses on fixed noise: of the base, with everything masked, and of the smaller model; and what was cut out."""

    folder: Path
    loss_base: float
    loss_masked: float
    loss_pruned: float
    slimmed: Slimmed
    kind: str

    @property
    def files(self) -> dict[str, Path]:
        return {"pruned": self.folder / FOLDER, "report": self.folder / REPORT}

    def to_dict(self) -> dict[str, Any]:
        losses = {name: getattr(self, name) for name in ("loss_base", "loss_masked", "loss_pruned")}
        return {"model": self.kind, **losses, **self.slimmed.to_dict()}

    def __str__(self) -> str:
        before, after = self.slimmed.parameters
        return (
            f"{self.kind}: {after:,} of {before:,} parameters\n"
            f"fixed-noise loss of the base {self.loss_base:.5f}, with heads and channels masked "
            f"{self.loss_masked:.5f}, of the smaller model {self.loss_pruned:.5f}"
        )


def export_pruned(run: "Run", step: int) -> PruningReport:
    """Cut the denoiser down and write it. All that a `Run` may do afterwards is to end."""
    schedule = run.schedule
    assert isinstance(schedule, Prune), "who calls this has asked"
    model: Any = run.adapters.models[run.adapters.denoiser]
    batches = run.evaluation.validation
    with run.adapters.evaluation():
        masked = fixed_noise_loss(run.denoiser, batches)
    unset_attn_processors(model)
    slim, slimmed = schedule.slim()
    model.train(False)
    pruned = fixed_noise_loss(run.denoiser, batches)
    report = PruningReport(run.output, run.loss_base, masked, pruned, slimmed, type(model).__name__)
    if run.accelerator.is_main_process:
        save_pruned(slim, slimmed, run.output / FOLDER)
        facts = {"schedule": str(schedule.settings), "step": step, **report.to_dict()}
        write_text(run.output / REPORT, json.dumps(facts, indent=2) + "\n")
    return report
