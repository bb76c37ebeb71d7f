"""How noise is added, which noise levels are drawn, and what the model predicts.

    Diffusion       x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          t ~ U{0..T-1}
                    error = model_pred - target
                    target = eps                                           prediction_type "epsilon"
                           = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0       prediction_type "v_prediction"

    FlowMatching    x_t = (1 - sigma_t) x_0 + sigma_t eps                  t = floor(T u), u by `weighting_scheme`
                    error = model_pred - (eps - x_0), times sigma_t with `precondition_outputs`

A timestep is a place 0..T-1 in the schedule; `times` is what the model is told. The schedule of a flow runs from noise
to data, as diffusers keeps it, and its sigmas are shifted as the base's own scheduler shifts them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Generator, Tensor


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """[B] in the shape in which it multiplies [B, ...]."""
    return values.view(-1, *(1,) * (like.ndim - 1))


class Process(ABC):
    """Shapes: latents, noise, model_pred [B, C, h, w]; timesteps [B]."""

    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """What the model predicts: epsilon, v_prediction or flow."""

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.scheduler.config.num_train_timesteps

    def draw(self, source: Generator) -> int:
        """A timestep to train on."""
        return int(torch.randint(self.num_train_timesteps, (), generator=source))

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t."""

    @abstractmethod
    def times(self, timesteps: Tensor) -> Tensor:
        """What the model is told of the noise level [B], from 0 to T."""

    @abstractmethod
    def error(self, model_pred: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the loss is a function of, in float32."""

    @abstractmethod
    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio [B]."""

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """Weights of the loss that belong to the process [B]."""
        return None


@dataclass(frozen=True)
class Diffusion(Process):
    scheduler: DDPMScheduler

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def times(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def error(self, model_pred: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        velocity = self.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        return model_pred.float() - target

    def snr(self, timesteps: Tensor) -> Tensor:
        alpha_bar = self.scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
        return alpha_bar / (1 - alpha_bar)


@dataclass(frozen=True)
class FlowMatching(Process):
    """Flow matching of Stable Diffusion 3 (arXiv 2403.03206).

    Names and defaults are those of diffusers' `train_dreambooth_lora_sd3.py`."""

    scheduler: FlowMatchEulerDiscreteScheduler
    weighting_scheme: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    precondition_outputs: bool = True
    sigmas: dict[torch.device, Tensor] = field(init=False, default_factory=dict)  # a copy for each device

    @property
    def prediction_type(self) -> str:
        return "flow"

    def draw(self, source: Generator) -> int:
        u = compute_density_for_timestep_sampling(
            self.weighting_scheme, 1, self.logit_mean, self.logit_std, self.mode_scale, generator=source
        )
        return min(int(u * self.num_train_timesteps), self.num_train_timesteps - 1)

    def sigma(self, timesteps: Tensor) -> Tensor:
        device = timesteps.device
        if device not in self.sigmas:
            self.sigmas[device] = self.scheduler.timesteps.to(device, torch.float32) / self.num_train_timesteps
        return self.sigmas[device][timesteps]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = per_example(self.sigma(timesteps), latents)
        return (1 - sigma) * latents + sigma * noise

    def times(self, timesteps: Tensor) -> Tensor:
        return self.sigma(timesteps) * self.num_train_timesteps

    def error(self, model_pred: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        error = model_pred.float() - (noise - latents)
        # x_t - sigma_t model_pred predicts x_0, and is off by sigma_t times as much
        return per_example(self.sigma(timesteps), error) * error if self.precondition_outputs else error

    def snr(self, timesteps: Tensor) -> Tensor:
        sigma = self.sigma(timesteps)
        return ((1 - sigma) / sigma).square()

    def weights(self, timesteps: Tensor) -> Tensor:
        return compute_loss_weighting_for_sd3(self.weighting_scheme, self.sigma(timesteps))
