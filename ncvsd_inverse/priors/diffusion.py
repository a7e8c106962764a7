"""A denoiser made a sampler by reverse diffusion; it must not know measurements or training."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_count, check_level, check_shape
from ncvsd_inverse.covariance import Statistics
from ncvsd_inverse.numerics import draw_normal, expand_level
from ncvsd_inverse.priors.base import SIGMA_MAX, SIGMA_MIN, NetworkPrior
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.protocols import Generators


class DiffusionPrior(NetworkPrior):
    """A sampler of p(x0 | u) by stochastic reverse diffusion from the level of u down.

    Each step from level t to s replaces x by a draw that is exact if the clean image is known to
    be D = E[x0 | x]:

        x_s = D + (s/t)^2 (x_t - D) + s sqrt(1 - (s/t)^2) eps

    and the last step returns D. This is a draw, not the end of the probability-flow ODE (which is
    a function of u alone); its law tends to p(x0 | u) as the number of steps grows. With few
    steps it is too narrow, since each step takes the mean D for a draw: Gaussian data loses about
    6 / num_steps of the posterior variance (measured: 0.28 of it at 20 steps, 0.06 at 100).

    Args:
        denoiser: E[x0 | x] for images (B, C, H, W) and stds (B,): an nn.Module or a function.
        num_steps: denoiser calls for each draw, >= 2 (one call would return a mean, no draw).
        image_shape: the one shape (C, H, W) it takes, or None when any size works.
        sigma_min: noise std at which the diffusion ends, > 0, image units; from a level sigma
            below 10 * sigma_min it ends at sigma / 10.
        sigma_max: largest noise std the denoiser knows, image units.
        exponent: > 0; large values put more levels near the end.
        card: what is known of the denoiser, if it was trained.
        statistics: mean and covariances of its images, which sampling by conditioning needs.

    Attributes:
        network: the denoiser as an nn.Module.
        nfe_per_sample: `num_steps`.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Levels: Karras et al., arXiv 2206.00364, section 3. Step: the ancestral step of Ho et al.,
        arXiv 2006.11239, for noise added without scaling the image.
    """

    def __init__(
        self,
        denoiser: nn.Module | Callable[[Tensor, Tensor], Tensor],
        *,
        num_steps: int = 20,
        image_shape: Sequence[int] | None = None,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        exponent: float = 7.0,
        card: PriorCard | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable, got {type(denoiser).__name__}")
        super().__init__(
            denoiser if isinstance(denoiser, nn.Module) else _Function(denoiser),
            image_shape=image_shape,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            card=card,
            statistics=statistics,
        )
        check_level("exponent", exponent)
        self.exponent = float(exponent)
        self.nfe_per_sample = check_count("num_steps", num_steps, least=2)

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Return E[x0 | x], one denoiser call; gradients pass.

        Args:
            x: noisy images, shape (B, C, H, W).
            sigma: noise std, > 0, image units; a float or shape (B,).

        Returns:
            Means, same shape and dtype as x.

        Raises:
            ValueError: if x does not fit the prior or sigma is not in (0, 1.01 sigma_max].
        """
        images, level = self._prepare("x", x, sigma)
        return self._mean(images, level).to(x.dtype)

    @torch.no_grad()
    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Draw x0 ~ p(x0 | u), approximately; `nfe_per_sample` denoiser calls.

        Args:
            u: noisy images x0 + sigma * eps, shape (B, C, H, W).
            sigma: noise std, image units; a float or shape (B,).
            generator: None, one generator, or one for each image.

        Returns:
            Draws, same shape and dtype as u.

        Raises:
            ValueError: if u does not fit the prior or sigma is not in (0, 1.01 sigma_max].
        """
        x, start = self._prepare("u", u, sigma)
        levels = self._levels(expand_level(start, x))
        for t, s in pairwise(levels):
            x0 = self._mean(x, t)
            kept = (s / t) ** 2
            x = x0 + kept * (x - x0) + s * (1 - kept).sqrt() * draw_normal(x, generator)
        return self._mean(x, levels[-1]).to(u.dtype)

    def generate(
        self, num: int, *, seed: int = 0, size: Sequence[int] | None = None, batch_size: int = 16
    ) -> Tensor:
        """Draw images from pure noise at `sigma_max`.

        Args:
            num: number of images, >= 1.
            seed: >= 0; image i is a function of (seed, i), whatever `num` and `batch_size`.
            size: (H, W); needed when the prior takes any size.
            batch_size: images at a time, >= 1.

        Returns:
            Images, shape (num, C, H, W), float32.

        Raises:
            ValueError: if an argument is out of range, or the shape is not known.
        """
        return torch.cat(
            [
                self.sample(self.sigma_max * eps, self.sigma_max, generator=generators)
                for eps, generators in self._start_noise(num, seed, size, batch_size)
            ]
        )

    def _levels(self, start: Tensor) -> list[Tensor]:
        """Return `nfe_per_sample` decreasing levels, each (B, 1, 1, 1), the first `start`."""
        power = 1 / self.exponent
        high, low = start**power, (start / 10).clamp(max=self.sigma_min) ** power
        last = self.nfe_per_sample - 1
        return [
            start,
            *((high + i / last * (low - high)) ** self.exponent for i in range(1, last + 1)),
        ]

    def _mean(self, x: Tensor, level: Tensor) -> Tensor:
        labels = self._labels(x)
        arguments = (x, level.flatten()) if labels is None else (x, level.flatten(), labels)
        x0: Tensor = self.network(*arguments)
        return check_shape("the denoiser's output", x0, x.shape).to(x.dtype)


class _Function(nn.Module):
    """A plain function as a module, so that its calls can be counted like a network's."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.function(x, sigma)
