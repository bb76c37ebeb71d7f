"""The denoising loss of DreamBooth, per example.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                  noisy_latents
    target = eps                                                   prediction_type "epsilon"
           = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0               prediction_type "v_prediction"
    loss_i = w_i lambda(t_i) mean((model_pred_i - target_i)^2)     w_i = prior_loss_weight for class pictures, else 1
    loss   = sum_i loss_i / number of instance pictures

so the class pictures add prior_loss_weight times their own mean, as in DreamBooth's prior preservation
(arXiv 2208.12242, eq. 2). lambda is 1, or min-SNR (arXiv 2303.09556): min(snr, gamma) / snr for epsilon,
min(snr, gamma) / (snr + 1) for v_prediction, with snr = abar_t / (1 - abar_t).
"""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from .sampling import Batch
from .text import encode

PREDICTION_TYPES = ("epsilon", "v_prediction")


def target_of(scheduler: DDPMScheduler, batch: Batch) -> Tensor:
    """What the model should predict [B, C, h, w]."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    return batch.noise


def min_snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """lambda(t) [B]; where snr is 0 the limits: 1 for epsilon, 0 for v_prediction."""
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    if scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return gamma / snr.clamp(min=gamma)


@dataclass(frozen=True)
class Denoiser:
    """The models of a training step, and the loss they are trained on.

    Args:
        text_encoder: if it is trained: batches then hold token ids, else hidden states.
        dtype: of the frozen base.
    """

    unet: nn.Module
    text_encoder: nn.Module | None
    scheduler: DDPMScheduler
    dtype: torch.dtype
    snr_gamma: float | None = None

    def hidden_states(self, batch: Batch) -> Tensor:
        """Hidden states of each example's prompt [B, L, D]; each distinct prompt is encoded once."""
        texts = batch.texts if self.text_encoder is None else encode(self.text_encoder, batch.texts)
        return texts.to(self.dtype)[batch.prompt_index]

    def predict(self, batch: Batch) -> Tensor:
        """The UNet's prediction [B, C, h, w]."""
        noisy_latents = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps).to(self.dtype)
        return self.unet(noisy_latents, batch.timesteps, self.hidden_states(batch), return_dict=False)[0]

    def losses(self, batch: Batch) -> Tensor:
        """loss_i without w_i [B], in float32."""
        error = self.predict(batch).float() - target_of(self.scheduler, batch)
        losses = error.square().flatten(1).mean(1)
        if self.snr_gamma is not None:
            losses = losses * min_snr_weights(self.scheduler, batch.timesteps, self.snr_gamma)
        return losses

    def loss(self, batch: Batch, instances: int) -> Tensor:
        """The scalar to minimise."""
        return (batch.weights * self.losses(batch)).sum() / instances
