"""The two loops over decreasing levels rho, each a generator of its sweeps' images."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.protocols import LinearOperator, Prior, Statistics
from ncvsd_inverse.sampling.gauss_newton import GaussNewton
from ncvsd_inverse.sampling.likelihood import likelihood_step
from ncvsd_inverse.sampling.matheron import Matheron
from ncvsd_inverse.sampling.problem import Problem
from ncvsd_inverse.sampling.settings import Average

__all__ = ["Method", "Plan", "gibbs_chain", "matheron_chain", "run_chain"]

Method: TypeAlias = Literal["conditioning", "gibbs"]


@dataclass(frozen=True)
class Plan:
    """How chains run.

    Attributes:
        method: the loop.
        levels: the levels of rho, largest first, > 0, image units.
        sigma_lik: noise std that is assumed, > 0, units of y.
        temperature: factor on the noise of the likelihood, in (0, 1], for "conditioning".
    """

    method: Method
    levels: tuple[float, ...]
    sigma_lik: float
    temperature: float = 1.0


def gibbs_chain(problem: Problem, prior: Prior, plan: Plan) -> Iterator[Tensor]:
    """Yield x0 (B, C, H, W) of every sweep of split Gibbs sampling, begun at grey.

    Source:
        Peng et al., arXiv 2506.09416, algorithm 1.
    """
    generators = problem.generators()
    likelihood = likelihood_step(problem.operator, problem.y, plan.sigma_lik)
    x0 = problem.y.new_zeros(problem.shape)
    for rho in plan.levels:
        u = likelihood.sample(x0, rho, generator=generators)
        x0 = prior.sample(u, rho, generator=generators)
        yield x0


def matheron_chain(
    problem: Problem, prior: Prior, plan: Plan, statistics: Statistics
) -> Iterator[Tensor]:
    """Yield x (B, C, H, W) given y of every sweep, begun at Gaussian images given y."""
    generators = problem.generators()
    conditioner = _make_conditioner(problem, plan.sigma_lik)
    like = problem.y.new_zeros(problem.shape)
    mean, covariance = statistics.mean_image(like), statistics.covariance(math.inf, like)
    x = conditioner.start(mean, covariance, like, generator=generators)
    for rho in plan.levels:
        u = x + rho * draw_normal(x, generators)
        x0 = prior.sample(u, rho, generator=generators)
        covariance = statistics.covariance(rho, x0)
        x = conditioner.draw(x0, covariance, generator=generators, temperature=plan.temperature)
        yield x


def _make_conditioner(problem: Problem, sigma_lik: float) -> Matheron | GaussNewton:
    if isinstance(problem.operator, LinearOperator):
        return Matheron(problem.operator, problem.y, sigma_lik)
    return GaussNewton(problem.operator, problem.y, sigma_lik, sigma_y=problem.sigma_y)


def run_chain(
    sweeps: Iterator[Tensor],
    levels: Sequence[float],
    *,
    average: Average | None,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Run chains to their end.

    Args:
        sweeps: images (B, C, H, W) of each sweep.
        levels: the levels of the sweeps.
        average: weights of the exponential average; None: the last images stand for it.
        advance: called after each sweep with 1.

    Returns:
        The last images and the average along the chains, both (B, C, H, W).

    Raises:
        DivergenceError: if an image stops being finite; it names sweep and rho.
    """
    averaged = x = torch.zeros(())
    for sweep, rho in enumerate(levels, start=1):
        where = f"sweep {sweep} of {len(levels)} at rho = {rho:.4g}"
        try:
            x = next(sweeps)
        except DivergenceError as error:
            raise DivergenceError(f"{where}: {error}") from error
        check_stays_finite("x0", x, where)
        keep = average.mu if average and sweep > 1 and rho < average.below else 0.0
        averaged = x + keep * (averaged - x) if keep else x
        advance(1)
    return x, averaged
