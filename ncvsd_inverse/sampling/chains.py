"""The two loops over decreasing levels rho, each a generator of its sweeps' images."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.protocols import LinearOperator, Prior, Statistics
from ncvsd_inverse.sampling.counting import CountedPrior
from ncvsd_inverse.sampling.gauss_newton import GaussNewton
from ncvsd_inverse.sampling.kernels import KernelTracker
from ncvsd_inverse.sampling.likelihood import ExactGaussian, likelihood_step
from ncvsd_inverse.sampling.matheron import Matheron
from ncvsd_inverse.sampling.noise import DirectNoise, NoiseTracker
from ncvsd_inverse.sampling.problem import Problem
from ncvsd_inverse.sampling.settings import Average

__all__ = [
    "Method",
    "Outcome",
    "Plan",
    "Progress",
    "Sweep",
    "Watch",
    "direct_chain",
    "gibbs_chain",
    "matheron_chain",
    "run_chain",
]

Method: TypeAlias = Literal["conditioning", "gibbs"]

NOISE_STEPS = 3
"""Most iterations of a fit of the noise in a sweep."""

LEAST_DRAWS = 2
"""Draws that a search for the noise leaves of the calls that denoise."""

WORTHLESS = 0.5
"""Error of a linear solve, in stds of the law that is conditioned, of which nothing good comes."""


@dataclass(frozen=True)
class Plan:
    """How chains run.

    Attributes:
        method: the loop.
        levels: the levels of rho, largest first, > 0, image units.
        sigma_lik: noise std that is assumed, > 0, units of y.
        temperature: factor on the noise of draws and likelihood, in (0, 1], for "conditioning".
        last: level of a last call that returns the prior's mean, for "conditioning"; None: no such
            call. There may then be no other level.
        direct: whether the calls are of images that y itself is noisy images of, whose mean is
            taken.
        ends_on_y: whether a chain of "gibbs" whose last level is above sigma_lik ends by
            conditioning on a linear y.
    """

    method: Method
    levels: tuple[float, ...]
    sigma_lik: float
    temperature: float = 1.0
    last: float | None = None
    direct: bool = False
    ends_on_y: bool = False

    @property
    def calls(self) -> tuple[float, ...]:
        """The levels of all calls."""
        return self.levels if self.last is None else (*self.levels, self.last)


class Sweep(NamedTuple):
    """What a sweep of chains ends with.

    Attributes:
        x0: images, shape (B, C, H, W).
        drawn: what the prior drew, shape (B, C, H, W).
        error: largest error of a linear solve so far, root mean square in stds of the law that is
            conditioned, shape (B,).
    """

    x0: Tensor
    drawn: Tensor
    error: Tensor


class Progress(NamedTuple):
    """Where chains are after a call of the prior.

    Attributes:
        call: which call it was, from 1.
        calls: how many there are.
        rho: its level, image units.
        x0: images so far, shape (chains, C, H, W).
    """

    call: int
    calls: int
    rho: float
    x0: Tensor


Watch: TypeAlias = Callable[[Progress], None]
"""What is called after each sweep."""


class Outcome(NamedTuple):
    """What chains end with.

    Attributes:
        last: images of the last sweep, shape (B, C, H, W).
        average: average along the chains, shape (B, C, H, W).
        error: largest error of a linear solve, see `Sweep`, shape (B,).
    """

    last: Tensor
    average: Tensor
    error: Tensor


def gibbs_chain(problem: Problem, prior: Prior, plan: Plan) -> Iterator[Sweep]:
    """Yield every sweep of split Gibbs sampling, begun at grey.

    Source:
        Peng et al., arXiv 2506.09416, algorithm 1.
    """
    generators = problem.generators()
    likelihood = likelihood_step(problem.operator, problem.y, plan.sigma_lik)
    x0 = problem.y.new_zeros(problem.shape)
    for rho in plan.levels:
        u = likelihood.sample(x0, rho, generator=generators)
        x0 = drawn = prior.sample(u, rho, generator=generators)
        is_last = rho == plan.levels[-1]
        if is_last and plan.ends_on_y and isinstance(likelihood, ExactGaussian):
            x0 = likelihood.project(x0, rho, generator=generators)
        yield Sweep(x0, drawn, likelihood.error)


def direct_chain(
    problem: Problem, prior: CountedPrior, plan: Plan, search: DirectNoise | None = None
) -> Iterator[Sweep]:
    """Yield after every call the mean of the draws so far, given that y = x0 + noise.

    A `search` for the noise has the calls before, until it settles or `LEAST_DRAWS` are left.
    """
    generators = problem.generators()
    total, error = torch.zeros_like(problem.y), problem.y.new_zeros(len(problem.y))
    levels = list(plan.levels)
    while search is not None and not search.settled and len(levels) >= LEAST_DRAWS + 2:
        mean = prior.denoise(problem.y, search.level)
        yield Sweep(mean, mean, error)
        moved = prior.denoise(search.moved(), search.level)
        yield Sweep(mean, moved, error)
        search.update(mean, moved)
        levels = [search.noise.sigma] * (len(levels) - 2)
    for number, rho in enumerate(levels, start=1):
        drawn = prior.sample(problem.y, rho, generator=generators)
        total = total + drawn
        yield Sweep(total / number, drawn, error)
    if plan.last is not None:
        mean = prior.denoise(problem.y, plan.last)
        yield Sweep(mean, mean, error)


def matheron_chain(
    problem: Problem,
    prior: CountedPrior,
    plan: Plan,
    statistics: Statistics,
    tracker: NoiseTracker | KernelTracker | None = None,
) -> Iterator[Sweep]:
    """Yield every sweep of images given y, begun at Gaussian images given y.

    With a `tracker` the noise of y, or the kernel and the noise, is fitted to the draws of every
    sweep before they are conditioned; the likelihood then assumes it, times the plan's sigma_lik
    over sigma_y.
    """
    generators = problem.generators()
    rough = isinstance(tracker, KernelTracker)
    conditioner = _make_conditioner(problem, plan.sigma_lik, rough=rough)
    like = problem.y.new_zeros(problem.shape)
    mean, covariance = statistics.mean_image(like), statistics.covariance(math.inf, like)
    has_sweeps = len(plan.levels) > 0
    x = conditioner.start(mean, covariance, like, generator=generators, rough=has_sweeps)
    for rho in plan.levels:
        u = x + rho * draw_normal(x, generators)
        x0 = prior.sample(u, rho, generator=generators)
        covariance = statistics.covariance(rho, x0)
        # Draws err by their own spread beside that of the truth.
        factor, share = 1 + plan.temperature**2, plan.sigma_lik / problem.sigma_y
        if isinstance(conditioner, GaussNewton) or tracker is None:
            pass
        elif isinstance(tracker, KernelTracker):
            blur = tracker.update(x0, statistics.covariance(rho, problem.y), factor=factor)
            conditioner = conditioner.with_operator(blur, share * tracker.sigma)
        elif tracker.tells(rho):
            noise = tracker.update(x0, covariance, factor=factor, iterations=NOISE_STEPS)
            conditioner = conditioner.with_noise(share * noise.sigma)
        x = conditioner.draw(x0, covariance, generator=generators, temperature=plan.temperature)
        yield Sweep(x, x0, conditioner.error)
    if plan.last is not None:
        x = prior.denoise(x, plan.last)
        yield Sweep(x, x, conditioner.error)


def _make_conditioner(
    problem: Problem, sigma_lik: float, *, rough: bool = False
) -> Matheron | GaussNewton:
    if isinstance(problem.operator, LinearOperator):
        return Matheron(problem.operator, problem.y, sigma_lik, rough=rough)
    return GaussNewton(problem.operator, problem.y, sigma_lik, sigma_y=problem.sigma_y)


def run_chain(
    sweeps: Iterator[Sweep],
    levels: Sequence[float],
    *,
    average: Average | None,
    watch: Watch,
) -> Outcome:
    """Run chains to their end.

    Args:
        sweeps: what each sweep ends with.
        levels: the levels of the sweeps.
        average: weights of the exponential average; None: the last images stand for it.
        watch: called after each sweep.

    Raises:
        DivergenceError: if an image stops being finite or a linear solve is far from done; it
            names sweep and rho.
    """
    averaged = torch.zeros(())
    state = None
    for sweep, rho in enumerate(levels, start=1):
        where = f"sweep {sweep} of {len(levels)} at rho = {rho:.4g}"
        try:
            state = next(sweeps)
        except DivergenceError as error:
            raise DivergenceError(f"{where}: {error}") from error
        _check(state, where, rho)
        keep = average.mu if average and sweep > 1 and rho < average.below else 0.0
        averaged = state.x0 + keep * (averaged - state.x0) if keep else state.x0
        watch(Progress(sweep, len(levels), rho, state.x0))
    if state is None:
        raise ValueError("levels must hold at least one, got none")
    return Outcome(state.x0, averaged, state.error)


def _check(state: Sweep, where: str, rho: float) -> None:
    """Raise unless a sweep came to something; a GPU is waited for once."""
    sums = (state.drawn.sum(), state.x0.sum(), state.error.max().to(state.x0))
    drawn, x0, error = torch.stack(sums).tolist()
    if not math.isfinite(drawn):
        raise DivergenceError(
            f"{where}: the prior's draw must stay finite, got NaN or infinity in its call at "
            f"sigma = {rho:.4g}"
        )
    if not (math.isfinite(x0) and math.isfinite(error)):
        raise DivergenceError(f"{where}: x0 must stay finite, got NaN or infinity")
    if error > WORTHLESS:
        raise DivergenceError(
            f"{where}: a linear solve ended {error:.2g} stds from its solution; take a larger "
            "sigma_lik (or sigma_y), or an operator that solves its own normal equations"
        )
