"""PnP-DM: split Gibbs with reverse diffusion of the teacher as the prior step.

Starting from x = 0, each sweep k takes

    u ~ exp(-||y - A(u)||^2 / (2 sigma_y^2) - ||u - x||^2 / (2 rho_k^2))
    x ~ p(x | u), u = x + rho_k * eps, by reverse diffusion from rho_k

and the last x is returned. rho_k = max(rho_max alpha^k, rho_min), with alpha such that rho_min is
reached after a third of the sweeps: with the paper's 100 sweeps from 10 to 0.3 it is its 0.9. At
rho_min the chain's law has, beside the errors of the diffusion, the spread that the coupling adds:
where the prior says little, measured pixels have the variance sigma_y^2 + rho_min^2.

One grid of `grid` levels serves all sweeps: evenly spaced times t of the variance-preserving
diffusion, sigma(t)^2 = exp(9.95 t^2 + 0.1 t) - 1. A sweep takes u for the state at the largest
level below rho_k and from there one Euler step of the reverse SDE to each next level and to 0, in
the coordinates s(t) x with s = 1 / sqrt(1 + sigma^2), the last without noise: a call for each level
below rho_k. As many sweeps are made as the calls allow. The draw of u is exact for a linear A and
100 Metropolis-adjusted Langevin steps for others.

Source:
    Wu et al., arXiv 2405.18782; rho, alpha and the 100 levels from the authors' commands (rho_min
    is 0.3 for linear operators, 0.1 for phase retrieval). The grid is the one they call VP.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from baselines.interface import Ladder, Method, Models, Problem, Settings
from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.protocols import Denoiser, Generators
from ncvsd_inverse.sampling.likelihood import likelihood_step

__all__ = ["METHOD", "annealed", "plan", "run"]

_ANNEALED = 1 / 3
"""Share of the sweeps in which rho falls."""

_BETA = (0.1, 19.9)
"""Rate of the diffusion at time 0, and what it grows by until time 1."""

_FIRST_TIME = 1e-3
"""Time of the least level."""


@torch.no_grad()
def run(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; at most `nfe` calls of the teacher.

    ValueError if they do not suffice for a sweep.
    """
    times = _times(int(settings["grid"]))
    largest = min(settings["rho_max"], models.sigma_max)
    schedule = plan(nfe, times, largest, settings["rho_min"])
    generators = problem.generators()
    likelihood = likelihood_step(problem.operator, problem.y, problem.sigma_y)
    x = problem.y.new_zeros(problem.shape)
    for sweep, rho in enumerate(schedule, start=1):
        u = likelihood.sample(x, rho, generator=generators)
        x = _diffuse(models.teacher, u, [t for t in times if _sigma(t) < rho], generators)
        check_stays_finite("x", x, f"sweep {sweep} of {len(schedule)} at rho = {rho:.4g}")
    return x


def plan(nfe: int, times: list[float], largest: float, smallest: float) -> list[float]:
    """Return rho of as many sweeps as `nfe` calls allow; ValueError if they allow none."""
    sigmas = [_sigma(t) for t in times]
    chosen: list[float] = []
    for num in range(1, nfe + 1):
        schedule = annealed(num, largest, smallest)
        if sum(sigma < rho for rho in schedule for sigma in sigmas) > nfe:
            break
        chosen = schedule
    if not chosen:
        raise ValueError(f"nfe must suffice for a sweep from {largest:g}, got {nfe}")
    return chosen


def annealed(num: int, largest: float, smallest: float) -> list[float]:
    """Return `num` levels of rho: a geometric fall in the first share, then `smallest`."""
    ratio = smallest / largest
    return [max(largest * ratio ** (k / (_ANNEALED * num)), smallest) for k in range(num)]


def _times(num: int) -> list[float]:
    """Return `num` times, falling from 1."""
    if num < 2:
        raise ValueError(f"grid must be at least 2 levels, got {num}")
    return [1 + i / (num - 1) * (_FIRST_TIME - 1) for i in range(num)]


def _sigma(t: float) -> float:
    return math.sqrt(math.expm1(_BETA[1] / 2 * t**2 + _BETA[0] * t))


def _diffuse(teacher: Denoiser, u: Tensor, times: list[float], generators: Generators) -> Tensor:
    """Return the end of the reverse SDE from u, one call at each of the falling times."""
    x = u / math.sqrt(1 + _sigma(times[0]) ** 2)
    for t, following in pairwise((*times, 0.0)):
        sigma, beta, step = _sigma(t), _BETA[0] + _BETA[1] * t, t - following
        scale = 1 / math.sqrt(1 + sigma**2)
        score = (scale * teacher.denoise(x / scale, sigma) - x) / (scale * sigma) ** 2
        x = x + step * beta * (x / 2 + score)
        if following > 0:
            x = x + math.sqrt(step * beta) * draw_normal(x, generators)
    return x


METHOD = Method(
    name="pnpdm",
    title="PnP-DM",
    run=run,
    network="teacher",
    samples=True,
    linear_only=False,
    calls=(100, 1000),
    reference="wu2024pnpdm",
    settings={"grid": 100, "rho_max": 10.0, "rho_min": 0.3},
    search={"rho_min": Ladder(), "grid": Ladder(kind="calls", least=2)},
    least_calls=2,
)
