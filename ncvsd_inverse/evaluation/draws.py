"""Noisy images and draws, each from the random numbers of its own image."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count, check_shape
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.numerics import draw_normal, make_generators
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior
from ncvsd_inverse.protocols import Denoiser, Prior

__all__ = [
    "DRAWS",
    "GENERATION",
    "HALVES",
    "LEVELS",
    "TEACHER_DRAWS",
    "add_noise",
    "check_sound",
    "check_teacher",
    "draw_samples",
    "make_sources",
    "over_pixels",
    "reverse_diffusion",
]

LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Noise stds at which a prior is judged, image units."""

NOISE, DRAWS, TEACHER_DRAWS, GENERATION, HALVES = range(5)
"""What a stream of random numbers is for, the second entry of its key."""


def add_noise(x0: Tensor, sigma: float, seed: int, places: Iterable[int]) -> Tensor:
    """Return x0 + sigma * eps, shape (B, C, H, W); image i has the noise of places[i]."""
    return x0 + sigma * draw_normal(x0, make_sources(seed, NOISE, places, x0.device))


def make_sources(
    seed: int, stream: int, places: Iterable[int], device: torch.device
) -> list[torch.Generator]:
    """Return the generators of a stream for the images at some places."""
    return make_generators([(seed, stream, place) for place in places], device)


def draw_samples(
    sampler: Prior, u: Tensor, sigma: float, num: int, sources: Sequence[torch.Generator]
) -> Tensor:
    """Return `num` draws of x0 given u, shape (num, B, C, H, W)."""
    out = u.new_empty(num, *u.shape)
    for place in out:
        place.copy_(check_shape("a draw", sampler.sample(u, sigma, generator=sources), u.shape))
    check_sound("a draw", out, sigma)
    return out


def over_pixels(x: Tensor) -> Tensor:
    """Return the mean of each image of x (B, ...), shape (B,), float64 on the CPU."""
    return x.flatten(1).mean(1, dtype=torch.float64).cpu()


def reverse_diffusion(
    teacher: Denoiser, num_steps: int, image_shape: Sequence[int]
) -> DiffusionPrior:
    """Return the teacher as a sampler with `num_steps` calls."""
    num_steps = check_count("num_steps", num_steps, least=2)
    if isinstance(teacher, DiffusionPrior):
        return teacher.with_steps(num_steps)
    return DiffusionPrior(teacher.denoise, num_steps=num_steps, image_shape=image_shape)


def check_teacher(teacher: Denoiser) -> None:
    """TypeError unless the teacher returns posterior means."""
    if isinstance(teacher, NCVSDPrior) or not isinstance(teacher, Denoiser):
        raise TypeError(
            f"teacher must be a denoiser that was not distilled, got {type(teacher).__name__}"
        )


def check_sound(name: str, x: Tensor, sigma: float | None = None) -> None:
    """DivergenceError unless `x` is finite."""
    if not bool(torch.isfinite(x).all()):
        where = "" if sigma is None else f" at sigma = {sigma:g}"
        raise DivergenceError(f"{name} left the finite numbers{where}")
