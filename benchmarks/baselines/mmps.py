"""MMPS: reverse diffusion by the mean of x0 given x and y, from the denoiser's own covariance.

In terms of the noise std, with x at level sigma, D = D(x, sigma) and J its Jacobian, x0 given x has
about the mean D and the covariance sigma^2 J (Tweedie), so that

    D_y = D + sigma^2 J^T A^T v,   (sigma_y^2 I + A sigma^2 J^T A^T) v = y - A D,

where v comes from `iterations` steps of conjugate gradients, each one pass back through the
network. With the next level s and the noise that the step sees, eps_hat = (x - D_y) / sigma,

    x = D_y + s (sqrt(1 - e^2) eps_hat + e eps),   e = eta sqrt(1 - s^2 / sigma^2),

in the coordinates of the noise std: eta = 0 is DDIM, 1 ancestral sampling. The last D_y is
returned. Levels are evenly spaced in the time of the variance-preserving diffusion.

Source:
    Rozet et al., arXiv 2405.13712, Alg. 2 and 3.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from baselines.interface import Ladder, Method, Models, Problem, Settings
from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.numerics import conjugate_gradient, draw_normal
from ncvsd_inverse.protocols import Denoiser, LinearOperator
from ncvsd_inverse.schedules import variance_preserving

__all__ = ["METHOD", "denoise_given_y", "run"]


@torch.no_grad()
def run(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; exactly `nfe` calls of the teacher.

    Passes back through it are iterations + 1 times as many.
    """
    generators = problem.generators()
    levels = (*variance_preserving(nfe, models.sigma_max), 0.0)
    steps = int(settings["iterations"])
    x = levels[0] * draw_normal(problem.y.new_empty(problem.shape), generators)
    for step, (sigma, following) in enumerate(pairwise(levels), start=1):
        x0 = denoise_given_y(problem, models.teacher, x, sigma, steps)
        check_stays_finite("x0", x0, f"step {step} of {nfe} at sigma = {sigma:.4g}")
        if following == 0:
            return x0
        fresh = settings["eta"] * math.sqrt(1 - (following / sigma) ** 2)
        kept = math.sqrt(1 - fresh**2) * (x - x0) / sigma
        x = x0 + following * (kept + fresh * draw_normal(x, generators))
    return x


def denoise_given_y(
    problem: Problem, teacher: Denoiser, x: Tensor, sigma: float, iterations: int
) -> Tensor:
    """Return the mean of x0 given x and y by moments, shape (B, C, H, W)."""
    operator = problem.operator
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"operator must be linear for MMPS, got {type(operator).__name__}")
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        mean = teacher.denoise(point, sigma)

    def spread(y: Tensor) -> Tensor:
        (back,) = torch.autograd.grad(mean, point, operator.adjoint(y), retain_graph=True)
        return sigma**2 * back

    found = mean.detach()
    v = conjugate_gradient(
        lambda v: problem.sigma_y**2 * v + operator(spread(v)),
        problem.y - operator(found),
        max_iterations=iterations,
    )
    return found + spread(v)


METHOD = Method(
    name="mmps",
    title="MMPS",
    run=run,
    network="teacher",
    samples=True,
    linear_only=True,
    calls=(4, 10, 20, 100),
    reference="rozet2024mmps",
    settings={"iterations": 5, "eta": 1.0},
    search={
        "eta": Ladder(values=(0.0, 0.25, 0.5, 0.75, 1.0)),
        "iterations": Ladder(kind="count", most=20),
    },
)
