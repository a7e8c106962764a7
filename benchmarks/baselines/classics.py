"""Restoration without a network: pseudo-inverse, Wiener filter and total variation.

They are point estimates for linear problems.
"""

import torch
from torch import Tensor

from baselines.interface import Ladder, Method, Models, Problem, Settings
from baselines.physics import finish, linear, make_physics, pseudo_inverse
from ncvsd_inverse.numerics import conjugate_gradient

__all__ = ["METHODS", "run_pinv", "run_tv", "run_wiener"]

_TV_ITERATIONS, _TV_INNER = 50, 10
"""Iterations of ADMM, and of the proximal step of total variation within each."""

_TV_THRESHOLD, _TV_STEP = 0.3, 0.1
"""Weight of total variation in a proximal step and that step's own step size; for speed alone."""


def run_pinv(problem: Problem, models: Models, calls: int, settings: Settings) -> Tensor:
    """Return A^+ y, for blurs with the floor of `baselines.physics.pseudo_inverse`.

    Source:
        Penrose, Math. Proc. Cambridge 51 (1955).
    """
    return finish(problem, pseudo_inverse(problem.operator, problem.y))


@torch.no_grad()
def run_wiener(problem: Problem, models: Models, calls: int, settings: Settings) -> Tensor:
    """Return the posterior mean for stationary Gaussian images with a power-law spectrum.

    Channels are independent, with mean 0 (mid-grey), pixel variance `std`^2 and power
    (f^2 + f0^2)^(-exponent / 2) at frequency f, f0 half the lowest one, periodic at the edges.
    With S the root of that covariance, x0 = S w where

        (S A^T A S / sigma_y^2 + I) w = S A^T y / sigma_y^2,

    by conjugate gradients in float64.

    Source:
        Wiener, MIT Press, 1949.
    """
    operator = linear(problem.operator)
    y, height, width = problem.y.double(), *problem.shape[-2:]
    f_h = torch.fft.fftfreq(height, dtype=torch.float64, device=y.device)
    f_w = torch.fft.rfftfreq(width, dtype=torch.float64, device=y.device)
    lowest = 0.5 / max(height, width)
    squared = f_h[:, None] ** 2 + f_w**2 + lowest**2
    root = squared ** (-settings["exponent"] / 4)
    full = torch.fft.irfft2(root**2, s=(height, width))[0, 0]  # the mean over all frequencies
    root = settings["std"] * root / full.sqrt()

    def colour(x: Tensor) -> Tensor:
        coloured: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * root, s=(height, width))
        return coloured

    def apply(w: Tensor) -> Tensor:
        return colour(operator.adjoint(operator(colour(w)))) / problem.sigma_y**2 + w

    rhs = colour(operator.adjoint(y)) / problem.sigma_y**2
    w = conjugate_gradient(apply, rhs, rtol=1e-7, max_iterations=2000)
    return finish(problem, colour(w))


@torch.no_grad()
def run_tv(problem: Problem, models: Models, calls: int, settings: Settings) -> Tensor:
    """Minimise ||y - A x||^2 / (2 sigma_y^2) + weight * TV(x) by deepinv's ADMM.

    TV is isotropic, each channel alone. Numbers of iterations are fixed, because deepinv's
    criteria for stopping look at the whole batch.

    Source:
        Rudin, Osher & Fatemi, Physica D 60 (1992).
    """
    from deepinv.optim import ADMM, TVPrior
    from deepinv.optim.data_fidelity import L2

    operator, weight = linear(problem.operator), settings["weight"]
    prior = TVPrior(def_crit=0.0, n_it_max=_TV_INNER)
    prior.TVModel.tau = _TV_STEP
    solver = ADMM(
        data_fidelity=L2(sigma=problem.sigma_y),
        prior=prior,
        lambda_reg=weight,
        stepsize=_TV_THRESHOLD / weight,
        max_iter=_TV_ITERATIONS,
    )
    physics = make_physics(operator, problem.y.device)
    start = operator.adjoint(problem.y)
    return finish(problem, solver(problem.y, physics, init=(start, torch.zeros_like(start))))


METHODS: tuple[Method, ...] = (
    Method(
        name="pinv",
        title="pseudo-inverse",
        run=run_pinv,
        network="none",
        samples=False,
        linear_only=True,
        calls=(0,),
        reference="penrose1955",
    ),
    Method(
        name="wiener",
        title="Wiener filter",
        run=run_wiener,
        network="none",
        samples=False,
        linear_only=True,
        calls=(0,),
        reference="wiener1949",
        settings={"std": 0.5, "exponent": 2.5},
        search={"std": Ladder(), "exponent": Ladder(1.2)},
    ),
    Method(
        name="tv",
        title="total variation",
        run=run_tv,
        network="none",
        samples=False,
        linear_only=True,
        calls=(0,),
        reference="rudin1992tv",
        settings={"weight": 10.0},
        search={"weight": Ladder()},
    ),
)
