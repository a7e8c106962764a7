"""DDNM+: reverse diffusion whose denoised image is projected onto what was measured.

In terms of the noise std, with levels sigma_t falling and x at level t, one call gives
x0 = D(x, sigma_t) and eps_hat = (x - x0) / sigma_t. With s = sigma_(t+1), A = U diag(a_i) V^T and
everything in the coordinates of V, the next x is

    x0_i + w_i ((A^+ y)_i - x0_i) + noise_i,

    a_i > sigma_y / s:  w_i = 1, noise_i = sqrt(s^2 - sigma_y^2 / a_i^2) eps_i
    other a_i > 0:      w_i = a_i s sqrt(1 - eta^2) / sigma_y, noise_i = eta s eps_i
    a_i = 0:            w_i = 0, noise_i = s (sqrt(1 - null^2) eps_hat_i + null eps_i)

so that, with what A^+ y carries, every coordinate has noise of std s. The last x0 is returned. The
paper has null = eta. The authors' code takes the pixels of eps_hat for its coordinates, which for
all but masks is as good as fresh noise: null = 1. The
levels are evenly spaced in the time of the variance-preserving diffusion, as in the paper; there is
no time travel. In the second case every step pulls towards the same noise of y again, so more steps
make weak coordinates (of a blur) worse, the less so the nearer eta is to 1.

The coordinates V are known for inpainting, super-resolution and circular blurs. For any other
linear A the pseudo-inverse is regularised, A^+ = (A^T A + d I)^-1 A^T with d = (sigma_y / s)^2, and

    x = (A^T A + d I)^-1 (A^T (y + sigma_y eps_y + s A eps_a) + d (x0 + s n)),
    n = sqrt(1 - eta^2) eps_hat + eta eps,

which also has noise of std s in every direction and needs only a solve.

Source:
    Wang et al., arXiv 2212.00490; eta = 0.85 and its use from the authors' code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from baselines.interface import Ladder, Method, Models, Problem, Settings
from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.numerics import conjugate_gradient, draw_normal, hartley
from ncvsd_inverse.operators import Blur, Inpaint, SuperResolution
from ncvsd_inverse.protocols import Generators, LinearOperator, Operator, SolvableOperator
from ncvsd_inverse.schedules import variance_preserving

__all__ = ["METHOD", "Basis", "run", "singular_basis"]

_RANK_TOLERANCE = 1e-4
"""Singular values below this share of the largest of an image count as 0."""

_SOLVE_TOLERANCE = 1e-6
"""Relative residual of the solves for operators without `solve_normal`."""


@torch.no_grad()
def run(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; exactly `nfe` calls of the teacher."""
    generators = problem.generators()
    like = problem.y.new_empty(problem.shape)
    levels = variance_preserving(nfe, models.sigma_max)
    project = _projection(problem, settings["eta"], settings["null"])
    x = levels[0] * draw_normal(like, generators)
    for step, (sigma, following) in enumerate(pairwise(levels), start=1):
        x0 = models.teacher.denoise(x, sigma)
        x = project(x0, (x - x0) / sigma, following, generators)
        check_stays_finite("x", x, f"step {step} of {nfe} at sigma = {sigma:.4g}")
    return models.teacher.denoise(x, levels[-1])


class _Projection(Protocol):
    """One step of the diffusion after the call of the network."""

    def __call__(self, x0: Tensor, eps_hat: Tensor, level: float, generators: Generators) -> Tensor:
        """Return x at the next `level` from x0 and the predicted noise, shape (B, C, H, W)."""
        ...


def _projection(problem: Problem, eta: float, null: float) -> _Projection:
    """Return the step by singular values where their vectors are known, else by a solve."""
    operator = problem.operator
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"operator must be linear for DDNM+, got {type(operator).__name__}")
    basis = singular_basis(operator, problem)
    if basis is None:
        return _RegularisedProjection(operator, problem, eta)
    return _SpectralProjection(operator, problem, (eta, null), basis)


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of images: to its coordinates (B, C, H, W) and back."""

    analyse: Callable[[Tensor], Tensor]
    synthesise: Callable[[Tensor], Tensor]


def singular_basis(operator: Operator, problem: Problem) -> Basis | None:
    """Return the right singular vectors of an operator; None where no closed form is known."""
    match operator:
        case Inpaint():
            return Basis(lambda x: x, lambda x: x)
        case Blur(boundary="circular"):
            return Basis(hartley, hartley)
        case SuperResolution():
            rows, columns = (operator.singular_system(side)[2] for side in problem.shape[-2:])
            return Basis(
                lambda x: rows.T.to(x) @ x @ columns.to(x),
                lambda x: rows.to(x) @ x @ columns.T.to(x),
            )
    return None


class _SpectralProjection:
    """The step of the paper, coordinate by coordinate."""

    def __init__(
        self, operator: LinearOperator, problem: Problem, etas: tuple[float, float], basis: Basis
    ) -> None:
        # In float64, because rounding of the squares would pass for singular values.
        ones = problem.y.new_ones(problem.shape, dtype=torch.float64)
        squares = basis.analyse(operator.adjoint(operator(basis.synthesise(ones))))
        singular = squares.clamp(min=0).sqrt().to(problem.y)
        least = _RANK_TOLERANCE * singular.amax(dim=(1, 2, 3), keepdim=True)
        inverse = torch.where(singular > least, 1 / singular, 0.0)
        self.basis = basis
        self.eta, self.null = etas
        self.known = inverse > 0
        self.noise = problem.sigma_y * inverse
        self.solution = inverse**2 * basis.analyse(operator.adjoint(problem.y))

    def __call__(self, x0: Tensor, eps_hat: Tensor, level: float, generators: Generators) -> Tensor:
        """Return x at the next level, shape (B, C, H, W)."""
        kept = math.sqrt(1 - self.eta**2)
        certain = self.known & (self.noise < level)
        weight = torch.where(certain, 1.0, torch.where(self.known, kept * level / self.noise, 0.0))
        share = torch.where(self.known, self.eta, self.null)
        fresh = torch.where(certain, (level**2 - self.noise**2).clamp(min=0).sqrt(), share * level)
        predicted = torch.where(self.known, 0.0, math.sqrt(1 - self.null**2) * level)
        start = self.basis.analyse(x0)
        noise = fresh * draw_normal(x0, generators) + predicted * self.basis.analyse(eps_hat)
        return self.basis.synthesise(start + weight * (self.solution - start) + noise)


class _RegularisedProjection:
    """The step by a regularised solve, for any linear operator."""

    def __init__(self, operator: LinearOperator, problem: Problem, eta: float) -> None:
        self.operator = operator
        self.y = problem.y
        self.sigma_y = problem.sigma_y
        self.eta = eta

    def __call__(self, x0: Tensor, eps_hat: Tensor, level: float, generators: Generators) -> Tensor:
        """Return x at the next level, shape (B, C, H, W)."""
        gain = (level / self.sigma_y) ** 2
        kept = math.sqrt(1 - self.eta**2)
        noise = kept * eps_hat + self.eta * draw_normal(x0, generators)
        target = self.y + self.sigma_y * draw_normal(self.y, generators)
        target = target + level * self.operator(draw_normal(x0, generators))
        return self._solve(gain * self.operator.adjoint(target) + x0 + level * noise, gain)

    def _solve(self, rhs: Tensor, gain: float) -> Tensor:
        """Return (gain A^T A + I)^-1 rhs, shape (B, C, H, W)."""
        if isinstance(self.operator, SolvableOperator):
            return self.operator.solve_normal(rhs, a=gain, b=1.0)
        return conjugate_gradient(
            lambda x: gain * self.operator.adjoint(self.operator(x)) + x,
            rhs,
            rtol=_SOLVE_TOLERANCE,
        )


METHOD = Method(
    name="ddnm",
    title="DDNM+",
    run=run,
    network="teacher",
    samples=True,
    linear_only=True,
    calls=(20, 100),
    reference="wang2023ddnm",
    settings={"eta": 0.85, "null": 0.85},
    search={
        "eta": Ladder(values=(0.0, 0.3, 0.5, 0.7, 0.85, 1.0)),
        "null": Ladder(values=(0.0, 0.3, 0.5, 0.7, 0.85, 1.0)),
    },
)
