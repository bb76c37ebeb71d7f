"""`--train_text_encoder_frac` and `--train_text_encoder_ti_frac`: text encoders, or new tokens in them, are trained in
the first steps alone, and then stay as they are.

Their parameters have no gradients from then on, so no optimizer changes them, and each prompt is encoded once
(`objective.frozen_texts`). They remain in checkpoints and in the export.
"""

from ..options import DreamBoothOptions
from .session import Run


def last_text_step(options: DreamBoothOptions, max_train_steps: int) -> int | None:
    """Return the number of steps that text encoders are trained for; None if to the end, or never."""
    if not options.trains_text or options.trains_text_share == 1:
        return None
    return max(1, round(options.trains_text_share * max_train_steps))


def stop_text_encoders(run: Run, step: int) -> None:
    """Stop training the text encoders once their share of the steps is done: `step` are."""
    last, frozen = last_text_step(run.options, run.plan.max_train_steps), run.denoiser.frozen_texts
    if last is None or step < last or frozen.frozen:
        return
    frozen.frozen = True
    run.adapters.stopped.update(name for name in run.adapters.trained if name != run.adapters.denoiser)
    run.adapters.train()
    run.collect_tensors()
    what = "new tokens" if run.options.train_text_encoder_ti else "text encoders"
    run.accelerator.print(f"{what} are not trained after step {last}; each prompt is encoded once from here on")
