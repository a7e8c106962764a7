"""Generative denoisers: one network call draws a clean image; several calls refine it.

Source: Peng et al., arXiv 2506.09416.
"""

import copy
import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import (
    Size,
    check_count,
    check_falling,
    check_noise_scale,
    check_non_negative,
    check_positive,
    check_share,
)
from ncvsd_inverse.machine import exact_arithmetic
from ncvsd_inverse.numerics import draw_normal, expand_level, interpolate
from ncvsd_inverse.priors.base import SIGMA_MAX, SIGMA_MIN, NetworkPrior, check_output
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.observations import combine_observations, raise_noise
from ncvsd_inverse.protocols import Generators, Statistics
from ncvsd_inverse.schedules import karras

__all__ = ["NCVSDPrior", "RefinedPrior"]

GAMMA = 0.414
GENERATION_LEVELS = 40
GENERATION_INDICES = {1: (10,), 2: (10, 22), 4: (0, 10, 20, 30)}


class NCVSDPrior(NetworkPrior):
    """A distilled network that draws x0 ~ q(x0 | u) in one call.

    It raises the noise of u from sigma to sigma_hat = (1 + gamma) sigma and calls the network on
    the noisier image with u as its condition:

        x0 = network(u + k sqrt(sigma_hat^2 - sigma^2) z, sigma_hat, u, sigma),  z ~ N(0, I)

    with k = 1 in training. `noise_scale` holds other values: draws of a network that came out too
    alike or too unlike have the right variance with the noise z a little larger or smaller (see
    `ncvsd_inverse.evaluation.calibrate_noise_scale`).

    A network that tempers, trained with `DistillConfig.tempered_weight`, returns E[x0 | u] where
    its noise z is 0, and with T z in place of z that mean plus T times the draw's distance from it.

    The network is told a level in [sigma_min, sigma_max], where it was trained: a smaller sigma is
    raised to sigma_min, so the draw is made as if u were that little noisier; a larger one is an
    error (beyond 1% for rounding).

    Args:
        network: (x, sigma, condition, condition_sigma, labels) -> x0 with images (B, C, H, W),
            stds (B,) and one-hot labels (B, K) or None.
        image_shape: the one shape (C, H, W) it takes, or None when any size works.
        card: what is known of the prior.
        gamma: how far the noise level is raised, >= 0; the value used in training. With 0 all
            draws given u are the same.
        sigma_min: smallest trained noise std, > 0, image units.
        sigma_max: largest trained noise std, image units.
        noise_scale: pairs (sigma, k), sigma increasing and > 0, k > 0; between them k is linear in
            log sigma, beyond them constant. Empty: 1 everywhere.
        statistics: mean and covariances of its images, which sampling by conditioning needs.
        tempers: whether the network was trained to temper.

    Attributes:
        nfe_per_sample: 1.
        has_mean: whether `denoise` returns the mean, and `tempered` keeps it: `tempers`.

    Raises:
        ValueError: if an argument is out of range or `image_shape` does not fit the network.

    Source:
        Peng et al., arXiv 2506.09416.
    """

    generation_calls = 4

    def __init__(
        self,
        network: nn.Module,
        *,
        image_shape: Sequence[int] | None,
        card: PriorCard | None = None,
        gamma: float = GAMMA,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        noise_scale: Sequence[tuple[float, float]] = (),
        statistics: Statistics | None = None,
        tempers: bool = False,
    ) -> None:
        super().__init__(
            network,
            image_shape=image_shape,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            card=card,
            statistics=statistics,
        )
        self.gamma = check_non_negative("gamma", gamma)
        self.noise_scale = check_noise_scale("noise_scale", noise_scale)
        self.nfe_per_sample = 1
        self.has_mean = tempers

    @exact_arithmetic()
    @torch.no_grad()
    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Draw x0 ~ q(x0 | u); one network call.

        Args:
            u: noisy images x0 + sigma * eps, shape (B, C, H, W).
            sigma: noise std, image units; a float or shape (B,).
            generator: None, one generator, or one for each image.

        Returns:
            Draws, same shape and dtype as u.

        Raises:
            ValueError: if u does not fit the prior or sigma is not in (0, 1.01 sigma_max].
        """
        x, level = self._prepare("u", u, sigma)
        return self._draw(x, level, generator).to(u.dtype)

    @exact_arithmetic()
    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Return the draw with its noise z at 0: E[x0 | x] if the network tempers.

        Args:
            x: noisy images, shape (B, C, H, W).
            sigma: noise std, image units; a float or shape (B,).

        Returns:
            Means, same shape and dtype as x.

        Raises:
            ValueError: if x does not fit the prior or sigma is not in (0, 1.01 sigma_max].
        """
        images, level = self._prepare("x", x, sigma)
        return self._pass(images, level, torch.zeros_like(images)).to(x.dtype)

    def with_noise_scale(self, noise_scale: Sequence[tuple[float, float]]) -> Self:
        """Return this prior with another `noise_scale`; the network is shared."""
        twin = copy.copy(self)
        twin.noise_scale = check_noise_scale("noise_scale", noise_scale)
        return twin

    def tempered(self, temperature: float) -> Self:
        """Return this prior with the spread of its draws made smaller: their noise z is scaled.

        If the network tempers, its draws are then `temperature` times as far from the mean;
        otherwise the mean moves too.

        Args:
            temperature: the factor, > 0; below 1 draws are nearer to their mean than the law that
                the network learned.
        """
        temperature = check_positive("temperature", temperature)
        pairs = self.noise_scale or ((1.0, 1.0),)
        return self.with_noise_scale([(sigma, temperature * factor) for sigma, factor in pairs])

    def refined(self, levels: Sequence[float], *, zeta: float = 1.0) -> "RefinedPrior":
        """Return a prior that draws in several steps, one network call for each of `levels`.

        Args:
            levels: strictly decreasing noise stds, image units; the first may be `math.inf`.
            zeta: share of fresh noise between steps, in [0, 1].

        Raises:
            ValueError: if `levels` is empty or does not decrease, or an argument is out of range.
        """
        return RefinedPrior(self, levels, zeta=zeta)

    @exact_arithmetic()
    def generate(
        self,
        num: int,
        num_steps: Literal[1, 2, 4] = 4,
        seed: int = 0,
        *,
        size: Size | None = None,
        batch_size: int = 16,
    ) -> Tensor:
        """Draw images from pure noise: the multi-step draw given noise at `sigma_max`.

        Args:
            num: number of images, >= 1.
            num_steps: network calls for each image: 1, 2 or 4, at the published levels.
            seed: >= 0; image i is a function of (seed, i), whatever `num` and `batch_size`.
            size: (H, W) or one side; needed when the prior takes any size.
            batch_size: images at a time, >= 1.

        Returns:
            Images, shape (num, C, H, W), float32.

        Raises:
            ValueError: if an argument is out of range, or the shape is not known.
        """
        if check_count("num_steps", num_steps) not in GENERATION_INDICES:
            raise ValueError(f"num_steps must be 1, 2 or 4, got {num_steps}")
        table = karras(GENERATION_LEVELS, self.sigma_max, self.sigma_min)
        refined = self.refined([table[index] for index in GENERATION_INDICES[num_steps]])
        return torch.cat(
            [
                refined.sample(self.sigma_max * eps, self.sigma_max, generator=generators)
                for eps, generators in self._start_noise(num, seed, size, batch_size)
            ]
        )

    def _draw(self, u: Tensor, level: Tensor, generator: Generators) -> Tensor:
        """Draw x0 given checked images (B, C, H, W) at levels (B,)."""
        return self._pass(u, level, draw_normal(u, generator))

    def _pass(self, u: Tensor, level: Tensor, z: Tensor) -> Tensor:
        """Return what the network makes of images at levels (B,) with its noise z."""
        level = level.clamp(self.sigma_min, self.sigma_max)
        if self.noise_scale:
            stds, factors = (z.new_tensor(row) for row in zip(*self.noise_scale, strict=True))
            z = expand_level(interpolate(level.log(), stds.log(), factors), z) * z
        x, raised = raise_noise(u, level, z, self.gamma)
        return check_output(self._call(x, raised, u, level, self._labels(u))).to(u.dtype)


class RefinedPrior:
    """A generative denoiser that draws in several steps, each nearer to the image.

    A step at level s has two observations of x0: u at std sigma and x at std s. They act like one

        y_eff = sigma_eff^2 (u / sigma^2 + x / s^2),  sigma_eff = (sigma^-2 + s^-2)^(-1/2)

    from which the prior draws x0; noise of the next level makes the next x. With an exact prior
    every further step keeps the law of the draw; with a distilled one it improves it.

    The first x is pure noise in place of an observation at levels[0]. That is harmless if
    levels[0] is far above the noise std of u, or far above the range of images (say 10 or more);
    otherwise it pulls the draw towards grey. `math.inf` is always right: the first draw then sees
    u alone.

    Args:
        prior: the prior that draws in one call.
        levels: strictly decreasing noise stds, image units; the first may be `math.inf`.
        zeta: share of fresh noise between steps, in [0, 1]; 1 is the published choice, 0 keeps
            (x - x0) / s, the noise by which the last draw explains x.

    Attributes:
        nfe_per_sample: the number of levels.

    Raises:
        ValueError: if `levels` is empty or does not decrease, or an argument is out of range.

    Source:
        Peng et al., arXiv 2506.09416, algorithm 2; we compute with x = x0 + s * eps_x throughout,
        which admits an infinite first level.
    """

    def __init__(self, prior: NCVSDPrior, levels: Sequence[float], *, zeta: float = 1.0) -> None:
        self.levels = check_falling("levels", levels, or_infinite=True)
        self.prior = prior
        self.network = prior.network
        self.zeta = check_share("zeta", zeta, or_zero=True)
        self.nfe_per_sample = len(self.levels)
        self.image_shape = prior.image_shape
        self.sigma_min = prior.sigma_min
        self.sigma_max = prior.sigma_max
        self.card = prior.card
        self.statistics = prior.statistics

    @exact_arithmetic()
    @torch.no_grad()
    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Draw x0 ~ q(x0 | u); one network call for each level.

        Args:
            u: noisy images x0 + sigma * eps, shape (B, C, H, W).
            sigma: noise std, image units; a float or shape (B,).
            generator: None, one generator, or one for each image.

        Returns:
            Draws, same shape and dtype as u.

        Raises:
            ValueError: if u does not fit the prior or sigma is not in (0, 1.01 sigma_max].
        """
        images, level_u = self.prior._prepare("u", u, sigma)
        x0, eps_x = torch.zeros_like(images), draw_normal(images, generator)
        for i, level in enumerate(self.levels):
            merged = combine_observations(images, level_u, x0 + level * eps_x, level)
            drawn = self.prior._draw(*merged, generator)
            if i + 1 < len(self.levels):
                explained = eps_x + (x0 - drawn) / level
                fresh = draw_normal(images, generator)
                eps_x = math.sqrt(1 - self.zeta) * explained + math.sqrt(self.zeta) * fresh
            x0 = drawn
        return x0.to(u.dtype)

    def tempered(self, temperature: float) -> "RefinedPrior":
        """Return this prior with the noise z of every step made smaller; see `NCVSDPrior`."""
        return RefinedPrior(self.prior.tempered(temperature), self.levels, zeta=self.zeta)

    def to(self, device: torch.device | str) -> "RefinedPrior":
        """Move the network, which `prior` shares, to `device`, in place; return the prior."""
        self.prior.to(device)
        return self
