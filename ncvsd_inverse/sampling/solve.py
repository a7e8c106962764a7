"""The loops that restore images; they must not know which operator or prior they meet."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Literal, TypeAlias, TypeGuard, get_args

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import (
    check_choice,
    check_count,
    check_finite,
    check_floating,
    check_image_size,
    check_positive,
    check_shape,
    check_stays_finite,
)
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.numerics import draw_normal, make_generators
from ncvsd_inverse.operators.deepinv_physics import PhysicsOperator, adapt
from ncvsd_inverse.priors import DiffusionPrior, PriorHandle, load_prior
from ncvsd_inverse.priors.latent import LATENT_CHANNELS, LatentPrior
from ncvsd_inverse.priors.own_statistics import lacks_statistics, with_own_statistics
from ncvsd_inverse.protocols import (
    SIGMA_Y,
    Generators,
    LikelihoodStep,
    LinearOperator,
    Operator,
    Prior,
    Statistics,
)
from ncvsd_inverse.sampling.gauss_newton import GaussNewton
from ncvsd_inverse.sampling.likelihood import likelihood_step
from ncvsd_inverse.sampling.matheron import Matheron
from ncvsd_inverse.sampling.settings import (
    Average,
    default_average,
    default_schedule,
    published_schedule,
    published_sigma_lik,
)

Method: TypeAlias = Literal["conditioning", "gibbs"]
Estimate: TypeAlias = Literal["sample", "mean", "ema"]
Preset: TypeAlias = Literal["ncvsd"]

FAR = 10
"""How many times sigma_y a single sweep may be at without a warning."""

PIXELS_AT_ONCE = 4_000_000
"""Pixels (channels not counted) of all chains that run together when `batch_size` is None."""


@dataclass(frozen=True, eq=False)
class Result:
    """What `solve` found. S is num_samples and B the number of measurements.

    Attributes:
        x0: the estimate, shape (B, C, H, W): the first sample, the mean of the samples, or the
            average along the first chain, as `estimate` asked.
        samples: end of every chain, shape (S, B, C, H, W).
        mean: mean of the samples, shape (B, C, H, W).
        std: standard deviation of the samples (divisor S - 1), shape (B, C, H, W); None if S = 1.
        nfe: network forward passes for each returned sample, restarts included, as counted.
        seconds: wall time of the sampling.
        residual: ||y - A x0|| / (sigma_y sqrt(number of measured entries)) of the estimate, shape
            (B,); about 1 when sigma_y is the noise level of y.
        schedule: the levels of rho that ran, largest first, image units.
        sigma_lik: noise std that was assumed, units of y.
        method: the loop that ran.
    """

    x0: Tensor
    samples: Tensor
    mean: Tensor
    std: Tensor | None
    nfe: int
    seconds: float
    residual: Tensor
    schedule: tuple[float, ...]
    sigma_lik: float
    method: Method


@torch.no_grad()
def solve(
    y: Tensor,
    *,
    operator: Operator,
    prior: Prior | str,
    nfe: int = 10,
    sigma_y: float | None = None,
    num_samples: int = 1,
    method: Method | None = None,
    estimate: Estimate = "sample",
    schedule: Sequence[float] | None = None,
    restarts: int = 1,
    preset: Preset | None = None,
    seed: int | Sequence[int | Sequence[int]] = 0,
    sigma_lik: float | None = None,
    temperature: float = 1.0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Result:
    """Draw images from the posterior p(x0 | y) of y = A(x0) + sigma_y * noise.

    Two loops over the levels rho of a decreasing schedule:

    - "conditioning" draws x0 given u = x + rho * noise and moves it to a draw x given y too, by
      Matheron's rule with the covariance that the prior's `statistics` hold for the level. It
      begins with Gaussian images given y, which cost no network call. If the prior's draws were
      Gaussian and A linear it would be exact for any number of levels; another A is linearised,
      by Gauss-Newton steps. A prior without statistics measures its own, once, from images that
      it generates; these calls are no part of `nfe`.
    - "gibbs", the published split-Gibbs loop, draws u given x0 and y, then x0 given u. It is exact
      in the limit of many levels, for any operator.

    Args:
        y: measurements, shape (B, ...), float32 or float64; the result has their dtype and device.
        operator: the forward model A, or a deepinv physics (see `from_deepinv`).
        prior: a prior, or a name or path that `load_prior` accepts.
        nfe: network forward passes of each chain, >= 1, a multiple of `prior.nfe_per_sample`.
        sigma_y: noise std of y, > 0, in units of y; None takes the operator's own, else 0.05.
        num_samples: independent samples for each measurement, >= 1.
        method: the loop; None takes "conditioning", and "gibbs" for presets and for a prior that
            has no statistics and cannot make its own, with a warning.
        estimate: what `Result.x0` is: the first "sample"; the "mean" of the samples; or "ema", an
            exponential average along the first chain, which is no posterior sample.
        schedule: nfe / prior.nfe_per_sample levels of rho, strictly decreasing, > 0, image units;
            None takes the default of the method and the operator's family.
        restarts: chains run for each returned sample, >= 1; the one that fits y best is kept.
        preset: "ncvsd" takes the published schedule and `sigma_lik` of the operator's family.
        seed: an integer >= 0 (measurement i uses (seed, i)), or one such integer or tuple of
            integers for each measurement. No draw depends on other measurements or samples.
        sigma_lik: noise std that the loop assumes, > 0; None takes `sigma_y`.
        temperature: factor on the std of the noise by which draws vary, in (0, 1], for
            "conditioning". Below 1 images are nearer to the mean: sharper than it and closer to
            the truth than a posterior sample, but no such sample; their std is too small.
        batch_size: most chains that run at once, >= 1; changes memory and time, not the result.
            An operator that holds something for each image needs B of them. None: about four
            million pixels.
        progress: show a bar of sweeps on standard error.

    Returns:
        The samples, the estimate and how they came about.

    Raises:
        ValueError: if an argument is out of range or does not fit the others.
        TypeError: if an argument is of the wrong type or y of another dtype.
        DivergenceError: if an image stops being finite.

    Source:
        Peng et al., arXiv 2506.09416, Alg. 1, for "gibbs", with two deviations: nfe counts every
        forward pass, and the likelihood assumes the true noise level unless told otherwise.
    """
    check_choice("estimate", estimate, get_args(Estimate))
    check_count("num_samples", num_samples)
    check_count("restarts", restarts)
    operator, y = adapt(operator, y)
    if preset is not None and isinstance(operator, PhysicsOperator):
        raise ValueError(
            f"preset must be None for a deepinv physics, got {preset!r}: its values are for images "
            "in [-1, 1]"
        )
    prior = _find_prior(prior, y)
    shape = _check_measurement(y, operator, _CountedPrior(prior))
    if sigma_y is None:
        sigma_y = getattr(operator, "sigma_y", None)
    sigma_y = SIGMA_Y if sigma_y is None else check_positive("sigma_y", sigma_y)
    method, prior, lacks = _choose_method(method, prior, nfe, preset)
    counted = _CountedPrior(_temper(prior, temperature))
    if temperature != 1 and method != "conditioning":
        raise ValueError(f"temperature must be 1 with method {method!r}, got {temperature}")
    levels, sigma_lik = _settings(
        operator,
        counted,
        nfe,
        sigma_y,
        method=method,
        schedule=schedule,
        sigma_lik=sigma_lik,
        preset=preset,
    )
    average = default_average(getattr(operator, "family", None))
    keys = _chain_keys(seed, images=shape[0], samples=num_samples, restarts=restarts)
    if batch_size is None:
        batch_size = max(1, PIXELS_AT_ONCE // math.prod(shape[2:]))
    chunks = _split_chains(
        operator, shape[0], num_samples * restarts, check_count("batch_size", batch_size)
    )

    statistics = None
    if method == "conditioning" or _draws_by_statistics(prior):
        statistics = with_own_statistics(prior, shape[1:])
        counted = _CountedPrior(_temper(prior, temperature))
    notes = [lacks, _far_sweep(levels, method, nfe, sigma_y)]
    if method == "conditioning" and statistics is not None:
        notes.append(statistics.note)
    for note in filter(None, notes):
        warnings.warn(note, stacklevel=3)

    started = time.perf_counter()
    lasts, averages, misfits = [], [], []
    with counted.counting(), _progress_bar(progress, len(chunks) * len(levels)) as advance:
        for part, chains in chunks:
            y_part = y[[chain % shape[0] for chain in chains]]
            start = y.new_zeros(len(chains), *shape[1:])
            generators = make_generators([keys[chain] for chain in chains], y.device)
            sweeps: Iterator[Tensor]
            if method == "conditioning":
                assert statistics is not None
                given, start = _given(
                    part, y_part, sigma_y, sigma_lik, statistics, start, generators
                )
                sweeps = _condition(
                    given, counted, statistics, start, levels, generators, temperature
                )
            else:
                step = likelihood_step(part, y_part, sigma_lik)
                sweeps = _gibbs(step, counted, start, levels, generators)
            last, averaged = _run(
                sweeps, levels, average=average if estimate == "ema" else None, advance=advance
            )
            lasts.append(last)
            averages.append(averaged)
            if restarts > 1:
                misfits.append(_misfit(part, y_part, last))

    def keep_best(parts: list[Tensor]) -> Tensor:
        runs = torch.cat(parts).view(restarts, num_samples, *shape)
        if restarts == 1:
            return runs[0]
        misfit = torch.cat(misfits).view(restarts, num_samples, shape[0])
        best = misfit.argmin(0, keepdim=True)[..., None, None, None]
        return runs.take_along_dim(best, 0)[0]

    samples = keep_best(lasts)
    mean = samples.mean(0)
    if estimate == "ema":
        x0 = keep_best(averages)[0]
    elif estimate == "mean":
        x0 = mean
    else:
        x0 = samples[0]
    count = getattr(operator, "count_measured", None)
    measured = count(y) if count else torch.full((shape[0],), y[0].numel(), device=y.device)
    if y.is_cuda:
        torch.cuda.synchronize(y.device)
    return Result(
        x0=x0,
        samples=samples,
        mean=mean,
        std=samples.std(0) if num_samples > 1 else None,
        nfe=counted.forwards // (num_samples * shape[0]),
        seconds=time.perf_counter() - started,
        residual=_misfit(operator, y, x0) / (sigma_y * measured.to(y.dtype).sqrt()),
        schedule=levels,
        sigma_lik=sigma_lik,
        method=method,
    )


def _gibbs(
    likelihood: LikelihoodStep,
    prior: Prior,
    x0: Tensor,
    schedule: Sequence[float],
    generators: Sequence[torch.Generator],
) -> Iterator[Tensor]:
    """Yield x0 (N, C, H, W) of every sweep of one split-Gibbs chain an image, begun at `x0`."""
    for rho in schedule:
        u = likelihood.sample(x0, rho, generator=generators)
        x0 = prior.sample(u, rho, generator=generators)
        yield x0


def _given(
    operator: Operator,
    y: Tensor,
    sigma_y: float,
    sigma_lik: float,
    statistics: Statistics,
    like: Tensor,
    generators: Sequence[torch.Generator],
) -> tuple[Matheron | GaussNewton, Tensor]:
    """Return what conditions on y, and images to begin at: Gaussian given y, or nearly."""
    mean, own = statistics.mean_image(like), statistics.covariance(math.inf, like)
    given: Matheron | GaussNewton
    if isinstance(operator, LinearOperator):
        given = Matheron(operator, y, sigma_lik)
    else:
        given = GaussNewton(operator, y, sigma_lik, sigma_y=sigma_y)
    return given, given.start(mean, own, like, generator=generators)


def _condition(
    given: Matheron | GaussNewton,
    prior: Prior,
    statistics: Statistics,
    x: Tensor,
    schedule: Sequence[float],
    generators: Sequence[torch.Generator],
    temperature: float,
) -> Iterator[Tensor]:
    """Yield x (N, C, H, W) given y of every sweep of one chain an image, begun at `x`."""
    for rho in schedule:
        x0 = prior.sample(x + rho * draw_normal(x, generators), rho, generator=generators)
        covariance = statistics.covariance(rho, x0)
        x = given.draw(x0, covariance, generator=generators, temperature=temperature)
        yield x


def _run(
    sweeps: Iterator[Tensor],
    schedule: Sequence[float],
    *,
    average: Average | None,
    advance: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Run chains to their end; return their last images and their averages, (N, C, H, W).

    Without `average` the last images stand for it.
    """
    averaged = x = torch.zeros(())
    for sweep, rho in enumerate(schedule, start=1):
        where = f"sweep {sweep} of {len(schedule)} at rho = {rho:.4g}"
        try:
            x = next(sweeps)
        except DivergenceError as error:
            raise DivergenceError(f"{where}: {error}") from error
        check_stays_finite("x0", x, where)
        keep = average.mu if average and sweep > 1 and rho < average.below else 0.0
        averaged = x + keep * (averaged - x) if keep else x
        advance()
    return x, averaged


class _CountedPrior:
    """A prior whose draws are checked and whose forward passes are counted.

    Where the prior shows its `network`, a hook counts the images that go through it; elsewhere
    every image drawn counts `nfe_per_sample`.
    """

    def __init__(self, prior: Prior) -> None:
        if not callable(getattr(prior, "sample", None)):
            raise TypeError(f"prior must have a sample method, got {type(prior).__name__}")
        network = getattr(prior, "network", None)
        self.prior = prior
        self.network = network if isinstance(network, nn.Module) else None
        self.nfe_per_sample = check_count(
            "prior.nfe_per_sample", getattr(prior, "nfe_per_sample", 1)
        )
        self.forwards = 0

    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        before = self.forwards
        x0 = self.prior.sample(u, sigma, generator=generator)
        if not isinstance(x0, Tensor) or (x0.shape, x0.dtype) != (u.shape, u.dtype):
            came = f"{tuple(x0.shape)}, {x0.dtype}" if isinstance(x0, Tensor) else f"{type(x0)}"
            raise ValueError(f"prior must draw x0 as {tuple(u.shape)}, {u.dtype}, got {came}")
        check_stays_finite("the prior's draw", x0, f"its call at sigma = {float(sigma):.4g}")
        if self.network is None:
            self.forwards += self.nfe_per_sample * u.shape[0]
        elif self.forwards - before != self.nfe_per_sample * u.shape[0]:
            raise ValueError(
                f"prior must call its network nfe_per_sample = {self.nfe_per_sample} times an "
                f"image, got {self.forwards - before} images through it for {u.shape[0]} draws"
            )
        return x0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Hook the network, where there is one, for as long as the context lasts."""

        def count(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if args and isinstance(args[0], Tensor):
                self.forwards += args[0].shape[0]

        hook = self.network.register_forward_hook(count) if self.network is not None else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()


def _check_measurement(y: Tensor, operator: Operator, prior: _CountedPrior) -> tuple[int, ...]:
    """Return the shape (B, C, H, W) of the images behind y; error if the three do not fit."""
    if not isinstance(operator, Operator):
        raise TypeError(
            f"operator must be callable and have input_shape, got {type(operator).__name__}"
        )
    check_floating("y", y)
    if y.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"y must be float32 or float64, got {y.dtype}")
    if y.ndim < 2 or 0 in y.shape:
        raise ValueError(f"y must have shape (B, ...) with B >= 1, got {tuple(y.shape)}")
    check_finite("y", y)
    try:
        shape = tuple(operator.input_shape(tuple(y.shape)))
        expected = tuple(operator(y.new_zeros(shape)).shape)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"y must be a measurement of the operator, got shape {tuple(y.shape)}: {error}"
        ) from error
    check_shape("y", y, expected)
    if len(shape) != 4 or shape[0] != y.shape[0]:
        raise ValueError(
            f"y must come from as many images (B, C, H, W), got shape {tuple(y.shape)}, which "
            f"the operator traces to {shape}"
        )
    size = getattr(prior.prior, "image_shape", None)
    of_latents = size is not None and (size[0], shape[1]) == (LATENT_CHANNELS, 3)
    if of_latents or isinstance(prior.prior, LatentPrior):
        raise ValueError(
            "prior must be one of pixels, got one of latents; LatentPrior(prior).generate(...) "
            "draws pictures with it"
        )
    if size is not None and shape[1:] != tuple(size):
        raise ValueError(
            f"y must come from images of shape {tuple(size)} for this prior, got {tuple(y.shape)}, "
            f"which comes from {shape[1:]}"
        )
    check_image_size(
        "y's images",
        shape[1:],
        channels=getattr(prior.network, "image_channels", None),
        multiple=getattr(prior.network, "size_multiple", 1),
    )
    weight = next(prior.network.parameters(), y) if prior.network is not None else y
    if weight.device != y.device:
        raise ValueError(f"y must be on the prior's device {weight.device}, got {y.device}")
    return shape


def _temper(prior: Prior, temperature: float) -> Prior:
    """Return the prior whose draws vary by `temperature` times as much."""
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature must be in (0, 1], got {temperature}")
    if temperature == 1:
        return prior
    tempered = getattr(prior, "tempered", None)
    if tempered is None:
        raise ValueError(f"temperature must be 1 for this prior, got {temperature}")
    cooler: Prior = tempered(temperature)
    return cooler


def _find_prior(prior: Prior | str, y: Tensor) -> Prior:
    """Return the prior that a name or a handle means, on the device of `y`; TypeError if none."""
    device = y.device if isinstance(y, Tensor) else None
    if isinstance(prior, str):
        return load_prior(prior, device)
    if isinstance(prior, PriorHandle):
        return prior.load(device)
    if not callable(getattr(prior, "sample", None)):
        raise TypeError(
            f"prior must have a sample method, got {type(prior).__name__}{_how_to_wrap(prior)}"
        )
    return prior


def _how_to_wrap(model: object) -> str:
    """Return what makes a prior of a model that is none, in words; "" if nothing does."""
    library = type(model).__module__.partition(".")[0]
    if isinstance(getattr(model, "unet", None), nn.Module):
        return ": DiffusionPrior.from_diffusers(pipeline.unet, pipeline.scheduler) makes one of it"
    if library == "diffusers":
        return ": DiffusionPrior.from_diffusers(unet, scheduler) makes one of it"
    if library == "deepinv":
        return ": DiffusionPrior.from_deepinv(denoiser) makes one of it"
    if callable(model):
        return (
            ": DiffusionPrior.from_function(f) makes one of E[x0 | x] = f(x, sigma), "
            "DiffusionPrior.from_eps(f, alphas_cumprod) of a prediction of noise"
        )
    return ""


def _choose_method(
    method: Method | None, prior: Prior, nfe: int, preset: str | None
) -> tuple[Method, Prior, str]:
    """Return the loop that runs, the prior it runs with and, if it is second best, why; else "".

    A prior that has no statistics and cannot make its own gets "gibbs"; a denoiser, whose draws
    of one call need them too, gets draws of several calls.
    """
    if method is not None:
        check_choice("method", method, get_args(Method))
    if method == "conditioning" and preset is not None:
        raise ValueError(f"method must be 'gibbs' with preset={preset!r}, got {method!r}")
    published = method == "gibbs" or preset is not None
    fault = "" if published and not _draws_by_statistics(prior) else lacks_statistics(prior)
    if not fault:
        return "gibbs" if published else "conditioning", prior, ""
    lacks = (
        f"the prior has no statistics and cannot generate images to measure them from ({fault}): "
        "prior.with_statistics(measure_statistics(prior, images)), or `ncvsd statistics PRIOR "
        "--data IMAGES`, takes given ones"
    )
    if method == "conditioning":
        raise ValueError(f"method must be 'gibbs', got 'conditioning': {lacks}")
    if _draws_by_statistics(prior):
        prior = prior.with_steps(_steps_without_statistics(nfe))
        lacks += f"; draws take {prior.nfe_per_sample} calls each meanwhile"
    return "gibbs", prior, f"the loop is 'gibbs', the weaker one, as {lacks}"


def _draws_by_statistics(prior: Prior) -> TypeGuard[DiffusionPrior]:
    """Tell whether single draws need statistics."""
    return isinstance(prior, DiffusionPrior) and prior.nfe_per_sample == 1


def _steps_without_statistics(nfe: int) -> int:
    """Return how many calls of a denoiser make a draw that needs no covariance: about four."""
    for steps in (4, 5, 3, 2, nfe):
        if steps > 1 and nfe % steps == 0:
            return steps
    raise ValueError(f"nfe must be at least 2 for a denoiser without statistics, got {nfe}")


def _settings(
    operator: Operator,
    prior: _CountedPrior,
    nfe: int,
    sigma_y: float,
    *,
    method: Method,
    schedule: Sequence[float] | None,
    sigma_lik: float | None,
    preset: str | None,
) -> tuple[tuple[float, ...], float]:
    """Return the levels of rho and the noise std of the likelihood step."""
    sweeps, rest = divmod(check_count("nfe", nfe), prior.nfe_per_sample)
    if rest:
        raise ValueError(
            f"nfe must be a multiple of the prior's nfe_per_sample = {prior.nfe_per_sample}, "
            f"got {nfe}"
        )
    family = getattr(operator, "family", None)
    highest = getattr(prior.prior, "sigma_max", math.inf)
    if preset is not None:
        check_choice("preset", preset, get_args(Preset))
        if schedule is not None or sigma_lik is not None:
            raise ValueError(
                "preset must be None when schedule or sigma_lik is given: it sets both, "
                f"got {preset!r}"
            )
        levels, sigma_lik = published_schedule(sweeps), published_sigma_lik(family)
    elif schedule is None:
        levels = default_schedule(method, family, sweeps, highest)
    else:
        levels = tuple(float(rho) for rho in schedule)
        if len(levels) != sweeps:
            raise ValueError(
                f"schedule must have nfe / nfe_per_sample = {sweeps} levels, got {len(levels)}"
            )
        falls = all(before > after for before, after in pairwise(levels))
        if not (falls and levels[-1] > 0 and math.isfinite(levels[0])):
            raise ValueError(f"schedule must be finite, positive and decreasing, got {levels}")
    if levels[0] > highest:
        raise ValueError(
            f"schedule must not exceed the prior's sigma_max = {highest}, got {levels[0]}"
        )
    return levels, sigma_y if sigma_lik is None else check_positive("sigma_lik", sigma_lik)


def _far_sweep(levels: Sequence[float], method: Method, nfe: int, sigma_y: float) -> str:
    """Return what to say of a single sweep at which draws hardly know y; "" of others."""
    if len(levels) > 1 or levels[0] <= FAR * sigma_y or (method == "conditioning" and nfe == 1):
        return ""
    return (
        f"the schedule has one sweep only, at rho = {levels[0]:g}, far above sigma_y = "
        f"{sigma_y:g}: the result hardly follows y; take more calls (nfe) or fewer for each draw "
        "(--steps, with_steps)"
    )


def _chain_keys(
    seed: int | Sequence[int | Sequence[int]], *, images: int, samples: int, restarts: int
) -> list[tuple[int, ...]]:
    """Return the random key of every chain, in the order restart, sample, image.

    A key ends in its sample and, after the first run, its restart, so that asking for more of
    either leaves the earlier chains as they were.
    """
    try:
        if isinstance(seed, Sequence):
            own = [
                tuple(map(index, entry)) if isinstance(entry, Sequence) else (index(entry),)
                for entry in seed
            ]
        else:
            own = [(index(seed), image) for image in range(images)]
    except TypeError:
        raise TypeError(
            f"seed must be an integer, or one integer or tuple an image, got {seed!r}"
        ) from None
    if len(own) != images:
        raise ValueError(f"seed must be one or one for each of {images} images, got {len(own)}")
    if any(part < 0 for key in own for part in key):
        raise ValueError(f"seed must be non-negative, got {seed}")
    return [
        (*key, sample, restart) if restart else (*key, sample)
        for restart in range(restarts)
        for sample in range(samples)
        for key in own
    ]


def _split_chains(
    operator: Operator, images: int, runs: int, most: int
) -> list[tuple[Operator, range]]:
    """Cut the runs * images chains, numbered run by run, into chunks of at most `most`.

    An operator that holds something for each image is repeated for whole runs; one that cannot
    say whether it does meets one run at a time.
    """
    chains = runs * images
    repeated = getattr(operator, "repeated", None)
    if repeated is None:
        return [(operator, range(first, first + images)) for first in range(0, chains, images)]
    if repeated(2) is operator:
        starts = range(0, chains, most)
        return [(operator, range(first, min(first + most, chains))) for first in starts]
    together = max(1, most // images)
    return [
        (repeated(last - first), range(first * images, last * images))
        for first in range(0, runs, together)
        for last in (min(first + together, runs),)
    ]


def _misfit(operator: Operator, y: Tensor, x0: Tensor) -> Tensor:
    """Return ||y - A x0|| for each image, shape (B,)."""
    misfit: Tensor = torch.linalg.vector_norm((y - operator(x0)).flatten(1), dim=1)
    return misfit


@contextmanager
def _progress_bar(shown: bool, sweeps: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `sweeps` sweeps."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("sweeps", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("sweeps", total=sweeps)
        yield lambda: bar.advance(task)
