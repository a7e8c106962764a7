"""Reverse diffusion guided by gradients through the denoiser: DPS, PiGDM and MMPS.

In terms of the noise std, with x at level sigma, the next level s, D = D(x, sigma), J its Jacobian
and eps_hat = (x - x0) / sigma, every step takes

    x = x0 + s (sqrt(1 - e^2) eps_hat + e eps) + g,   e = eta sqrt(1 - s^2 / sigma^2),

eta = 1 being ancestral sampling (that of DDPM) and 0 that of DDIM. Levels are evenly spaced in the
time of the variance-preserving diffusion and end with 0. Its state is x / sqrt(1 + sigma^2), so
that a step of the state is one of sqrt(1 + s^2) of x.

- DPS: x0 = D, clipped to [-1, 1], and g = -scale sqrt(1 + s^2) times the gradient, by the state, of
  ||y - A(x0)||. The norm and its gradient do not grow with the image, so that the authors' scale of
  0.3 for 256x256 pixels is not that of other sizes.
- PiGDM: x0 = D and g = weight sqrt(1 + s^2) J^T A^T (A A^T + sigma_y^2 / r^2 I)^-1 (y - A D) with
  r^2 = sigma^2 / (1 + sigma^2); weight = 1 in the paper.
- MMPS: x0 = D + sigma^2 J^T A^T v, the mean of x0 given x and y if x0 given x has the covariance
  sigma^2 J (Tweedie), with (sigma_y^2 I + A sigma^2 J^T A^T) v = y - A D by `iterations` steps of
  GMRES, each one pass back through the network; g = 0.

Sources:
    Chung et al., arXiv 2209.14687, Alg. 1, clipping and scale from the authors' configuration; Song
    et al., ICLR 2023, Alg. 1; Rozet et al., arXiv 2405.13712, Alg. 2 and 3, 1 or 5 iterations from
    the authors' commands.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from baselines.interface import Ladder, Method, Models, Problem, Settings
from baselines.physics import linear
from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.numerics import Map, draw_normal
from ncvsd_inverse.protocols import Denoiser, LinearOperator
from ncvsd_inverse.schedules import variance_preserving

__all__ = ["METHODS", "run_dps", "run_mmps", "run_pigdm"]

Guide = Callable[[Tensor, float, float], tuple[Tensor, Tensor | float]]
"""(x, sigma, s) -> x0 and g, shape (B, C, H, W)."""


@torch.no_grad()
def run_dps(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; exactly `nfe` calls of the teacher and passes back."""

    def guide(x: Tensor, sigma: float, following: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            x0 = models.teacher.denoise(point, sigma).clamp(-1, 1)
            misfit = (problem.y - problem.operator(x0)).flatten(1).norm(dim=1).sum()
        (gradient,) = torch.autograd.grad(misfit, point)
        step = settings["scale"] * math.sqrt((1 + sigma**2) * (1 + following**2))
        return x0.detach(), -step * gradient

    return _reverse(problem, models, nfe, guide, eta=1.0)


@torch.no_grad()
def run_pigdm(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; exactly `nfe` calls of the teacher and passes back."""
    operator = linear(problem.operator)

    def guide(x: Tensor, sigma: float, following: float) -> tuple[Tensor, Tensor]:
        mean, back = _differentiate(models.teacher, x, sigma)
        ratio = problem.sigma_y**2 * (1 + sigma**2) / sigma**2
        error = operator.adjoint(problem.y - operator(mean))
        step = settings["weight"] * math.sqrt(1 + following**2)
        return mean, step * back(operator.solve_normal(error, a=1.0, b=ratio))

    return _reverse(problem, models, nfe, guide, eta=1.0)


@torch.no_grad()
def run_mmps(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; exactly `nfe` calls of the teacher.

    Passes back through it are iterations + 1 times as many.
    """
    operator = problem.operator
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"operator must be linear for MMPS, got {type(operator).__name__}")

    def guide(x: Tensor, sigma: float, following: float) -> tuple[Tensor, float]:
        mean, back = _differentiate(models.teacher, x, sigma)

        def spread(y: Tensor) -> Tensor:
            return sigma**2 * back(operator.adjoint(y))

        v = gmres(
            lambda v: problem.sigma_y**2 * v + operator(spread(v)),
            problem.y - operator(mean),
            int(settings["iterations"]),
        )
        return mean + spread(v), 0.0

    return _reverse(problem, models, nfe, guide, eta=settings["eta"])


def gmres(apply: Map, rhs: Tensor, iterations: int) -> Tensor:
    """Solve M v = rhs nearly, each item on its own, by generalised minimal residuals.

    The derivative of a network is not quite symmetric, which conjugate gradients do not forgive.

    Args:
        apply: v -> M v, on tensors of the shape of `rhs` (B, ...).
        rhs: right-hand sides.
        iterations: applications of M.

    Source: Saad & Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7 (1986).
    """
    flat = rhs.flatten(1).double()
    size = flat.norm(dim=1)
    basis = [flat / size.clamp(min=1e-30)[:, None]]
    hessenberg = flat.new_zeros(len(flat), iterations + 1, iterations)
    for column in range(iterations):
        image = apply(basis[-1].to(rhs).view_as(rhs)).flatten(1).double()
        for row, vector in enumerate(basis):
            share = (vector * image).sum(1)
            hessenberg[:, row, column] = share
            image = image - share[:, None] * vector
        left = image.norm(dim=1)
        is_new = left > 1e-10 * hessenberg[:, :, column].norm(dim=1)  # else it is solved
        hessenberg[:, column + 1, column] = torch.where(is_new, left, 0.0)
        basis.append(torch.where(is_new, 1 / left, 0.0)[:, None] * image)
    if not bool(hessenberg.isfinite().all()):  # the network's, which the caller tells
        return torch.full_like(rhs, math.nan)
    target = flat.new_zeros(len(flat), iterations + 1, 1)
    target[:, 0, 0] = size
    weights = torch.linalg.pinv(hessenberg) @ target
    solved = sum(weight * vector for weight, vector in zip(weights.unbind(1), basis, strict=False))
    assert isinstance(solved, Tensor)
    return solved.to(rhs).view_as(rhs)


def _differentiate(
    teacher: Denoiser, x: Tensor, sigma: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return D(x, sigma) and v -> J^T v, shape (B, C, H, W)."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        mean = teacher.denoise(point, sigma)

    def back(v: Tensor) -> Tensor:
        return torch.autograd.grad(mean, point, v, retain_graph=True)[0]

    return mean.detach(), back


def _reverse(problem: Problem, models: Models, nfe: int, guide: Guide, *, eta: float) -> Tensor:
    generators = problem.generators()
    levels = (*variance_preserving(nfe, models.sigma_max), 0.0)
    x = levels[0] * draw_normal(problem.y.new_empty(problem.shape), generators)
    for step, (sigma, following) in enumerate(pairwise(levels), start=1):
        x0, shift = guide(x, sigma, following)
        check_stays_finite("x0", x0, f"step {step} of {nfe} at sigma = {sigma:.4g}")
        fresh = eta * math.sqrt(1 - (following / sigma) ** 2)
        kept = math.sqrt(1 - fresh**2) * (x - x0) / sigma
        x = x0 + following * kept + shift
        if following > 0:
            x = x + following * fresh * draw_normal(x, generators)
    return x


_guided = partial(Method, network="teacher", samples=True)

METHODS: tuple[Method, ...] = (
    _guided(
        name="dps",
        title="DPS",
        run=run_dps,
        linear_only=False,
        calls=(100, 1000),
        reference="chung2023dps",
        settings={"scale": 0.3},
        search={"scale": Ladder()},
    ),
    _guided(
        name="pigdm",
        title="PiGDM",
        run=run_pigdm,
        linear_only=True,
        calls=(20, 100),
        reference="song2023pigdm",
        settings={"weight": 1.0},
        search={"weight": Ladder()},
    ),
    _guided(
        name="mmps",
        title="MMPS",
        run=run_mmps,
        linear_only=True,
        calls=(4, 10, 20, 100),
        reference="rozet2024mmps",
        settings={"iterations": 5, "eta": 1.0},
        search={
            "iterations": Ladder(kind="count", most=20),
            "eta": Ladder(values=(0.0, 0.25, 0.5, 0.75, 1.0)),
        },
    ),
)
