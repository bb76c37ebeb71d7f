"""Short trainings of the DreamBooth trainer: images and prompts are encoded once, the model is loaded anew each time.

What a trial trains is what `reslora train` would, with the same draws, for fewer steps: schedules and warm-up are
shortened with it, and its learning rate is higher by the same factor (`accelerate`). Its files go into a temporary
folder and away.
"""

import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..diffusion.data.sampling import Batch
from ..diffusion.objective.randomness import Stream, seed_of
from ..diffusion.options import DreamBoothOptions
from ..diffusion.options.plan import Plan
from ..diffusion.train import setup
from ..diffusion.train.session import Run
from ..diffusion.train.stopping import stop_text_encoders
from ..utils.problems import Stopped
from .study import Report, Spent

# What a trial does without: it writes nothing, generates nothing and compiles nothing.
QUIET: dict[str, Any] = {
    "resume_from_checkpoint": None,
    "validation_prompt": None,
    "report_to": "none",
    "push_to_hub": False,
    "compile": False,
    "cuda_graph": False,
    "keep_best": False,
    "checkpointing_steps": 2**30,
}
MEASUREMENTS = 10  # of a training that keeps its best step
OUTSIDE = ("output_dir", "config", "hub_token", "hub_model_id", "logging_dir", "seed", *QUIET)  # change no trial


class DreamBooth:
    """A `study.Trainee` that trains DreamBooth; its options hold out images."""

    names: Mapping[str, str] = {}

    def __init__(self, args: DreamBoothOptions, plan: Plan, draws: int) -> None:
        self.plan, self.steps, self.given = plan, plan.max_train_steps, given_of(args)
        holds_out = bool({"validation_split", "validation_data_dir"} & args.given)
        args.seed = 0 if args.seed is None else args.seed  # a search that is continued must go on with the same draws
        self.begun = setup.start(args.changed(**QUIET), plan)
        loaded, concepts, facts = setup.load(self.begun)
        self.data = setup.encode(self.begun, loaded, concepts, facts)
        self.batches = self.held_out(draws)
        self.start = start_of(args)
        self.keeping_best: dict[str, Any] = {"keep_best": True} if holds_out else {}
        if holds_out and not {"validation_steps", "validation_epochs"} & args.given:
            self.keeping_best |= {"validation_steps": max(1, self.steps // MEASUREMENTS)}
        self.identity = identity_of(args, facts, draws)

    def held_out(self, draws: int) -> list[Batch]:
        """Fixed noise on held-out images, at timesteps spread evenly, in batches of the training's size."""
        sampler, size = self.data.sampler, self.begun.options.train_batch_size
        seed = seed_of(sampler.seed, Stream.VALIDATION)
        measured = sampler.to_measure(self.data.encoded.held_out, seed)
        counts = [min(size, draws - first) for first in range(0, draws, size)]
        return [batch for n, count in enumerate(counts) for batch in measured.spread(n * size, count, draws)]

    def train(self, options: Mapping[str, Any], steps: int, evaluate_at: Sequence[int], report: Report) -> Spent:
        with tempfile.TemporaryDirectory(prefix="reslora-tune-") as folder:
            run = self.begin(options, steps, folder)
            try:
                return self.teach(run, steps, evaluate_at, report)
            finally:
                run.close()

    def begin(self, options: Mapping[str, Any], steps: int, folder: str) -> Run:
        args = self.begun.options.changed(output_dir=folder, **options)
        args.lr_warmup_steps = round(args.lr_warmup_steps * steps / self.steps)
        sampler = replace(self.data.sampler, warmup_scale=steps / self.steps)
        begun = setup.Start(args, replace(self.plan, max_train_steps=steps), self.begun.accelerator, None, 0)
        with redirect_stdout(io.StringIO()):  # the preflight has been shown once
            run = setup.build(begun, setup.load(begun)[0], self.data._replace(sampler=sampler))
        accelerate(run, self.steps / steps)
        return run

    def teach(self, run: Run, steps: int, evaluate_at: Sequence[int], report: Report) -> Spent:
        training, begun = 0.0, time.monotonic()
        run.adapters.train()
        for step in range(steps):
            started = time.monotonic()
            try:
                one_step(run, step)
            except Stopped:  # a loss that is not finite
                report(step + 1, np.full(sum(len(batch.latents) for batch in self.batches), np.nan))
                break
            training += time.monotonic() - started
            if step + 1 in evaluate_at and report(step + 1, self.losses(run)):
                break
        return Spent(training / (step + 1), time.monotonic() - begun)

    def losses(self, run: Run) -> np.ndarray:
        """The loss of every held-out draw, by the LoRA that would be exported."""
        with run.averaged():
            run.calibrate()
            with run.adapters.evaluation(), run.adapters.merged():
                return torch.cat([run.denoiser.losses(batch).cpu() for batch in self.batches]).double().numpy()


def one_step(run: Run, step: int) -> None:
    """The step of train_scripts/train_dreambooth_reslora.py, on one process and without graphs."""
    args = run.options
    total = torch.zeros((), device=run.accelerator.device)
    stop_text_encoders(run, step)
    run.schedule.before_step(step)
    for micro in range(args.gradient_accumulation_steps):
        for batch in run.batches(step, micro):
            loss = run.denoiser.loss(batch, args.train_batch_size) / args.gradient_accumulation_steps
            run.scaler.scale(loss).backward()
            total += loss.detach()
    run.schedule.after_backward(step)
    with run.changing():
        run.scaler.unscale_(run.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, args.max_grad_norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        if args.scale_weight_norms:
            run.adapters.limit_norms(args.scale_weight_norms)
        run.log(step + 1, total, grad_norm)
        run.lr_scheduler.step()
        if run.ema:
            run.ema.update(run.tensors, step + 1)
        run.after_step(step + 1)


def accelerate(run: Run, factor: float) -> None:
    """Raise all learning rates, so that a short trial goes as far as the training would.

    Steps of Adam's kind have the length of the learning rate. At an equal rate a trial sees the first of the way alone,
    where a higher rate always wins, and what it over-fits later is not seen. Optimizers that find the length of their
    steps themselves (`d` of Prodigy and D-Adaptation) are left alone.
    """
    groups = run.optimizer.param_groups
    if any("d" in group or group["lr"] is None for group in groups):
        return
    run.lr_scheduler.base_lrs = [factor * rate for rate in run.lr_scheduler.base_lrs]
    for group in groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor


def given_of(args: DreamBoothOptions) -> dict[str, Any]:
    """Options of the command as a file holds them."""
    values = {name: getattr(args, name) for name in sorted(args.given) if name != "config"}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def start_of(args: DreamBoothOptions) -> dict[str, Any]:
    """The command's point; alpha stands for alpha / rank."""
    method = args.method if args.method == "lora" else f"reslora-{args.shortcut or 'block'}"
    alpha = (args.lora_alpha or float(args.rank)) / args.rank
    return {
        "learning_rate": args.learning_rate,
        "lora_alpha": alpha,
        "rank": args.rank,
        "method": method,
        "lr_scheduler": args.lr_scheduler,
    }


def identity_of(args: DreamBoothOptions, data: Mapping[str, Any], draws: int) -> dict[str, Any]:
    """The identity of trials, which are a function of it, in JSON's types."""
    own = {name: value for name, value in args.recorded().items() if name not in OUTSIDE}
    own = {
        name: value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
        for name, value in own.items()
    }
    return own | {"seed": args.seed, "images": str(sorted(data.items())), "held_out_draws": draws}
