"""A run: everything a training loop holds, and what happens around its steps (save, restore, validate, export)."""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from reslora_diffusion.core.training_state import load_training_state, save_training_state
from reslora_diffusion.export import ExportReport, export_lora

from .adapters import Adapters
from .checkpoints import STATE_FOLDER, step_of, write_checkpoint
from .checks import Plan
from .history import History, NonFiniteLoss, plot_losses
from .loss import Denoiser
from .merging import Evaluation, MergeReport, forwards_of, merge_report
from .models import base_model_name
from .problems import refuse
from .record import model_card, options, refuse_other_run, versions, write_text
from .sampling import Batch, Sampler
from .validation import SHEET, Painter, fixed_noise_loss

MERGE_REPORT = "merge_report.json"
LOSS_PLOT = "loss.png"
PICTURE_TRACKERS = ("tensorboard", "wandb")


@dataclass
class Run:
    """The parts of one training run."""

    args: Namespace
    plan: Plan
    accelerator: Accelerator
    adapters: Adapters
    denoiser: Denoiser
    sampler: Sampler
    evaluation: Evaluation
    painter: Painter
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    history: History
    loss_base: float

    @property
    def output(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.adapters.tensors().values())

    def batch(self, step: int, micro: int) -> Batch:
        """What this process sees in micro-step `micro` of step `step`, both from 0."""
        size, processes = self.args.train_batch_size, self.accelerator.num_processes
        turn = (step * self.args.gradient_accumulation_steps + micro) * processes + self.accelerator.process_index
        return self.sampler.batch(turn * size, size)

    # ------------------------------------------------------------------------------------------ save and restore

    def save(self, step: int) -> Path:
        """Write `checkpoint-<step>`, with the LoRA as it is now.

        Raises:
            NonFiniteLoss: the adapters are broken; earlier checkpoints stay.
        """
        if not all(value.isfinite().all() for value in self.adapters.tensors().values()):
            raise NonFiniteLoss(f"the adapters of step {step} are not finite, and are not saved")
        folder = self.output / f"checkpoint-{step}"
        if self.accelerator.is_main_process:
            write_checkpoint(self.output, step, lambda fresh: self.write(fresh, step), self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return folder

    def write(self, folder: Path, step: int) -> None:
        facts = {
            "step": step,
            "options": options(self.args),
            "versions": versions(),
            "lr_scheduler": {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"},
            "scaler": self.scaler.state_dict(),
        }
        owner = nn.ModuleDict(self.adapters.models)
        save_training_state(
            folder / STATE_FOLDER, self.adapters.tensors(), model=owner, optimizer=self.optimizer, facts=facts
        )
        if self.adapters.health_problem() is None:
            self.adapters.calibrate(self.evaluation.calibration, forwards_of(self.denoiser))
            self.export(folder, step)

    def restore(self, folder: Path) -> int:
        """Inverse of `save`; returns the step."""
        _, facts = load_training_state(folder / STATE_FOLDER)
        refuse_other_run(self.args, facts["options"], folder)
        owner = nn.ModuleDict(self.adapters.models)
        tensors, facts = load_training_state(folder / STATE_FOLDER, model=owner, optimizer=self.optimizer)
        self.adapters.load(tensors)
        self.lr_scheduler.load_state_dict(facts["lr_scheduler"])
        self.scaler.load_state_dict(facts["scaler"])
        return step_of(folder) if folder.name.startswith("checkpoint-") else facts["step"]

    # ------------------------------------------------------------------------------------------ look

    def is_validation_step(self, step: int) -> bool:
        every = self.args.validation_steps or self.args.validation_epochs * self.plan.steps_per_epoch
        return step % every == 0 or step == self.plan.max_train_steps

    def validate(self, step: int) -> None:
        """Fixed-noise loss, and pictures if there is a prompt, on the main process."""
        if not self.accelerator.is_main_process:
            return
        with self.adapters.evaluation():
            loss = fixed_noise_loss(self.denoiser, self.evaluation.validation)
        self.history.write([{"step": step, "validation_loss": loss}])
        self.accelerator.log({"validation_loss": loss}, step=step)
        if self.painter.prompts and self.painter.num_images:
            self.adapters.calibrate(self.evaluation.calibration, forwards_of(self.denoiser))
            images = self.painter.paint(self.adapters, step)
            for tracker in self.accelerator.trackers:
                if tracker.name in PICTURE_TRACKERS:
                    tracker.log_images({"validation": images}, step=step)
        plot_losses({self.args.method: self.history.rows}, self.output / LOSS_PLOT)

    # ------------------------------------------------------------------------------------------ finish

    def export(self, folder: Path, step: int, report: MergeReport | None = None) -> ExportReport:
        """Write the plain LoRA of now; calibrate first."""
        merging = self.adapters.merging()
        facts = {
            "method": self.args.method,
            **merging,
            "num_previous": self.args.num_previous,
            "base_model": base_model_name(self.args),
            "trigger_words": self.args.instance_prompt,
            "steps": step,
            "seed": self.args.seed,
            "merge_gap": report.gap if report else None,
        }
        stated = {key: str(value) for key, value in facts.items() if value is not None}
        name = self.args.export_name or self.output.resolve().name
        return export_lora(folder, self.adapters.factors(), name=name, facts=stated)

    def finish(self, step: int) -> tuple[MergeReport, ExportReport]:
        """Measure the merge, export, and write the files that show the run."""
        problem = self.adapters.health_problem()
        refuse([f"nothing was exported: {problem}"] if problem else [])
        merged = merge_report(self.adapters, self.denoiser, self.evaluation, self.loss_base)
        write_text(self.output / MERGE_REPORT, json.dumps(merged.to_dict(), indent=2))
        exported = self.export(self.output, step, merged)
        plot_losses({self.args.method: self.history.rows}, self.output / LOSS_PLOT)
        pictures = [name for name in (SHEET, LOSS_PLOT) if (self.output / name).is_file()]
        write_text(self.output / "README.md", model_card(self.args, str(merged).splitlines(), pictures))
        return merged, exported

    def push_to_hub(self) -> str:
        """Upload the exported files, not the checkpoints; returns the address."""
        from huggingface_hub import create_repo, upload_folder

        name = self.args.hub_model_id or self.output.resolve().name
        repo = create_repo(name, exist_ok=True, token=self.args.hub_token)
        ignored = ["checkpoint-*", ".*", f"{self.args.logging_dir}/*"]
        upload_folder(repo_id=repo.repo_id, folder_path=self.output, token=self.args.hub_token, ignore_patterns=ignored)
        return str(repo)


def shown(facts: dict[str, Any]) -> dict[str, Any]:
    """Options as trackers take them."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in facts.items()}
