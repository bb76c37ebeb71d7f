"""The noise of one example, as options of kohya's scripts shape it. z, z', z_i are standard normal.

    eps = z + f o z'                                 z' has one number for each channel; f is 1, or uniform in 0..1
                                                     o = max(0, noise_offset + adaptive_noise_scale |mean of x_0|)
    eps = (eps + sum_i discount^i up(z_i)) / std     multires: z_i is smaller by a factor of 2 to 4 at each i >= 0
    in  = eps + f ip_noise_gamma z''                 what x_t is made with, while eps is what is predicted
                                                     (input perturbation, arXiv 2301.11706)

The mean of x_0 is that of each channel. Shapes: x_0, eps, z, z'' [C, h, w]; z' [C, 1, 1].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def multires_noise(noise: Tensor, iterations: int, discount: float, source: Generator) -> Tensor:
    """Noise [C, h, w] with more and more of its low frequencies, scaled to a standard deviation of 1."""
    channels, height, width = noise.shape
    for number in range(iterations):
        factor = (2 + 2 * torch.rand((), generator=source).item()) ** number
        small = max(1, int(height / factor)), max(1, int(width / factor))
        coarse = torch.randn(1, channels, *small, generator=source)
        noise = noise + discount**number * F.interpolate(coarse, (height, width), mode="bilinear")[0]
        if 1 in small:
            break
    return noise / noise.std()


@dataclass(frozen=True)
class NoiseRecipe:
    """The settings of the noise; the names are those of the options."""

    noise_offset: float = 0.0
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False

    def shaped(self, noise: Tensor, channel_means: Tensor, source: Generator) -> Tensor:
        """eps [C, h, w], from standard normal noise; `channel_means` [C] are those of the latents."""
        if self.noise_offset:
            offset: float | Tensor = strength_of(self.noise_offset, self.noise_offset_random_strength, source)
            if self.adaptive_noise_scale:
                offset = (offset + self.adaptive_noise_scale * channel_means.abs()[:, None, None]).clamp(min=0)
            noise = noise + offset * torch.randn(noise.shape[0], 1, 1, generator=source)
        if self.multires_noise_iterations:
            noise = multires_noise(noise, self.multires_noise_iterations, self.multires_noise_discount, source)
        return noise

    def perturbed(self, noise: Tensor, source: Generator) -> Tensor | None:
        """Return the noise that x_t is made with [C, h, w]; None if it is the noise itself."""
        if not self.ip_noise_gamma:
            return None
        strength = strength_of(self.ip_noise_gamma, self.ip_noise_gamma_random_strength, source)
        return noise + strength * torch.randn(noise.shape, generator=source)


def strength_of(largest: float, random: bool, source: Generator) -> float:
    return largest * torch.rand((), generator=source).item() if random else largest
