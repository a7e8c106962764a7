"""Images given measurements: the door to the samplers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_choice, check_count
from ncvsd_inverse.machine import (
    exact_arithmetic,
    out_of_inference,
    progress_bar,
    time_now,
    warn,
)
from ncvsd_inverse.operators.deepinv_physics import PhysicsOperator, adapt
from ncvsd_inverse.priors.own_statistics import lacks_statistics, with_own_statistics
from ncvsd_inverse.protocols import Operator, Prior, PriorTraits, Statistics, UnknownKernel
from ncvsd_inverse.sampling.blind import describe_kernel, find_kernel, search_calls
from ncvsd_inverse.sampling.chains import (
    Method,
    Outcome,
    Plan,
    Progress,
    Watch,
    direct_chain,
    gibbs_chain,
    matheron_chain,
    run_chain,
)
from ncvsd_inverse.sampling.choices import (
    Preset,
    check_asked,
    check_prior_fits,
    choose_estimate,
    choose_method,
    choose_plan,
    choose_point_plan,
    count_sweeps,
    describe_far_sweep,
    draws_by_statistics,
    find_prior,
    fit_prior,
    temper,
)
from ncvsd_inverse.sampling.counting import CountedPrior
from ncvsd_inverse.sampling.diagnosis import describe_measurement, describe_residual
from ncvsd_inverse.sampling.noise import (
    DirectNoise,
    Noise,
    NoiseTracker,
    check_alike,
    first_noise,
    mean_noise,
)
from ncvsd_inverse.sampling.problem import Problem, Seed
from ncvsd_inverse.sampling.result import Estimate, Result
from ncvsd_inverse.sampling.settings import Average, default_average

__all__ = ["Estimate", "Method", "Preset", "Problem", "Progress", "Result", "Seed", "solve"]

CONVERGED = 0.1
"""Largest error of a linear solve, in stds of the law that is conditioned, that does no harm."""

FEW_CALLS = 4
"""Calls below which a residual may be off for want of calls."""

PIXELS_AT_ONCE = 4_000_000
"""Pixels (channels not counted) of all chains that run together when `batch_size` is None."""


@exact_arithmetic()
@torch.no_grad()
def solve(
    y: Tensor,
    *,
    operator: Operator | UnknownKernel,
    prior: Prior | str,
    nfe: int = 10,
    sigma_y: float | Literal["auto"] | None = None,
    num_samples: int = 1,
    method: Method | None = None,
    estimate: Estimate | None = None,
    schedule: Sequence[float] | None = None,
    restarts: int = 1,
    preset: Preset | None = None,
    seed: Seed = 0,
    sigma_lik: float | None = None,
    temperature: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    callback: Callable[[Progress], None] | None = None,
) -> Result:
    """Restore images from y = A(x0) + sigma_y * noise: the best picture, or posterior draws.

    By default `Result.x0` is the best single image that the calls buy, a point estimate. Several
    samples are draws from the posterior p(x0 | y), whose spread says what y leaves open:

    >>> from importlib.resources import files
    >>> from ncvsd_inverse import make_task, read_image, solve
    >>> x0 = read_image(files("ncvsd_inverse") / "assets" / "grace_hopper.png")
    >>> task = make_task("sr4x", x0.shape[-2:])
    >>> y = task.operator.measure(x0, task.sigma_y)
    >>> result = solve(y, operator=task.operator, prior="ncvsd_faces64", nfe=4)
    >>> result.x0.shape, result.nfe, result.estimate
    (torch.Size([1, 3, 64, 64]), 4, 'point')
    >>> draws = solve(y, operator=task.operator, prior="ncvsd_faces64", nfe=4, num_samples=3)
    >>> draws.samples.shape, draws.std.shape
    (torch.Size([3, 1, 3, 64, 64]), torch.Size([1, 3, 64, 64]))

    Two loops over the levels rho of a decreasing schedule:

    - "conditioning" draws x0 given u = x + rho * noise, then conditions the draw on y by Matheron's
      rule, with the covariance that the prior's `statistics` hold for the level. It begins with
      Gaussian images given y, which cost no network call. It would be exact for any number of
      levels if the prior's draws were Gaussian and A linear; another A is linearised, by
      Gauss-Newton steps. A prior without statistics measures its own, once, from images that it
      generates; these calls are no part of `nfe`. A point estimate for `Denoise` is the mean of
      draws given y itself.
    - "gibbs", the published split-Gibbs loop, draws u given x0 and y, then x0 given u. It is exact
      in the limit of many levels, for any operator.

    Autocast, inference mode and torch's default dtype change nothing but the network of a user's
    prior, which runs under the autocast that is on. Threads may share prior and operator.

    Args:
        y: measurements, shape (B, ...), float32 or float64, or complex where the operator takes
            k-space; the result has their precision and device. Values that the operator does not
            measure, such as those under an `Inpaint` mask, are ignored.
        operator: the forward model A, or a deepinv physics (see `from_deepinv`), or a `BlindBlur`:
            its kernel is then found first, with half of the calls, for each measurement by itself;
            draws of one share it.
        prior: a prior, or a name or path that `load_prior` accepts.
        nfe: network forward passes of each chain, >= 1, a multiple of `prior.nfe_per_sample`.
        sigma_y: noise std of y, > 0, in units of y; None takes the operator's own, else 0.05. A y
            without noise still has its rounding: 0.002 for pictures of 8 bits in [-1, 1]. "auto"
            estimates it, of each measurement by itself, before the chain and in every sweep, for a
            linear operator that treats all images alike; noise must be white. For `Denoise` up to
            nfe - 2 of the calls look for it.
        num_samples: independent samples for each measurement, >= 1.
        method: the loop; None takes "conditioning", and "gibbs" for presets and for a prior that
            has no statistics and cannot make its own, with a warning.
        estimate: what `Result.x0` is. "point": the best single image, from a chain whose draws
            vary less and whose last call returns the prior's mean; no posterior draw. "sample": the
            first draw. "mean": the mean of the draws. "ema": an exponential average along the first
            chain, as published. None: "mean" of several samples; for one "point", and "sample"
            where chains cannot make one: for "gibbs" and for a prior that cannot be tempered. With
            several samples the chain of "point" runs beside theirs.
        schedule: nfe / prior.nfe_per_sample levels of rho, strictly decreasing, > 0, image units;
            that of "point" ends with the level of the last call. None takes the default of the
            method, the operator's family and the estimate.
        restarts: chains run for each returned sample, >= 1; the one that fits y best is kept.
        preset: "ncvsd" takes the published schedule and `sigma_lik` of the operator's family.
        seed: an integer >= 0 (measurement i uses (seed, i)), or one such integer or tuple of
            integers for each measurement. No draw depends on other measurements or samples.
        sigma_lik: noise std that the loop assumes, > 0; None takes `sigma_y`.
        temperature: factor on the std of the noise in every draw, in (0, 1], for "conditioning".
            Below 1 images are no posterior samples: sharper than the posterior mean and closer to
            the truth than a sample; `std` is then too small. None: 1, for "point" its setting.
        batch_size: most chains that run at once, >= 1; changes memory and time, not the result.
            An operator that holds something for each image needs B of them. None: about four
            million pixels.
        progress: show a bar of sweeps on standard error.
        callback: called after each sweep of a batch of chains with a `Progress`: the number of the
            call, of how many, its level and the images so far.

    Returns:
        Samples, estimate and diagnostics.

    Raises:
        ValueError: if an argument is out of range or does not fit the others.
        TypeError: if an argument is of the wrong type or y of another dtype.
        DivergenceError: if an image stops being finite, or a linear solve ends so far from its
            solution that the image would be worthless.

    Warns:
        UserWarning: if a solve falls short of its tolerance by more than 0.1 of the std of what it
            conditions (`Result.converged` is then False), and where a choice of the arguments, the
            values of y, the residual or the look of the noise calls for a word.

    Source:
        Peng et al., arXiv 2506.09416, Alg. 1, for "gibbs", with two deviations: nfe counts every
        forward pass, and the likelihood assumes the true noise level unless told otherwise.
    """
    num_samples = check_count("num_samples", num_samples)
    restarts = check_count("restarts", restarts)
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)
    asked = check_asked(nfe=nfe, schedule=schedule, sigma_lik=sigma_lik, temperature=temperature)
    nfe = asked["nfe"]
    choices = (("method", method, Method), ("estimate", estimate, Estimate))
    for name, choice, known_choices in (*choices, ("preset", preset, Preset)):
        if choice is not None:
            check_choice(name, choice, get_args(known_choices))
    if isinstance(sigma_y, str) and sigma_y != "auto":
        raise ValueError(f"sigma_y must be a number, 'auto' or None, got {sigma_y!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    operator, y = adapt(out_of_inference(operator), out_of_inference(y))
    if preset is not None and isinstance(operator, PhysicsOperator):
        raise ValueError(
            f"preset must be None for a deepinv physics, got {preset!r}: its values are for images "
            "in [-1, 1]"
        )
    prior = find_prior(prior, y.device if isinstance(y, Tensor) else None)
    known = None if isinstance(sigma_y, str) else sigma_y
    unknown = operator if isinstance(operator, UnknownKernel) else None
    seen = _any_kernel(operator, y) if isinstance(operator, UnknownKernel) else operator
    problem = Problem.checked(y, seen, sigma_y=known, seed=seed)
    again = partial(
        solve,
        prior=prior,
        sigma_y=sigma_y,
        num_samples=num_samples,
        method=method,
        estimate=estimate,
        restarts=restarts,
        preset=preset,
        batch_size=batch_size,
        progress=progress,
        callback=callback,
        **asked,
    )
    if (isinstance(sigma_y, str) or unknown is not None) and len(problem.y) > 1:
        check_alike(problem)
        return Result.joined(
            [
                again(problem.y[place : place + 1], operator=operator, seed=[key])
                for place, key in enumerate(problem.keys)
            ]
        )
    prior = fit_prior(prior, problem.shape[1:])
    check_prior_fits(prior, problem)
    method, prior, warning = choose_method(method, prior, nfe, preset)
    estimate = choose_estimate(estimate, prior, method, num_samples)
    count_sweeps(PriorTraits.of(prior), nfe, asked["schedule"])  # before anything takes long
    statistics = None
    tells_noise = isinstance(sigma_y, str) and not lacks_statistics(prior)
    if method == "conditioning" or draws_by_statistics(prior) or tells_noise:
        statistics = with_own_statistics(prior, problem.shape[1:])
    if unknown is not None:
        if statistics is None or method != "conditioning" or schedule is not None:
            came = f"method {method!r}" if schedule is None else f"schedule {schedule!r}"
            raise ValueError(
                "operator must be a known blur unless method is 'conditioning' and schedule None, "
                f"got a BlindBlur with {came}"
            )
        return _solve_blind(
            problem,
            unknown,
            prior,
            statistics,
            again,
            nfe=nfe,
            noise_is_known=not isinstance(sigma_y, str),
            chains=num_samples,
            progress=progress,
            callback=callback,
        )
    noise = first_noise(problem, statistics) if isinstance(sigma_y, str) else None
    if noise is not None:
        problem = replace(problem, sigma_y=noise.sigma)
    plans: list[tuple[Plan, int]] = []  # each with its number of chains an image
    if estimate != "point" or num_samples > 1:
        plans.append((choose_plan(problem, prior, method, preset=preset, **asked), num_samples))
    if estimate == "point":
        plans.append((choose_point_plan(problem, prior, **asked), 1))
    for each_plan, _ in plans:
        temper(prior, each_plan.temperature)
    plan, _ = plans[-1]  # that of the estimate
    if batch_size is None:
        batch_size = max(1, PIXELS_AT_ONCE // math.prod(problem.shape[2:]))
    runs = {"restarts": restarts, "batch_size": batch_size}
    jobs = [
        _Job(each_plan, count, restarts, problem.chains(num_samples=count, **runs))
        for each_plan, count in plans
    ]
    notes = [warning, describe_far_sweep(plan, nfe, problem.sigma_y)]
    if method == "conditioning" and statistics is not None:
        notes.append(statistics.note)
    notes += describe_measurement(problem)
    for note in filter(None, notes):
        warn(note)

    average = default_average(problem.traits.family) if estimate == "ema" else None
    total = sum(len(job.parts) * len(job.plan.calls) for job in jobs)
    started = time_now(y.device)
    with progress_bar("sweeps", total, shown=progress) as advance:
        watch = _watch(advance, callback)
        ran = [job.run(prior, statistics, average, watch, noise) for job in jobs]
    seconds = time_now(y.device) - started

    error = max(each.error for each in ran)
    converged = error <= CONVERGED
    if not converged:
        warn(
            f"linear solves fell short by {error:.2g} of the std of what they condition (at most "
            f"{CONVERGED:g} counts as converged): the result may follow y too little; a larger "
            "sigma_lik (or sigma_y) makes them easier"
        )
    samples = ran[0].images
    mean = samples.mean(0)
    x0 = {"mean": mean, "ema": ran[0].averages[0]}.get(estimate, ran[-1].images[0])
    noise = ran[-1].noise
    if noise is not None:
        problem = replace(problem, sigma_y=noise.sigma)
    residual = problem.residual(x0)
    if method == "conditioning" and len(plan.calls) >= FEW_CALLS:
        known = noise is None
        for note in describe_residual(problem, x0, residual, statistics, known=known):
            warn(note)
    return Result(
        x0=x0,
        samples=samples,
        mean=mean,
        std=samples.std(0) if num_samples > 1 else None,
        nfe=sum(each.forwards for each in ran) // (sum(job.count for job in jobs) * len(y)),
        seconds=seconds,
        residual=residual,
        schedule=plan.calls,
        sigma_lik=plan.sigma_lik,
        sigma_y=torch.full_like(residual, problem.sigma_y),
        sigma_y_std=None if noise is None else torch.full_like(residual, noise.std),
        estimate=estimate,
        method=method,
        converged=converged,
        y=problem.y,
    )


def _solve_blind(
    problem: Problem,
    unknown: UnknownKernel,
    prior: Prior,
    statistics: Statistics,
    again: Callable[..., Result],
    *,
    nfe: int,
    noise_is_known: bool,
    chains: int,
    progress: bool,
    callback: Callable[[Progress], None] | None,
) -> Result:
    """Look for the kernel of one measurement, then restore its image by `again` with the rest."""
    y = problem.y
    calls = search_calls(nfe, prior)
    started = time_now(y.device)
    with progress_bar("kernel", calls, shown=progress) as advance:
        search = find_kernel(
            problem,
            unknown,
            prior,
            statistics,
            calls=calls,
            noise_is_known=noise_is_known,
            chains=chains,
            watch=_watch(advance, callback),
        )
    if note := describe_kernel(search.found):
        warn(note)
    kernel, std = (each.to(y)[None, None] for each in search.found[:2])
    blur = unknown.with_kernel(kernel)
    result = again(y, operator=blur, seed=problem.keys, nfe=nfe - calls)
    numbers = search.found.numbers
    return replace(
        result,
        nfe=search.calls + result.nfe,
        seconds=time_now(y.device) - started,
        kernel=kernel,
        kernel_std=std,
        kernel_numbers=y.new_tensor(numbers)[None] if numbers else None,
    )


def _any_kernel(unknown: UnknownKernel, y: Tensor) -> Operator:
    """Return the blur with one of the kernels that it may have."""
    dtype = y.dtype if isinstance(y, Tensor) and y.is_floating_point() else None
    kernel = torch.zeros(unknown.kernel_size, unknown.kernel_size, dtype=dtype)
    kernel[unknown.kernel_size // 2, unknown.kernel_size // 2] = 1
    return unknown.with_kernel(kernel)


class _Ran(NamedTuple):
    """What chains came to: ends and averages (S, B, C, H, W), passes, largest error of a solve.

    And the noise of y, where it was not known.
    """

    images: Tensor
    averages: Tensor
    forwards: int
    error: float
    noise: Noise | None


@dataclass(frozen=True)
class _Job:
    """Chains of one plan: `count` for each image, each the best of `restarts`, in parts."""

    plan: Plan
    count: int
    restarts: int
    parts: Sequence[Problem]

    def run(
        self,
        prior: Prior,
        statistics: Statistics | None,
        average: Average | None,
        watch: Watch,
        noise: Noise | None,
    ) -> _Ran:
        """Run the chains, part by part, with the prior at the plan's temperature.

        `noise` is the first estimate of what is not known, which every part goes on from.
        """
        plan, counted = self.plan, CountedPrior(temper(prior, self.plan.temperature))
        traits = PriorTraits.of(prior)
        outcomes: list[Outcome] = []
        found: list[Noise] = []
        with counted.counting():
            for part in self.parts:
                search, tracker = None, None
                if plan.direct:
                    if noise is not None and traits.has_mean:
                        search = DirectNoise(part.y, noise, most=traits.sigma_max)
                    sweeps = direct_chain(part, counted, plan, search)
                elif plan.method == "conditioning" and statistics is not None:
                    tracker = None if noise is None else NoiseTracker(part, noise)
                    sweeps = matheron_chain(part, counted, plan, statistics, tracker)
                else:
                    sweeps = gibbs_chain(part, counted, plan)
                outcomes.append(run_chain(sweeps, plan.calls, average=average, watch=watch))
                found += [each.noise for each in (search, tracker) if each is not None]
        lasts = [outcome.last for outcome in outcomes]
        best = self._best_restarts(lasts)
        return _Ran(
            self._pick(lasts, best),
            self._pick([outcome.average for outcome in outcomes], best),
            counted.forwards,
            max(float(outcome.error.max()) for outcome in outcomes),
            mean_noise(found) if found else noise,
        )

    def _best_restarts(self, lasts: Sequence[Tensor]) -> Tensor | None:
        """Return which restart of each chain fits y best, (S, B); None where there is one."""
        if self.restarts == 1:
            return None
        misfits = [part.misfit(last) for part, last in zip(self.parts, lasts, strict=True)]
        return torch.cat(misfits).view(self.restarts, self.count, -1).argmin(0)

    def _pick(self, parts: Sequence[Tensor], best: Tensor | None) -> Tensor:
        """Return the images (S, B, C, H, W) of the restart `best` (S, B) of each chain."""
        images = torch.cat(list(parts))
        images = images.view(self.restarts, self.count, -1, *images.shape[1:])
        if best is None:
            return images[0]
        return images.take_along_dim(best[None, ..., None, None, None], 0)[0]


def _watch(advance: Callable[[int], None], callback: Callable[[Progress], None] | None) -> Watch:
    """Return what moves the bar on and calls the user's function after a sweep."""

    def watch(progress: Progress) -> None:
        advance(1)
        if callback is not None:
            callback(progress)

    return watch
