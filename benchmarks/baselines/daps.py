"""DAPS: decoupled annealing posterior sampling.

With levels sigma_1 > ... > sigma_N, sigma_(N+1) = 0 and x ~ N(0, sigma_1^2 I), each level i takes

    x0 = end of the ODE dx/dsigma = (x - D(x, sigma)) / sigma from x at sigma_i
    u  = end of 100 Langevin steps from x0 up
         -||y - A(u)||^2 / tau^2 - ||u - x0||^2 / (2 sigma_i^2)
    x  = u + sigma_(i+1) eps

and the last x is returned. The ODE is solved by `ode_steps` Euler steps, one call each, on Karras
levels down to 0.01, where it ends. The N levels are the first of N + 1 Karras levels, of which the
last is `sigma_min`. A Langevin step is u + r grad + sqrt(2 r) eps, its rate r
falling evenly over the levels from `rate` to a hundredth of it.

The steps are what makes the method: they do not reach the law that they are for. Where y says
nothing u keeps to x0 within sqrt(200 r), at most 0.14, where that law is as wide as sigma_i.

The authors' code has no 1/2 before the misfit, the paper has: with tau = 0.01 it assumes noise of
std 0.007, whatever sigma_y is. `rate` is 1e-4 there, half of it for boxes, motion blurs and phase
retrieval.

Source:
    Zhang et al., arXiv 2407.01521; settings from the authors' configuration (200 levels from 100 to
    0.1, 5 ODE steps), the first level being the largest that our networks know.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from baselines.interface import Ladder, Method, Models, Problem, Settings, misfit_gradient
from ncvsd_inverse import karras
from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.protocols import Denoiser

__all__ = ["METHOD", "follow_ode", "run"]

_ODE_END = 0.01
"""Where an ODE ends that starts above ten times this; else it ends at a tenth of its start."""

_STEPS = 100
"""Langevin steps of a level."""

_LEAST_RATE = 0.01
"""What is left of the rate at the end."""


@torch.no_grad()
def run(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; ode_steps * (nfe // ode_steps) calls of the teacher."""
    ode_steps = min(int(settings["ode_steps"]), nfe)
    largest = min(settings["sigma_max"], models.sigma_max)
    levels = (*karras(nfe // ode_steps + 1, largest, settings["sigma_min"])[:-1], 0.0)
    generators = problem.generators()
    x = largest * draw_normal(problem.y.new_zeros(problem.shape), generators)
    for level, (sigma, following) in enumerate(pairwise(levels)):
        u = x0 = follow_ode(models.teacher, x, sigma, ode_steps)
        rate = settings["rate"] * (1 - (1 - _LEAST_RATE) * level / len(levels))
        for _ in range(_STEPS):
            pull = 2 / settings["tau"] ** 2 * misfit_gradient(problem, u) + (u - x0) / sigma**2
            u = u - rate * pull + math.sqrt(2 * rate) * draw_normal(u, generators)
        check_stays_finite("u", u, f"level {level + 1} of {len(levels) - 1} at sigma = {sigma:.4g}")
        x = u + following * draw_normal(u, generators)
    return x


def follow_ode(teacher: Denoiser, x: Tensor, sigma: float, steps: int) -> Tensor:
    """Return the end of the probability-flow ODE from x at level sigma, both (B, C, H, W)."""
    for t, s in pairwise(karras(steps + 1, sigma, min(_ODE_END, sigma / 10))):
        mean = teacher.denoise(x, t)
        x = mean + s / t * (x - mean)
    return x


METHOD = Method(
    name="daps",
    title="DAPS",
    run=run,
    network="teacher",
    samples=True,
    linear_only=False,
    calls=(100, 1000),
    reference="zhang2025daps",
    settings={"ode_steps": 5, "sigma_max": 100.0, "sigma_min": 0.1, "tau": 0.01, "rate": 1e-4},
    search={"ode_steps": Ladder(kind="calls"), "rate": Ladder(), "sigma_min": Ladder()},
)
