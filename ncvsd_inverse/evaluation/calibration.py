"""The factor on a prior's noise by which its draws vary as the posterior does."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count, check_finite, check_images, check_level
from ncvsd_inverse.evaluation.draws import (
    DRAWS,
    LEVELS,
    add_noise,
    check_teacher,
    draw_samples,
    make_sources,
    over_pixels,
)
from ncvsd_inverse.priors import NCVSDPrior
from ncvsd_inverse.protocols import Denoiser

__all__ = ["calibrate_noise_scale"]

FACTORS = (0.5, 2.0)
"""Range in which factors on a prior's noise are looked for."""


@torch.no_grad()
def calibrate_noise_scale(
    prior: NCVSDPrior,
    teacher: Denoiser,
    images: Tensor,
    *,
    levels: Sequence[float] = LEVELS,
    draws: int = 8,
    rounds: int = 7,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[tuple[float, float], ...]:
    """Find the factors on a prior's noise z that make its posterior ratio 2.

    A draw from the posterior is as far from the posterior mean as the truth is, independently: its
    mean square error is twice the teacher's. Where a prior's mean is biased its draws then vary a
    little less than the posterior.

    Args:
        prior: the prior; its own `noise_scale` is ignored.
        teacher: the denoiser that gives the least mean square error.
        images: clean images that it was not trained on, shape (B, C, H, W), in [-1, 1].
        levels: noise stds, > 0, image units.
        draws: draws for each image and level, >= 1.
        rounds: times that the range `FACTORS` of a factor is halved, >= 1; 7 leave 1% of it.
        seed: >= 0.
        batch_size: images at a time, >= 1.

    Returns:
        Pairs (level, factor) for `NCVSDPrior.with_noise_scale`, levels increasing.

    Raises:
        ValueError: if an argument is out of range or the images do not fit.
        DivergenceError: if a draw is not finite.
    """
    check_teacher(teacher)
    check_finite("images", check_images("images", images))
    draws, rounds = check_count("draws", draws), check_count("rounds", rounds)
    batch_size = check_count("batch_size", batch_size)
    found = []
    for level in sorted(levels):
        check_level("levels", level, largest=prior.sigma_max)
        sigma, low, high = float(level), *FACTORS
        for _ in range(rounds):
            # The variance can grow with a high power of the factor: only bisection is safe.
            factor = math.sqrt(low * high)
            scaled, error, least = prior.with_noise_scale([(sigma, factor)]), 0.0, 0.0
            for first in range(0, len(images), batch_size):
                x0 = images[first : first + batch_size]
                places = range(first, first + len(x0))
                sources = make_sources(seed, DRAWS, places, x0.device)
                u = add_noise(x0, sigma, seed, places)
                drawn = draw_samples(scaled, u, sigma, draws, sources)
                error += float((drawn - x0).square().mean((0, 2, 3, 4)).sum())
                least += float(over_pixels((teacher.denoise(u, sigma) - x0).square()).sum())
            low, high = (factor, high) if error < 2 * least else (low, factor)
        found.append((sigma, math.sqrt(low * high)))
    return tuple(found)
