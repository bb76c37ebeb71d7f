"""Validation in the middle of a run: losses on fixed noise, as trained and as merged, and images."""

import numpy as np

from ..options.launcher import shards
from .best import Best
from .history import LOSS_PLOT, plot_losses
from .merging import merged_loss
from .session import Run
from .validation import IMAGE_TRACKERS, fixed_noise_loss


def validate(run: Run, step: int) -> None:
    """Loss on fixed noise; with a prompt also the loss as merged, and images by what would be exported."""
    run.flush(step)
    with run.averaged():
        if run.validation_images.wanted or run.options.keep_best:
            run.calibrate()
        if run.accelerator.is_main_process or shards():
            measure(run, step)


def measure(run: Run, step: int) -> None:
    """Evaluate and write the losses; generate and save the images."""
    with run.adapters.evaluation():
        known = step == 0 and not run.options.network_weights  # every lora_B is zero, and the loss is the base's
        loss = run.loss_base if known else fixed_noise_loss(run.denoiser, run.evaluation.validation)
        values = {"validation_loss": loss}
        if run.validation_images.wanted or run.options.keep_best:
            method = run.method["merge_method"]
            merged = merged_loss(run.adapters, run.denoiser, run.evaluation, method, loss)
            values |= {"merge_gap": merged - loss}
            if run.options.keep_best and step and not (run.best and run.best.loss_merged <= merged):
                run.best = Best.of(step, loss, merged, run.factors(), run.adapters.new_tokens())
    run.latest = values
    run.history.write([{"step": step, **values}])
    run.accelerator.log(values, step=step)
    images = run.validation_images.generate(run.adapters) if run.validation_images.wanted else []
    if not run.accelerator.is_main_process:
        return
    if images:
        run.validation_images.save(images, step)
        for tracker in run.accelerator.trackers:
            if tracker.name in IMAGE_TRACKERS:
                pixels = np.stack([np.asarray(image) for image in images])
                tracker.log_images({"validation": pixels}, step=step, **IMAGE_TRACKERS[tracker.name])
    if 0 < step < run.plan.max_train_steps:  # before there is nothing to plot; at the end `finish` does it
        plot_losses({run.options.method: run.history.rows}, run.output / LOSS_PLOT)
