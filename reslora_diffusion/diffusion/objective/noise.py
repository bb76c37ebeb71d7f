"""The noising process: how noise is added, which noise levels are drawn, and what the model predicts.

    Diffusion       x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          t ~ U{0..T-1}
                    error = model_pred - target
                    target = eps                                           prediction_type "epsilon"
                           = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0       prediction_type "v_prediction"

    FlowMatching    x_t = (1 - sigma_t) x_0 + sigma_t eps                  t = floor(T u), u by `weighting_scheme`
                    error = model_pred - (eps - x_0), times sigma_t with `precondition_outputs`

A timestep is a place 0..T-1 in the schedule; `times` are the model's inputs. The schedule of a flow runs from noise
to data, as diffusers has it, and its sigmas are shifted as the base's own scheduler shifts them, unless
`timestep_sampling` says otherwise:

    sigma        the base's schedule, u by `weighting_scheme`; `discrete_flow_shift` replaces the base's shift
    uniform      sigma ~ U(0, 1)                                        neither is shifted
    sigmoid      sigma = sigmoid(sigmoid_scale z), z standard normal
    shift        the same, then s sigma / (1 + (s - 1) sigma) with s = discrete_flow_shift
    flux_shift   the same with s = exp(mu), mu from 0.5 to 1.15 as the image has from 256 to 4096 tokens
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Generator, Tensor


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """[B] in the shape in which it multiplies [B, ...]."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def shifted(sigma: float, shift: float) -> float:
    """A noise level moved towards noise, for shifts above 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flux_shift(shape: Sequence[int], cell: int = 2) -> float:
    """The shift of FLUX.1's own sampler for latents [..., h, w], of which `cell` x `cell` are a token."""
    tokens = (shape[-2] // cell) * (shape[-1] // cell)
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


class Process(ABC):
    """Shapes: latents, noise, model_pred [B, C, h, w]; timesteps [B]."""

    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler
    min_timestep: int | None
    max_timestep: int | None

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """The model's target: epsilon, v_prediction or flow."""

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.scheduler.config.num_train_timesteps

    @property
    def span(self) -> range:
        """The timesteps that are trained: `min_timestep` <= input of the model < `max_timestep`."""
        most = min(self.max_timestep or self.num_train_timesteps, self.num_train_timesteps)
        return range(min(self.min_timestep or 0, most - 1), most)

    def draw(self, source: Generator, shape: Sequence[int] = ()) -> int:
        """A timestep to train on, of latents [C, h, w]."""
        return self.span.start + int(torch.randint(len(self.span), (), generator=source))

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t."""

    @abstractmethod
    def times(self, timesteps: Tensor) -> Tensor:
        """The model's input for the noise level [B], from 0 to T."""

    @abstractmethod
    def error(self, model_pred: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the error that the loss is a function of, in float32."""

    @abstractmethod
    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio [B]."""

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """Weights of the loss that belong to the process [B]."""
        return None


@dataclass(frozen=True)
class Diffusion(Process):
    scheduler: DDPMScheduler
    min_timestep: int | None = None
    max_timestep: int | None = None

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
    timestep_sampling: str = "sigma"
    sigmoid_scale: float = 1.0
    discrete_flow_shift: float | None = None
    min_timestep: int | None = None
    max_timestep: int | None = None
    from_data: bool = False  # the base's schedule has the share of the data
    cell: int = 2  # latents that a token of the transformer is wide and high
    sigmas: dict[torch.device, Tensor] = field(init=False, default_factory=dict)  # a copy for each device

    @property
    def prediction_type(self) -> str:
        return "flow"

    @property
    def schedule(self) -> Tensor:
        """sigma [T], from noise to data."""
        if self.timestep_sampling == "sigma":
            return self.share_of_noise(self.scheduler.timesteps.to(torch.float32) / self.num_train_timesteps)
        return torch.arange(self.num_train_timesteps, 0, -1) / self.num_train_timesteps

    def share_of_noise(self, levels: Tensor) -> Tensor:
        """sigma where a schedule says `levels`; its own inverse."""
        return 1 - levels if self.from_data and self.timestep_sampling == "sigma" else levels

    @property
    def span(self) -> range:
        if not self.min_timestep and self.max_timestep in (None, self.num_train_timesteps):
            return range(self.num_train_timesteps)
        times = self.schedule * self.num_train_timesteps
        most = self.max_timestep or math.inf
        inside = ((times >= (self.min_timestep or 0)) & (times < most)).nonzero().flatten().tolist()
        return (
            range(inside[0], inside[-1] + 1)
            if inside
            else range(self.num_train_timesteps - 1, self.num_train_timesteps)
        )

    def draw(self, source: Generator, shape: Sequence[int] = ()) -> int:
        span = self.span
        return span[min(int(self.draw_place(source, shape) * len(span)), len(span) - 1)]

    def draw_place(self, source: Generator, shape: Sequence[int]) -> float:
        """Draw a place in the schedule, from 0 at its noisy end to 1."""
        if self.timestep_sampling == "sigma":
            scheme, mean, std, scale = self.weighting_scheme, self.logit_mean, self.logit_std, self.mode_scale
            return compute_density_for_timestep_sampling(scheme, 1, mean, std, scale, generator=source).item()
        if self.timestep_sampling == "uniform":
            return 1 - torch.rand((), generator=source).item()
        sigma = torch.sigmoid(self.sigmoid_scale * torch.randn((), generator=source)).item()
        if self.timestep_sampling == "shift":
            sigma = shifted(sigma, 1.0 if self.discrete_flow_shift is None else self.discrete_flow_shift)
        elif self.timestep_sampling == "flux_shift":
            sigma = shifted(sigma, flux_shift(shape, self.cell))
        return 1 - sigma

    def sigma(self, timesteps: Tensor) -> Tensor:
        device = timesteps.device
        if device not in self.sigmas:
            self.sigmas[device] = self.schedule.to(device)
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
        """The weights of the levels of the schedule, as in diffusers' scripts: the level is never 0, sigma may be."""
        return compute_loss_weighting_for_sd3(self.weighting_scheme, self.share_of_noise(self.sigma(timesteps)))
