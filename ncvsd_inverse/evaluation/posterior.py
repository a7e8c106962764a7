"""The judge of a prior: figures over noise levels and of generated images, against its teacher.

It must not know how the prior was trained, or where images come from and figures go to.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count, check_finite, check_images, check_level, check_shape
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.numerics import (
    Moments,
    draw_normal,
    ensemble_crps,
    frechet_distance,
    make_generators,
)
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior
from ncvsd_inverse.protocols import Prior

LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Noise stds at which a prior is judged, image units."""

GENERATION_CALLS = 35
"""Network calls of each image that a teacher generates for comparison."""

BLOCK = 256
"""Images that are generated with one seed and held at a time."""

FACTORS = (0.5, 2.0)
"""Range in which factors on a prior's noise are looked for."""

_DECIBEL = 10 / math.log(10)

_NOISE, _DRAWS, _TEACHER_DRAWS, _GENERATION, _HALVES = range(5)
"""What a stream of random numbers is for, the second entry of its key."""

Item = TypeVar("Item")


class Teacher(Protocol):
    """What a prior is held against: a denoiser that returns the posterior mean."""

    def denoise(self, x: Tensor, sigma: float | Tensor, /) -> Tensor:
        """Return E[x0 | x], shape (B, C, H, W)."""
        ...


class Generating(Protocol):
    """A prior that draws images from nothing in 1, 2 or 4 network calls."""

    def generate(
        self,
        num: int,
        num_steps: Literal[1, 2, 4] = 4,
        seed: int = 0,
        *,
        size: Sequence[int] | None = None,
        batch_size: int = 16,
    ) -> Tensor:
        """Draw images of `size` (H, W), shape (num, C, H, W)."""
        ...


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

    The estimates obey the identity exactly. Each is unbiased before the division: variance is
    that of the draws with divisor (number - 1), and from the squared distance of their mean to M
    variance / number is subtracted, which is what too few draws add to it.

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


@dataclass(frozen=True)
class GenerationFigure:
    """How far one set of images is from another.

    Attributes:
        name: what the images are.
        images: how many there are.
        reference: how many they are held against.
        distance: Fréchet distance of their features.
    """

    name: str
    images: int
    reference: int
    distance: float


@dataclass(frozen=True)
class Generation:
    """Fréchet distances of generated images, and of the training images among themselves.

    Attributes:
        figures: one of 1, 2 and 4 calls and of the teacher, each against all training images;
            then that of one half of the training images against the other.
        seed: of the noise and of the halves.
    """

    figures: tuple[GenerationFigure, ...]
    seed: int

    def to_dict(self) -> dict[str, object]:
        """Return all of it as what JSON can hold."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    prior: Prior,
    teacher: Teacher,
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

    Noise and draws of image i are functions of (seed, i) and the same standard normals serve at
    every level, so that no figure depends on `batch_size`, the other levels or the other images.

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
    if not levels:
        raise ValueError("levels must hold at least one level, got none")
    for level in levels:
        check_level("levels", level, largest=getattr(prior, "sigma_max", math.inf))
    for name, value in (("draws", draws), ("teacher_draws", teacher_draws)):
        check_count(name, value, least=2)
    check_count("seed", seed, least=0)
    check_count("batch_size", batch_size)
    _check_teacher(teacher)
    diffusion = None
    if teacher_steps is not None:
        diffusion = _reverse_diffusion(teacher, teacher_steps, images.shape[1:])

    own: list[list[_Errors]] = [[] for _ in levels]
    others: list[list[_Errors]] = [[] for _ in levels]
    jobs = [
        (number, first)
        for number in range(len(levels))
        for first in range(0, len(images), batch_size)
    ]
    for number, first in _shown(jobs, "noise levels", progress):
        x0, sigma = images[first : first + batch_size], float(levels[number])
        places = range(first, first + len(x0))
        u = _noisy(x0, sigma, seed, places)
        mean = teacher.denoise(u, sigma)
        check_shape("the teacher's output", mean, u.shape)
        _check_sound("the teacher's mean", mean, sigma)
        sources = _generators(seed, _DRAWS, places, x0.device)
        own[number].append(_errors(_draw(prior, u, sigma, draws, sources), mean, x0))
        if diffusion is not None:
            sources = _generators(seed, _TEACHER_DRAWS, places, x0.device)
            others[number].append(
                _errors(_draw(diffusion, u, sigma, teacher_draws, sources), mean, x0)
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


@torch.no_grad()
def calibrate_noise_scale(
    prior: NCVSDPrior,
    teacher: Teacher,
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
        prior: the prior; its own `spread` is not looked at.
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
    _check_teacher(teacher)
    check_finite("images", check_images("images", images))
    check_count("draws", draws)
    check_count("rounds", rounds)
    check_count("batch_size", batch_size)
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
                sources = _generators(seed, _DRAWS, places, x0.device)
                u = _noisy(x0, sigma, seed, places)
                drawn = _draw(scaled, u, sigma, draws, sources)
                error += float((drawn - x0).square().mean((0, 2, 3, 4)).sum())
                least += float(_over_pixels((teacher.denoise(u, sigma) - x0).square()).sum())
            low, high = (factor, high) if error < 2 * least else (low, factor)
        found.append((sigma, math.sqrt(low * high)))
    return tuple(found)


@torch.no_grad()
def evaluate_generation(
    prior: Generating,
    teacher: Teacher,
    training: Iterable[Tensor],
    *,
    features: Callable[[Tensor], Tensor],
    samples: int = 10_000,
    teacher_samples: int | None = None,
    teacher_steps: int = GENERATION_CALLS,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> Generation:
    """Measure the Fréchet distance of generated images to the training images.

    Sums of the features are kept, and at most 256 images at a time. The fewer the images, the
    larger is the distance by chance: hold like numbers against each other. How far real images
    are apart is told by two random halves of the training images.

    Args:
        prior: generates in 1, 2 and 4 calls.
        teacher: the denoiser that it was distilled from; generates by its probability-flow ODE.
        training: batches of training images, each of shape (B, C, H, W), in [-1, 1], at least 4
            images in all; gone through once. Each batch is cut into random halves.
        features: images (B, C, H, W) -> features (B, D); with `metrics.alex_features` the
            distance is FD-alex.
        samples: images that the prior generates with each number of calls, >= 2.
        teacher_samples: images that the teacher generates, >= 2; None: `samples`.
        teacher_steps: denoiser calls of each of these, >= 2.
        seed: >= 0. The images do not depend on `batch_size`, except by rounding.
        batch_size: images that pass through a network at a time, >= 1.
        progress: show a bar on standard error for each set of images.

    Returns:
        The distances.

    Raises:
        ValueError: if an argument is out of range, or the images do not fit prior or teacher.
        TypeError: if `teacher` cannot denoise.
        DivergenceError: if a generated image is not finite.
    """
    teacher_samples = samples if teacher_samples is None else teacher_samples
    for name, value in (("samples", samples), ("teacher_samples", teacher_samples)):
        check_count(name, value, least=2)
    check_count("seed", seed, least=0)
    check_count("batch_size", batch_size)
    _check_teacher(teacher)

    shape, halves = _training_halves(training, features, seed, progress)
    diffusion = _reverse_diffusion(teacher, teacher_steps, shape)
    whole, size = halves[0] + halves[1], shape[1:]

    def held_against_training(
        name: str, num: int, generate: Callable[[int, int], Tensor]
    ) -> GenerationFigure:
        moments = Moments.none()
        for block in _shown(_generated(generate, num, seed), name, progress, -(-num // BLOCK)):
            _check_sound(f"generation with {name}", block)
            moments += Moments.of(features(block))
        return GenerationFigure(name, num, whole.count, frechet_distance(moments, whole))

    def by_prior(num_steps: Literal[1, 2, 4]) -> Callable[[int, int], Tensor]:
        return lambda num, key: prior.generate(
            num, num_steps, key, size=size, batch_size=batch_size
        )

    def by_teacher(num: int, key: int) -> Tensor:
        return diffusion.generate(num, teacher_steps, key, size=size, batch_size=batch_size)

    return Generation(
        figures=(
            held_against_training("1 call", samples, by_prior(1)),
            held_against_training("2 calls", samples, by_prior(2)),
            held_against_training("4 calls", samples, by_prior(4)),
            held_against_training(f"teacher, {teacher_steps} calls", teacher_samples, by_teacher),
            GenerationFigure(
                "half of the training images, to the other half",
                halves[0].count,
                halves[1].count,
                frechet_distance(*halves),
            ),
        ),
        seed=seed,
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
    variance = _over_pixels(draws.var(0))
    return _Errors(
        teacher=_over_pixels((mean - x0).square()),
        draw=_over_pixels((draws - x0).square().mean(0)),
        mean=_over_pixels((average - x0).square()),
        variance=variance,
        bias=_over_pixels((average - mean).square()) - variance / len(draws),
        crps=_over_pixels(ensemble_crps(draws, x0)),
    )


def _over_pixels(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1, dtype=torch.float64).cpu()


def _joined(batches: Sequence[_Errors]) -> _Errors:
    return _Errors(*(torch.cat(column) for column in zip(*batches, strict=True)))


def _draw(
    sampler: Prior, u: Tensor, sigma: float, num: int, sources: Sequence[torch.Generator]
) -> Tensor:
    """Return `num` draws of x0 given u, shape (num, B, C, H, W)."""
    out = u.new_empty(num, *u.shape)
    for place in out:
        place.copy_(check_shape("a draw", sampler.sample(u, sigma, generator=sources), u.shape))
    _check_sound("a draw", out, sigma)
    return out


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


def _reverse_diffusion(
    teacher: Teacher, num_steps: int, image_shape: Sequence[int]
) -> DiffusionPrior:
    """Return the teacher as a sampler with `num_steps` calls."""
    check_count("num_steps", num_steps, least=2)
    if isinstance(teacher, DiffusionPrior):
        return teacher.with_steps(num_steps)
    return DiffusionPrior(teacher.denoise, num_steps=num_steps, image_shape=image_shape)


def _training_halves(
    training: Iterable[Tensor], features: Callable[[Tensor], Tensor], seed: int, progress: bool
) -> tuple[tuple[int, ...], tuple[Moments, Moments]]:
    """Return the shape (C, H, W) of the images and the moments of two random halves."""
    shape: tuple[int, ...] | None = None
    first, second = Moments.none(), Moments.none()
    for number, batch in enumerate(_shown(training, "training images", progress)):
        check_images("training", batch)
        shape = shape or tuple(batch.shape[1:])
        check_shape("training", batch, (len(batch), *shape))
        (source,) = make_generators([(seed, _HALVES, number)])
        rows = features(batch)[torch.randperm(len(batch), generator=source)]
        # An odd batch gives its extra image to the half that is behind.
        cut = (len(batch) + (first.count <= second.count)) // 2
        first, second = first + Moments.of(rows[:cut]), second + Moments.of(rows[cut:])
    if shape is None or second.count < 2:
        raise ValueError(f"training must hold at least 4 images, got {first.count + second.count}")
    return shape, (first, second)


def _generated(generate: Callable[[int, int], Tensor], num: int, seed: int) -> Iterator[Tensor]:
    """Yield `num` images in blocks; `generate` takes a number of images and a seed."""
    for number, first in enumerate(range(0, num, BLOCK)):
        (source,) = make_generators([(seed, _GENERATION, number)])
        yield generate(min(BLOCK, num - first), source.initial_seed())


def _shown(
    items: Iterable[Item], title: str, progress: bool, total: int | None = None
) -> Iterable[Item]:
    """Return `items`, with a bar on standard error if `progress`."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, title, total=total, console=console, disable=not progress, transient=True)


def _noisy(x0: Tensor, sigma: float, seed: int, places: Iterable[int]) -> Tensor:
    """Return the images x0 with the noise of their places."""
    return x0 + sigma * draw_normal(x0, _generators(seed, _NOISE, places, x0.device))


def _generators(
    seed: int, stream: int, places: Iterable[int], device: torch.device
) -> list[torch.Generator]:
    return make_generators([(seed, stream, place) for place in places], device)


def _check_teacher(teacher: Teacher) -> None:
    if not callable(getattr(teacher, "denoise", None)):
        raise TypeError(f"teacher must have `denoise`, got {type(teacher).__name__}")


def _check_sound(name: str, x: Tensor, sigma: float | None = None) -> None:
    """DivergenceError unless `x` is finite."""
    if not bool(torch.isfinite(x).all()):
        where = "" if sigma is None else f" at sigma = {sigma:g}"
        raise DivergenceError(f"{name} left the finite numbers{where}")
