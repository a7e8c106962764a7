"""A prior's draws against its teacher's posterior means and the true images, level by level."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ncvsd_inverse.checks import (
    as_value,
    check_count,
    check_finite,
    check_images,
    check_level,
    check_shape,
)
from ncvsd_inverse.evaluation.draws import (
    DRAWS,
    LEVELS,
    TEACHER_DRAWS,
    add_noise,
    check_sound,
    check_teacher,
    draw_samples,
    make_sources,
    over_pixels,
    reverse_diffusion,
)
from ncvsd_inverse.machine import track
from ncvsd_inverse.numerics import ensemble_crps
from ncvsd_inverse.protocols import Denoiser, Prior, PriorTraits

__all__ = ["Evaluation", "Figure", "LevelFigures", "PosteriorRatio", "evaluate"]

_DECIBEL = 10 / math.log(10)


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        value: the number.
        error: its standard error over the images (the noise and the draws of each included),
            by linearisation where it is a ratio or a logarithm.
    """

    value: float
    error: float


@dataclass(frozen=True)
class PosteriorRatio:
    """How wrong one draw is, in units of the teacher's mean square error, and why.

    For draws d with mean D (over infinitely many) of x0 given u, and a teacher's mean M,

        E|d - x0|^2  =  E|M - x0|^2  +  E|d - D|^2  +  E|D - M|^2  +  2 E<D - M, M - x0>

    and so ratio = 1 + variance + bias + cross after division by the first term. If M is the
    posterior mean, cross is 0, because M - x0 is uncorrelated with everything that u determines;
    if the draws too are from the posterior, bias is 0 and variance 1: the ratio is 2. A prior
    that returns the mean has ratio 1. With a trained teacher M is not exact, and cross tells:
    below 0, the mean of the draws is nearer to the images than the teacher is.

    The estimates obey the identity exactly. Each is unbiased before the division: the variance of
    the draws has the divisor number - 1, and bias is the squared distance of their mean to M minus
    variance / number, which a finite number of draws adds to it.

    Attributes:
        ratio: MSE of one draw, averaged over all draws.
        variance: of the draws.
        bias: squared, of their mean against the teacher's; may be below 0 by chance.
        cross: what is left, 2 <D - M, M - x0>.
    """

    ratio: Figure
    variance: Figure
    bias: Figure
    cross: Figure


@dataclass(frozen=True)
class LevelFigures:
    """Figures at one noise level. PSNR is 10 log10(4 / MSE), the MSE over all images and pixels.

    Nothing is clamped.

    Attributes:
        sigma: noise std, image units.
        teacher_psnr: of the teacher's mean, dB.
        prior: the posterior ratio of the prior's draws, and its parts.
        mean_psnr: of the mean of the prior's draws, dB.
        psnr_gap: `teacher_psnr` minus `mean_psnr`, dB. Exact posterior draws, n of them, leave
            10 log10(1 + 1/n): 0.13 dB for 32.
        crps: fair score of the prior's draws, mean over pixels, image units; lower is better.
        teacher: the posterior ratio of the teacher's reverse diffusion, where it was asked for.
    """

    sigma: float
    teacher_psnr: Figure
    prior: PosteriorRatio
    mean_psnr: Figure
    psnr_gap: Figure
    crps: Figure
    teacher: PosteriorRatio | None


@dataclass(frozen=True)
class Evaluation:
    """Figures of a prior over noise levels.

    Attributes:
        levels: the figures at each level, in the order asked for.
        images: number of images.
        draws: draws for each image and level.
        seed: of noise and draws.
        teacher_steps: denoiser calls for each draw of the teacher's reverse diffusion; None:
            it was not asked for.
        teacher_draws: draws of it for each image and level; None likewise.
    """

    levels: tuple[LevelFigures, ...]
    images: int
    draws: int
    seed: int
    teacher_steps: int | None
    teacher_draws: int | None

    def to_dict(self) -> dict[str, object]:
        """Return all of it as what JSON can hold."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    prior: Prior,
    teacher: Denoiser,
    images: Tensor,
    *,
    levels: Sequence[float] = LEVELS,
    draws: int = 32,
    teacher_steps: int | None = None,
    teacher_draws: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> Evaluation:
    """Hold a prior's draws against its teacher's means and the true images, level by level.

    Noise and draws of image i are functions of (seed, i), the same standard normals at every level.
    So no figure depends on `batch_size`, other levels or other images.

    Args:
        prior: the sampler to judge.
        teacher: the denoiser that it was distilled from, or another that returns E[x0 | u].
        images: clean images that neither was trained on, shape (B, C, H, W), B >= 2, in [-1, 1],
            on the device where both compute.
        levels: noise stds, > 0, image units.
        draws: draws of the prior for each image and level, >= 2.
        teacher_steps: judge the teacher's reverse diffusion too, with this many denoiser calls a
            draw, >= 2; slow. None: do not.
        teacher_draws: its draws for each image and level, >= 2.
        seed: >= 0.
        batch_size: images at a time, >= 1, of which each has `draws` in memory.
        progress: show a bar on standard error.

    Returns:
        The figures.

    Raises:
        ValueError: if an argument is out of range, or the images do not fit prior or teacher.
        TypeError: if `images` is no floating-point tensor or `teacher` cannot denoise.
        DivergenceError: if a mean or draw is not finite.
    """
    check_finite("images", check_images("images", images))
    if len(images) < 2:
        raise ValueError(f"images must hold at least 2, got {len(images)}")
    levels = as_value(levels)
    if not levels:
        raise ValueError("levels must hold at least one level, got none")
    for level in levels:
        check_level("levels", level, largest=PriorTraits.of(prior).sigma_max)
    draws = check_count("draws", draws, least=2)
    teacher_draws = check_count("teacher_draws", teacher_draws, least=2)
    seed = check_count("seed", seed, least=0)
    batch_size = check_count("batch_size", batch_size)
    check_teacher(teacher)
    diffusion = None
    if teacher_steps is not None:
        diffusion = reverse_diffusion(teacher, teacher_steps, images.shape[1:])

    own: list[list[_Errors]] = [[] for _ in levels]
    others: list[list[_Errors]] = [[] for _ in levels]
    jobs = [
        (number, first)
        for number in range(len(levels))
        for first in range(0, len(images), batch_size)
    ]
    for number, first in track(jobs, "batches of noise levels", shown=progress):
        x0, sigma = images[first : first + batch_size], float(levels[number])
        places = range(first, first + len(x0))
        u = add_noise(x0, sigma, seed, places)
        mean = teacher.denoise(u, sigma)
        check_shape("the teacher's output", mean, u.shape)
        check_sound("the teacher's mean", mean, sigma)
        sources = make_sources(seed, DRAWS, places, x0.device)
        own[number].append(_errors(draw_samples(prior, u, sigma, draws, sources), mean, x0))
        if diffusion is not None:
            sources = make_sources(seed, TEACHER_DRAWS, places, x0.device)
            others[number].append(
                _errors(draw_samples(diffusion, u, sigma, teacher_draws, sources), mean, x0)
            )
    return Evaluation(
        levels=tuple(
            _level_figures(float(level), _joined(mine), _joined(theirs) if theirs else None)
            for level, mine, theirs in zip(levels, own, others, strict=True)
        ),
        images=len(images),
        draws=draws,
        seed=seed,
        teacher_steps=teacher_steps,
        teacher_draws=None if teacher_steps is None else teacher_draws,
    )


class _Errors(NamedTuple):
    """Means over pixels for each image, shape (B,), float64; the unit is a mean square.

    `draw` is the error of one draw, `mean` that of the mean of the draws, `bias` is corrected
    for the number of draws, and `crps` has the unit of the images.
    """

    teacher: Tensor
    draw: Tensor
    mean: Tensor
    variance: Tensor
    bias: Tensor
    crps: Tensor


def _errors(draws: Tensor, mean: Tensor, x0: Tensor) -> _Errors:
    """Compare draws (S, B, C, H, W) and the teacher's mean with the images x0."""
    average = draws.mean(0)
    variance = over_pixels(draws.var(0))
    return _Errors(
        teacher=over_pixels((mean - x0).square()),
        draw=over_pixels((draws - x0).square().mean(0)),
        mean=over_pixels((average - x0).square()),
        variance=variance,
        bias=over_pixels((average - mean).square()) - variance / len(draws),
        crps=over_pixels(ensemble_crps(draws, x0)),
    )


def _joined(batches: Sequence[_Errors]) -> _Errors:
    return _Errors(*(torch.cat(column) for column in zip(*batches, strict=True)))


def _level_figures(sigma: float, own: _Errors, others: _Errors | None) -> LevelFigures:
    if not float(own.teacher.mean()) > 0:
        raise ValueError(f"teacher must err to be a measure, got MSE 0 at sigma = {sigma:g}")
    ratio = _ratio(own.mean, own.teacher)
    return LevelFigures(
        sigma=sigma,
        teacher_psnr=_psnr(own.teacher),
        prior=_posterior_ratio(own),
        mean_psnr=_psnr(own.mean),
        psnr_gap=Figure(10 * math.log10(ratio.value), _DECIBEL * ratio.error / ratio.value),
        crps=_average(own.crps),
        teacher=None if others is None else _posterior_ratio(others),
    )


def _posterior_ratio(errors: _Errors) -> PosteriorRatio:
    cross = errors.draw - errors.teacher - errors.variance - errors.bias
    return PosteriorRatio(
        *(
            _ratio(part, errors.teacher)
            for part in (errors.draw, errors.variance, errors.bias, cross)
        )
    )


def _average(values: Tensor) -> Figure:
    return Figure(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def _ratio(above: Tensor, below: Tensor) -> Figure:
    """Return the ratio of two means over images."""
    value = float(above.mean() / below.mean())
    return Figure(value, _average(above - value * below).error / float(below.mean()))


def _psnr(errors: Tensor) -> Figure:
    mse = _average(errors)
    return Figure(10 * math.log10(4 / mse.value), _DECIBEL * mse.error / mse.value)
