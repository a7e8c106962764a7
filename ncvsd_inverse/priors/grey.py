"""Priors of colour images as priors of grey ones."""

import math
from typing import Self

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_image_size, check_images
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors.covariance import SpectralCovariance
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.ncvsd import NCVSDPrior
from ncvsd_inverse.protocols import Generators, Points, Statistics

__all__ = ["GreyPrior"]

CHANNELS = 3

SEED = 2506_09416
"""Of the noise in the differences of channels of which the mean is taken."""


class GreyPrior:
    """A prior of RGB images as one of grey images, in as many network calls.

    A grey image of noise std s is the mean of three channels of noise std sqrt(3) s whose
    differences are unknown noise: with that noise added the network of the colours sees what it was
    trained on, and a grey scene. The mean of its channels is returned.

    Args:
        prior: a prior of RGB images.

    Attributes:
        nfe_per_sample, network, points, has_mean: those of `prior`.
        image_shape: (1, H, W), or None when any size works.
        sigma_min, sigma_max: noise stds of grey images, image units.
        statistics: mean and covariances of grey images, or None.
    """

    image_channels = 1

    def __init__(self, prior: NCVSDPrior | DiffusionPrior) -> None:
        self.prior = prior
        self.nfe_per_sample = prior.nfe_per_sample
        self.network: nn.Module = prior.network
        shape = prior.image_shape
        self.image_shape = None if shape is None else (1, *shape[1:])
        self.sigma_min, self.sigma_max = (
            sigma / math.sqrt(CHANNELS) for sigma in (prior.sigma_min, prior.sigma_max)
        )
        self.points: Points | None = prior.points
        self.has_mean = prior.has_mean
        self.statistics: Statistics | None = (
            None if prior.statistics is None else _GreyStatistics(prior.statistics)
        )

    def __repr__(self) -> str:
        return f"<grey images of {self.prior!r}>"

    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Draw x0 ~ p(x0 | u).

        Args:
            u: noisy grey images x0 + sigma * eps, shape (B, 1, H, W).
            sigma: noise std, image units; a float or shape (B,).
            generator: None, one generator, or one for each image.

        Returns:
            Draws, same shape and dtype as u.

        Raises:
            ValueError: if u is not grey or does not fit the prior, or sigma is out of range.
        """
        colours, level = self._in_colour(u, sigma, draw_normal(_three(u), generator))
        return self.prior.sample(colours, level, generator=generator).mean(1, keepdim=True)

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Return E[x0 | x]; arguments, result and errors as for `sample`.

        The unknown differences of the channels are the same noise for all images.
        """
        source = torch.Generator(x.device).manual_seed(SEED)
        noise = draw_normal(_three(x[:1]), source).expand(len(x), -1, -1, -1)
        colours, level = self._in_colour(x, sigma, noise)
        return self.prior.denoise(colours, level).mean(1, keepdim=True)

    def tempered(self, temperature: float) -> Self:
        """Return this prior with the spread of its draws made smaller by a factor > 0."""
        return type(self)(self.prior.tempered(temperature))

    def to(self, device: torch.device | str) -> Self:
        """Move the network, which `prior` shares, to `device`, in place; return the prior."""
        self.prior.to(device)
        return self

    def _in_colour(
        self, u: Tensor, sigma: float | Tensor, noise: Tensor
    ) -> tuple[Tensor, float | Tensor]:
        """Return grey images as RGB ones with noise in the differences, and their noise std."""
        check_images("u", u)
        check_image_size("u", u.shape[1:], channels=1)
        level = math.sqrt(CHANNELS) * sigma
        std = level.to(u).view(-1, 1, 1, 1) if isinstance(level, Tensor) else level
        return u + std * (noise - noise.mean(1, keepdim=True)), level


class _GreyStatistics:
    """Mean and covariances of the mean of the channels of RGB images."""

    def __init__(self, statistics: Statistics) -> None:
        self._of_colours = statistics

    @property
    def note(self) -> str:
        """What users of the statistics should be told."""
        return self._of_colours.note

    def mean_image(self, like: Tensor) -> Tensor:
        """Return the mean image, shape (1, 1, H, W)."""
        return self._of_colours.mean_image(_three(like)).mean(1, keepdim=True)

    def covariance(self, sigma: float, like: Tensor) -> SpectralCovariance:
        """Return the covariance of grey images given one of noise std `sigma`."""
        colours = self._of_colours.covariance(math.sqrt(CHANNELS) * sigma, _three(like))
        assert isinstance(colours, SpectralCovariance)
        weights = colours.mixing.mean(1).square()
        spectrum = (weights[:, None, None] * colours.spectrum).sum(0, keepdim=True)
        return SpectralCovariance(torch.ones_like(colours.mixing[:1, :1]), spectrum, like.shape[3])


def _three(x: Tensor) -> Tensor:
    return x.expand(-1, CHANNELS, -1, -1)
