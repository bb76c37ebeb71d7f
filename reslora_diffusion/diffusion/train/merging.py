"""The cost of merging: the shortcut serves training, and a plain LoRA is exported.

The gap is measured on noise that no training step saw: the loss as trained, and the loss as exported. Block shortcuts
and plain LoRA merge exactly, so their gap is rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reslora_diffusion.core.merging.report import MergeReport

from ..data.encode import Example
from ..data.sampling import Batch, Sampler
from ..models.adapters import NOTHING_TO_MERGE, Adapters, Forward
from ..objective.loss import Denoiser
from ..objective.randomness import Stream, seed_of
from ..options import DreamBoothOptions
from .validation import fixed_noise_loss

VALIDATION_BATCHES = 4


@dataclass(frozen=True)
class Evaluation:
    """Batches apart from training: this process's share to fit the merge on, and all to measure on. Functions of the
    run's seed: N processes fit on what one process with a batch N times as large fits on."""

    calibration: Sequence[Batch]
    validation: Sequence[Batch]

    @classmethod
    def of(
        cls,
        sampler: Sampler,
        options: DreamBoothOptions,
        held_out: Sequence[Example] = (),
        process: int = 0,
        processes: int = 1,
    ) -> "Evaluation":
        """`held_out` are the examples to measure on, which are those that are trained on if there are no others."""
        size, seed = options.train_batch_size, seed_of(sampler.seed, Stream.VALIDATION)
        fitted = replace(sampler, seed=seed_of(sampler.seed, Stream.CALIBRATION), warmup_scale=0.0)
        measured = sampler.to_measure(held_out or sampler.instances, seed)
        turns = [n * processes + process for n in range(options.calibration_batches)]
        whole = size * processes
        return cls(
            calibration=[batch for turn in turns for batch in fitted.batches(turn * size, size)],
            validation=[
                batch
                for n in range(VALIDATION_BATCHES)
                for batch in measured.spread(n * whole, whole, VALIDATION_BATCHES * whole)
            ],
        )


def forwards_of(denoiser: Denoiser) -> dict[str, Forward]:
    """A training-style forward of each component."""
    family = denoiser.family
    texts = dict.fromkeys(family.text_encoders, lambda model, batch: denoiser.encode(batch))
    return {family.denoiser: lambda model, batch: denoiser.predict(batch), **texts}


def merged_loss(
    adapters: Adapters, denoiser: Denoiser, evaluation: Evaluation, merge_method: str, trained: float
) -> float:
    """The loss of what will be exported, inside `adapters.evaluation()`; a plain LoRA is exported as it was `trained`,
    and not measured again."""
    if merge_method == NOTHING_TO_MERGE:
        return trained
    with adapters.merged():
        return fixed_noise_loss(denoiser, evaluation.validation)


def merge_report(
    adapters: Adapters,
    denoiser: Denoiser,
    evaluation: Evaluation,
    loss_base: float,
    shortcut: str,
    merge_method: str,
    trained: float | None = None,
) -> MergeReport:
    """Compare what was trained with what will be exported; calibrate first. Every process must call this.

    Args:
        trained: the loss as trained, where it is known.
    """
    batches = evaluation.validation
    with adapters.evaluation():
        trained = fixed_noise_loss(denoiser, batches) if trained is None else trained
        merged = merged_loss(adapters, denoiser, evaluation, merge_method, trained)
    return MergeReport(
        shortcut=shortcut,
        merge_method=merge_method,
        loss_base=loss_base,
        loss_trained=trained,
        loss_merged=merged,
        output_errors=adapters.output_errors(batches, forwards_of(denoiser)),
    )
