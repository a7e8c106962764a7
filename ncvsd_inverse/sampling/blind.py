"""Kernels that nobody knows: found by a chain of their own before the image is restored."""

import math
from dataclasses import replace
from typing import NamedTuple

from ncvsd_inverse.images import centre_crop
from ncvsd_inverse.protocols import Prior, PriorTraits, Statistics, Temperable, UnknownKernel
from ncvsd_inverse.sampling.chains import Plan, Watch, matheron_chain, run_chain
from ncvsd_inverse.sampling.choices import temper
from ncvsd_inverse.sampling.counting import CountedPrior
from ncvsd_inverse.sampling.kernels import FoundKernel, KernelTracker
from ncvsd_inverse.sampling.problem import Problem
from ncvsd_inverse.schedules import karras

__all__ = ["Search", "describe_kernel", "find_kernel", "search_calls"]

LEVELS = (3.0, 0.15)
"""First and last level of the search, image units."""

TEMPERATURE = 0.1
"""Temperature of its draws: nearly the mean, whose error is the smallest."""

SHARE = 0.5
"""Share of the calls that go into the search."""

SIDE = 512
"""Longest side of the part of a measurement, its middle, in which a kernel is looked for."""

AT_EDGE = 0.05
"""Weight of a kernel on the rim of its square that calls for a word."""


class Search(NamedTuple):
    """What the search for a kernel ended with: the kernel, and the calls of each chain."""

    found: FoundKernel
    calls: int


def search_calls(nfe: int, prior: Prior) -> int:
    """Return how many of `nfe` calls go into the search; ValueError if they are too few."""
    each = PriorTraits.of(prior).nfe_per_sample
    draws = nfe // each
    if draws < 2:
        raise ValueError(f"nfe must be at least {2 * each} for a BlindBlur, got {nfe}")
    return each * max(1, math.floor(SHARE * draws))


def find_kernel(
    problem: Problem,
    unknown: UnknownKernel,
    prior: Prior,
    statistics: Statistics,
    *,
    calls: int,
    noise_is_known: bool,
    chains: int,
    watch: Watch,
) -> Search:
    """Look for the kernel of one measurement.

    Each sweep draws the image given a noisy one, moves the kernel to the most likely one given the
    draw and its error, and conditions the draw on y seen through it.

    Args:
        problem: the measurement, of an operator with any kernel.
        unknown: what is known of the blur.
        prior: the prior.
        statistics: its covariances.
        calls: network calls of each chain.
        noise_is_known: whether the noise of the problem is that of y; else it is found too.
        chains: chains that share the kernel.
        watch: called after each sweep.
    """
    fits = PriorTraits.of(prior).image_shape is None and unknown.boundary != "circular"
    if fits and max(problem.y.shape[2:]) > SIDE:
        sides = problem.y.shape[2:]
        middle = centre_crop(problem.y, (min(sides[0], SIDE), min(sides[1], SIDE)))
        problem = replace(problem, y=middle)
    (problem,) = problem.chains(num_samples=chains, restarts=1, batch_size=chains)
    sigma = problem.sigma_y if noise_is_known else None
    tracker = KernelTracker(problem.y, unknown, sigma)
    like = problem.y.new_zeros(problem.shape)
    covariance = statistics.covariance(math.inf, problem.y)
    blur = tracker.start(statistics.mean_image(like), covariance)
    problem = Problem(problem.y, blur, tracker.sigma, problem.keys)
    temperature = TEMPERATURE if isinstance(prior, Temperable) else 1.0
    sweeps = calls // PriorTraits.of(prior).nfe_per_sample
    first = min(LEVELS[0], PriorTraits.of(prior).sigma_max)
    levels = karras(sweeps, first, LEVELS[1]) if sweeps > 1 else (LEVELS[1],)
    plan = Plan("conditioning", levels, tracker.sigma, temperature)
    counted = CountedPrior(temper(prior, temperature))
    with counted.counting():
        run_chain(
            matheron_chain(problem, counted, plan, statistics, tracker),
            plan.calls,
            average=None,
            watch=watch,
        )
    return Search(tracker.found(), counted.forwards // chains)


def describe_kernel(found: FoundKernel) -> str:
    """Return what to say of a kernel that does not fit into its square; "" of others."""
    rim = found.kernel.clone()
    rim[1:-1, 1:-1] = 0
    share = float(rim.sum())
    if share < AT_EDGE:
        return ""
    return (
        f"{share:.0%} of the kernel lies on the rim of its {len(rim)} x {len(rim)} pixels: take a "
        "larger kernel_size"
    )
