"""DAPS: decoupled annealing posterior sampling.

With levels sigma_1 > ... > sigma_N and x ~ N(0, sigma_1^2 I), each level i takes

    x0 = end of the ODE dx/dsigma = (x - D(x, sigma)) / sigma from x at sigma_i
    u  ~ exp(-||y - A(u)||^2 / (2 sigma_y^2) - ||u - x0||^2 / (2 r^2)),  r = sigma_i
    x  = u + sigma_(i+1) eps

and the last u is returned. The ODE is solved by `ode_steps` Euler steps, one call each, on Karras
levels down to 0.01 and from there to 0.

The end of the ODE is as spread as a draw of x0 given x, and r = sigma_i adds that spread again.
Where y says nothing, a Gaussian prior of variance s^2 and many sweeps at one level sigma give u
the variance 2 s^2 + sigma^2; annealing leaves less of it.

Where we deviate: for a linear A the draw of u is exact, where the paper takes 100 plain Langevin
steps; for others it is 100 Metropolis-adjusted ones. They assume the true sigma_y, not the paper's
0.01. The paper's last level, 0.1, would leave the noise r of an exact draw in what y does not
measure, so we end at 0.02.

Source:
    Zhang et al., arXiv 2407.01521; settings from the authors' configuration (200 levels from 100,
    5 ODE steps), the first level being the largest that our networks know.
"""

from itertools import pairwise

import torch
from torch import Tensor

from baselines.interface import Method, Models, Problem, Settings
from ncvsd_inverse import karras
from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.protocols import Denoiser
from ncvsd_inverse.sampling.likelihood import likelihood_step

__all__ = ["METHOD", "follow_ode", "run"]

_ODE_END = 0.01
"""Level of the last call of an ODE that starts above ten times this; else a tenth of its start."""


@torch.no_grad()
def run(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; ode_steps * (nfe // ode_steps) calls of the teacher."""
    ode_steps = min(int(settings["ode_steps"]), nfe)
    largest = min(settings["sigma_max"], models.sigma_max)
    levels = karras(nfe // ode_steps, largest, settings["sigma_min"])
    generators = problem.generators()
    likelihood = likelihood_step(problem.operator, problem.y, problem.sigma_y)
    u = problem.y.new_zeros(problem.shape)
    for level, sigma in enumerate(levels, start=1):
        x = u + sigma * draw_normal(u, generators)
        x0 = follow_ode(models.teacher, x, sigma, ode_steps)
        check_stays_finite("x0", x0, f"level {level} of {len(levels)} at sigma = {sigma:.4g}")
        u = likelihood.sample(x0, sigma, generator=generators)
    return u


def follow_ode(teacher: Denoiser, x: Tensor, sigma: float, steps: int) -> Tensor:
    """Return the end of the probability-flow ODE from x at level sigma, both (B, C, H, W)."""
    levels = karras(steps, sigma, min(_ODE_END, sigma / 10))
    for t, s in pairwise((*levels, 0.0)):
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
    settings={"ode_steps": 5, "sigma_max": 100.0, "sigma_min": 0.02},
    grid={"ode_steps": (2, 5, 10), "sigma_max": (3.0, 10.0, 100.0)},
)
