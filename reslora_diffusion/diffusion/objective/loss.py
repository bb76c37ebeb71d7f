"""The denoising loss of DreamBooth, per example.

    loss_i = w_i lambda(t_i) mean(rho(error_i))    w_i = prior_loss_weight for class images, else 1
    loss   = sum_i loss_i / number of instance images

where `processes` says what x_t is and what the error of a prediction,

so that the class images add prior_loss_weight times their own mean, as in DreamBooth's prior preservation
(arXiv 2208.12242, eq. 2). With a mask M the mean is sum(M rho) / sum(M), or sum(M rho) / size(M) as in kohya's scripts,
where an image counts for less the less of it is shown.

    rho      e^2 (l2); |e| (l1); 2c (sqrt(e^2 + c^2) - c) (huber); 2 (sqrt(e^2 + c^2) - c) (smooth_l1); c may depend on
             the timestep
    lambda   with snr = abar_t / (1 - abar_t):     epsilon             v_prediction
             min-SNR (arXiv 2303.09556)            min(snr, g) / snr   min(snr, g) / (snr + 1)
             debiased (arXiv 2310.08442)           1 / sqrt(snr)       1 / (snr + 1)
             v_pred_like_loss w                    1 + w (snr + 1) / snr
             scale_v_pred_loss_like_noise_pred                         snr / (snr + 1)
             of a flow                             its own, by `weighting_scheme`
    snr is at most 1000 in all but min-SNR, as in kohya's scripts.
"""

import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data.sampling import Batch
from ..models.families import Family, Texts, Tokens
from .frozen_texts import FrozenTexts
from .noise import Process

LARGEST_SNR = 1000.0  # where an image is nearly clean


def min_snr_weights(ratio: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """lambda [B]; where snr is 0 the limits: 1 for epsilon, 0 for v_prediction."""
    if prediction_type == "v_prediction":
        return ratio.clamp(max=gamma) / (ratio + 1)
    return gamma / ratio.clamp(min=gamma)


def debiased_weights(ratio: Tensor, prediction_type: str) -> Tensor:
    """lambda [B]. For epsilon it grows without bound as snr falls to 0: such a model cannot be trained there anyway."""
    if prediction_type == "v_prediction":
        return 1 / (ratio.clamp(max=LARGEST_SNR) + 1)
    return ratio.clamp(1 / LARGEST_SNR, LARGEST_SNR).rsqrt()


def noise_pred_scale(ratio: Tensor) -> Tensor:
    """snr / (snr + 1) [B]: what makes of the squared error of a velocity that of the noise."""
    ratio = ratio.clamp(max=LARGEST_SNR)
    return ratio / (ratio + 1)


def huber_c_of(schedule: str, c: float, scale: float, ratio: Tensor, times: Tensor, num_train_timesteps: int) -> Tensor:
    """c(t) [B]: `scale` c for "constant"; falling from `scale` to `scale` c with t for "exponential"; by the noise
    level, from 1 to c, for "snr", which has no scale."""
    if schedule == "exponential":
        return scale * torch.exp(math.log(c) * times / num_train_timesteps)
    if schedule == "snr":
        sigma = ratio.rsqrt()
        return (1 - c) / (1 + sigma).square() + c
    return torch.full_like(ratio, scale * c)


def pointwise(error: Tensor, loss_type: str, c: Tensor) -> Tensor:
    """rho(error), elementwise; `c` broadcasts."""
    if loss_type == "l1":
        return error.abs()
    if loss_type == "huber":
        return 2 * c * ((error.square() + c.square()).sqrt() - c)
    if loss_type == "smooth_l1":
        return 2 * ((error.square() + c.square()).sqrt() - c)
    return error.square()


@dataclass(frozen=True)
class Objective:
    """The settings of the loss; the names are those of the options."""

    snr_gamma: float | None = None
    debiased_estimation_loss: bool = False
    loss_type: str = "l2"
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    huber_scale: float = 1.0
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    masked_mean: str = "mask"

    def losses(self, model_pred: Tensor, batch: Batch, process: Process) -> Tensor:
        """loss_i without w_i [B], in float32."""
        error = process.error(model_pred, batch.latents, batch.noise, batch.timesteps)
        ratio, kind = process.snr(batch.timesteps), process.prediction_type
        times, steps = process.times(batch.timesteps), process.num_train_timesteps
        c = huber_c_of(self.huber_schedule, self.huber_c, self.huber_scale, ratio, times, steps)
        values = pointwise(error, self.loss_type, c[:, None, None, None])
        if batch.masks is None:
            losses = values.flatten(1).mean(1)
        elif self.masked_mean == "image":
            losses = (values * batch.masks).flatten(1).mean(1)
        else:
            counted = batch.masks.flatten(1).sum(1) * values.shape[1]
            losses = (values * batch.masks).flatten(1).sum(1) / counted.clamp(min=1e-6)
        if (own := process.weights(batch.timesteps)) is not None:
            losses = losses * own
        if self.snr_gamma is not None:
            losses = losses * min_snr_weights(ratio, self.snr_gamma, kind)
        if self.debiased_estimation_loss:
            losses = losses * debiased_weights(ratio, kind)
        if self.scale_v_pred_loss_like_noise_pred:
            losses = losses * noise_pred_scale(ratio)
        if self.v_pred_like_loss:
            scale = noise_pred_scale(ratio.clamp(min=1 / LARGEST_SNR))
            losses = losses + self.v_pred_like_loss * losses / scale
        return losses


@dataclass(frozen=True)
class Denoiser:
    """The models of a training step, and the loss they are trained on.

    Args:
        text_encoders: if they are trained: batches then hold tokens, else texts.
        dtype: of the frozen base.
        guidance_scale: an input of models that were distilled with guidance; None for others.
    """

    family: Family
    model: nn.Module
    text_encoders: tuple[nn.Module, ...]
    process: Process
    dtype: torch.dtype
    objective: Objective
    guidance_scale: float | None = None
    frozen_texts: FrozenTexts = field(default_factory=FrozenTexts)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        return self.model, *self.text_encoders

    def encode(self, batch: Batch) -> Texts:
        """Encode tokens by the text encoders that are trained."""
        return self.encode_tokens(cast(Tokens, batch.texts))

    def encode_tokens(self, tokens: Tokens) -> Texts:
        return self.family.encode(self.text_encoders, tokens)

    def texts_of(self, batch: Batch) -> Texts:
        """The encoded prompts of a batch."""
        if not self.text_encoders:
            return cast(Texts, batch.texts)
        if self.frozen_texts.frozen:
            return self.frozen_texts.of(cast(Tokens, batch.texts), self.text_encoders, self.encode_tokens)
        return self.encode(batch)

    def condition(self, batch: Batch) -> dict[str, Any]:
        """The encoded prompt of each example; each distinct prompt is encoded once."""
        texts = self.texts_of(batch)
        hidden, pooled, mask = (None if part is None else part[batch.prompt_index] for part in texts)
        pooled = None if pooled is None else pooled.to(self.dtype)
        own = Texts(cast(Tensor, hidden).to(self.dtype), pooled, mask)
        return self.family.condition(own, batch.time_ids.to(self.dtype))

    def predict(self, batch: Batch) -> Tensor:
        """The model's prediction [B, C, h, w]."""
        noise = batch.noise if batch.input_noise is None else batch.input_noise
        noisy_latents = self.process.add_noise(batch.latents, noise, batch.timesteps).to(self.dtype)
        times = self.process.times(batch.timesteps)
        guidance = self.family.guidance_input(self.guidance_scale, times)
        return self.family.denoise(self.model, noisy_latents, times, self.condition(batch) | guidance)

    def losses(self, batch: Batch) -> Tensor:
        """loss_i without w_i [B], in float32."""
        return self.objective.losses(self.predict(batch), batch, self.process)

    def loss(self, batch: Batch, instances: int) -> Tensor:
        """Share of a batch in the scalar to minimise."""
        return (batch.weights * self.losses(batch)).sum() / instances
