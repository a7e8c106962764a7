"""PnP-DM: split Gibbs with reverse diffusion of the teacher as the prior step.

Starting from x = 0, each sweep k takes

    u ~ exp(-||y - A(u)||^2 / (2 sigma_y^2) - ||u - x||^2 / (2 rho_k^2))
    x ~ p(x | u), u = x + rho_k * eps, by `prior_steps` calls of reverse diffusion from rho_k

and the last x is returned. rho_k = max(rho_max alpha^k, rho_min), with alpha such that rho_min is
reached after a third of the sweeps: with the paper's 100 sweeps from 10 to 0.3 it is its 0.9. At
rho_min the chain's law has, beside the errors of the diffusion, the spread that the coupling adds:
where the prior says little, measured pixels have the variance sigma_y^2 + rho_min^2.

The draw of u is exact for a linear A and 100 Metropolis-adjusted Langevin steps for others. The
diffusion is that of `DiffusionPrior`: ancestral steps, a fixed number a sweep; the paper solves the
reverse SDE by Euler steps on one grid of 100 levels and takes those below rho_k, about 25.

Source:
    Wu et al., arXiv 2405.18782; rho and alpha from the authors' commands (rho_min is 0.3 for linear
    operators, 0.1 for phase retrieval, here in the grid).
"""

import torch
from torch import Tensor

from baselines.interface import Method, Models, Problem, Settings
from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.priors import DiffusionPrior
from ncvsd_inverse.sampling.likelihood import likelihood_step

__all__ = ["METHOD", "annealed", "run"]

_ANNEALED = 1 / 3
"""Share of the sweeps in which rho falls."""


@torch.no_grad()
def run(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; prior_steps * (nfe // prior_steps) calls of the teacher.

    ValueError if nfe or prior_steps is below 2: one call gives a mean, no draw.
    """
    steps = min(int(settings["prior_steps"]), nfe)
    prior = DiffusionPrior(models.teacher.denoise, num_steps=steps, sigma_max=models.sigma_max)
    largest = min(settings["rho_max"], models.sigma_max)
    schedule = annealed(nfe // steps, largest, settings["rho_min"])
    generators = problem.generators()
    likelihood = likelihood_step(problem.operator, problem.y, problem.sigma_y)
    x = problem.y.new_zeros(problem.shape)
    for sweep, rho in enumerate(schedule, start=1):
        u = likelihood.sample(x, rho, generator=generators)
        x = prior.sample(u, rho, generator=generators)
        check_stays_finite("x", x, f"sweep {sweep} of {len(schedule)} at rho = {rho:.4g}")
    return x


def annealed(num: int, largest: float, smallest: float) -> list[float]:
    """Return `num` levels of rho: a geometric fall in the first share, then `smallest`."""
    ratio = smallest / largest
    return [max(largest * ratio ** (k / (_ANNEALED * num)), smallest) for k in range(num)]


METHOD = Method(
    name="pnpdm",
    title="PnP-DM",
    run=run,
    network="teacher",
    samples=True,
    linear_only=False,
    calls=(100, 1000),
    reference="wu2024pnpdm",
    settings={"prior_steps": 10, "rho_max": 10.0, "rho_min": 0.3},
    grid={"prior_steps": (5, 10, 20), "rho_min": (0.05, 0.1, 0.3)},
)
