"""One run: train a method at a setting from a seed, export a plain LoRA of the race's rank, measure that.

What is measured on the way and at the end is the untouched base plus `exported(model)`: for every layer the best
approximation, of the race's rank, of what the method would merge into the weight. A block shortcut of rank (m + 1) r,
PiSSA's moved base and DoRA's full-rank change are all cut alike; the result says how much of the change was kept.
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from reslora_diffusion import AdaptedModel, ResLoraConfig, calibrate, distill, handover
from reslora_diffusion.methods.schedules.base import follow_learning_rate

from .methods import Method, make_optimizer, make_race_schedule, schedule_of
from .plan import TaskSettings
from .tasks import TASKS, Task

CALIBRATION_BATCHES = 16
CALIBRATION_SEED = 1_000_000
Factors = dict[str, tuple[Tensor, Tensor]]  # per layer: A [r, in], B [out, r], scale 1


def run(
    settings: TaskSettings, method: Method, setting: Mapping[str, Any], seed: int, split: str, task: Task | None = None
) -> dict[str, Any]:
    """Facts of one run. A loss that is not finite ends it, as a result: `diverged`.

    Times are of the processor, so that runs may share a machine.
    """
    task = task or TASKS[settings.name]()
    race = Racer(settings, method, dict(method.defaults) | dict(setting), seed, split, task)
    started = time.process_time()
    return race.train() | {"cpu_seconds": round(time.process_time() - started, 2)}


class Racer:
    """The state of one run."""

    def __init__(
        self, settings: TaskSettings, method: Method, setting: dict[str, Any], seed: int, split: str, task: Task
    ) -> None:
        self.settings, self.method, self.setting = settings, method, setting
        self.seed, self.split, self.task = seed, split, task
        self.rank = round(settings.rank * setting.get("rank_factor", 1))
        torch.manual_seed(seed)
        self.base = task.base().requires_grad_(False).eval()
        self.model = get_peft_model(copy.deepcopy(self.base), self.configuration()).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(method, self.model, setting["learning_rate"], setting)
        factor = schedule_of(setting.get("lr_scheduler", settings.lr_scheduler), settings.steps, settings.warmup_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.schedule = make_race_schedule(method, setting, seed)
        self.schedule.start([AdaptedModel(self.model)], settings.steps, self.optimizer)
        follow_learning_rate(self.schedule, self.lr_scheduler)
        self.fold_at = round(setting["fold_at"] * settings.steps) if "fold_at" in setting else None

    def configuration(self) -> LoraConfig:
        shared = {
            "r": self.rank,
            "lora_alpha": self.setting["alpha_over_rank"] * self.rank,
            "target_modules": list(self.task.target_modules),
        }
        if self.method.adapter in ("pissa", "dora"):
            pissa = {"init_lora_weights": "pissa"} if self.method.adapter == "pissa" else {"use_dora": True}
            return LoraConfig(**shared, **pissa)
        previous = {"num_previous": self.setting["num_previous"]} if "num_previous" in self.setting else {}
        rslora = {"use_rslora": True} if self.method.adapter == "rslora" else {}
        return ResLoraConfig(**shared, **previous, **rslora, shortcut=self.method.shortcut)

    def train(self) -> dict[str, Any]:
        """The facts of the run; it has diverged where a loss or what a decomposition is asked for is not finite."""
        losses: list[float] = []
        try:
            return self.steps(losses)
        except (torch.linalg.LinAlgError, FloatingPointError):
            finite = [loss for loss in losses if math.isfinite(loss)]
            return {"diverged": True, "loss": math.inf, "step": len(finite), "train_losses": finite}

    def steps(self, losses: list[float]) -> dict[str, Any]:
        """Train, and put the loss of every step into `losses`. Raises `FloatingPointError` where one is not finite."""
        settings, curve = self.settings, []
        measured_at = {round(settings.steps * n / settings.evaluations) for n in range(1, settings.evaluations + 1)}
        training = 0.0
        for step in range(settings.steps):
            started = time.process_time()
            if step == self.fold_at:
                self.calibrate()
                handover(self.model, optimizer=self.optimizer)
            self.schedule.before_step(step)
            loss = self.task.loss(self.model, self.task.batch(self.seed, step, settings.batch_size))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss of step {step + 1}")
            loss.backward()
            self.schedule.after_backward(step)
            if settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.schedule.after_step(step + 1)
            training += time.process_time() - started
            if step + 1 in measured_at:
                curve.append({"step": step + 1, "training_cpu_seconds": round(training, 2), **self.measure(last=False)})
        return {"diverged": False, "train_losses": losses, "curve": curve, **self.measure(last=True)}

    def measure(self, last: bool) -> dict[str, float]:
        """Measure the export; at the end also the model as trained, whose distance is the merge gap."""
        self.model.eval()
        trained = self.task.measure(self.model, self.split, self.seed) if last else None
        if self.method.shortcut in ("input", "middle"):
            self.calibrate()
            if last and "distillation_steps" in self.setting:
                batches = self.calibration_batches(self.setting["distillation_steps"])
                distill(self.model, batches, self.task.output, steps=len(batches), distance=self.task.distance)
        factors, energy = exported(self.model, self.base, self.settings.rank if self.is_equal_rank() else self.rank)
        with added(self.base, factors):
            found = self.task.measure(self.base, self.split, self.seed)
            if last and self.split == "test":
                found |= self.task.measure_once(self.base, self.seed)
        self.model.train()
        if not all(map(math.isfinite, [*found.values(), *(trained or {}).values()])):
            raise FloatingPointError("a loss of the export or as trained")
        if trained is None:
            return found
        return found | {"loss_as_trained": trained["loss"], "kept_energy": energy}

    def is_equal_rank(self) -> bool:
        return "rank_factor" not in self.setting

    def calibrate(self) -> None:
        calibrate(self.model, self.calibration_batches(CALIBRATION_BATCHES), self.task.loss)

    def calibration_batches(self, count: int) -> list[Any]:
        size = self.settings.batch_size
        return [self.task.batch(CALIBRATION_SEED + self.seed, n, size) for n in range(count)]


@torch.no_grad()
def exported(model: Any, base: nn.Module, rank: int) -> tuple[Factors, float]:
    """The plain LoRA of `rank` nearest to what merging changes in the weights, and the energy kept of that change."""
    merged = copy.deepcopy(model).merge_and_unload()
    before = dict(base.named_parameters())
    factors, kept, total = {}, 0.0, 0.0
    for name, weight in merged.named_parameters():
        change = weight.double() - before[name].double()
        if weight.ndim != 2 or not change.any():
            continue
        U, sigma, Vt = torch.linalg.svd(change, full_matrices=False)
        kept += float(sigma[:rank].square().sum())
        total += float(sigma.square().sum())
        root = sigma[:rank].sqrt()
        factors[name] = (root[:, None] * Vt[:rank]).float(), (U[:, :rank] * root).float()
    return factors, kept / total if total else 1.0


@contextmanager
def added(base: nn.Module, factors: Factors) -> Iterator[None]:
    """Inside, the base computes with the factors merged into it; afterwards its weights are the same bits as before."""
    weights = dict(base.named_parameters())
    before = {name: weights[name].detach().clone() for name in factors}
    try:
        for name, (A, B) in factors.items():
            weights[name].data += B @ A
        yield
    finally:
        for name, weight in before.items():
            weights[name].data.copy_(weight)
