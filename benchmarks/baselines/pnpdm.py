"""PnP-DM: split Gibbs with reverse diffusion of the teacher as the prior step.

Starting from x = 0, each sweep k takes

    u ~ exp(-||y - A(u)||^2 / (2 sigma_y^2) - ||u - x||^2 / (2 rho_k^2))
    x ~ p(x | u), u = x + rho_k * eps, by reverse diffusion from rho_k

and the last x is returned. rho_k = max(rho_max alpha^k, rho_min), with alpha such that rho_min is
reached after a third of the sweeps: with the paper's 100 sweeps from 10 to 0.3 it is its 0.9. At
rho_min the chain's law has, beside the errors of the diffusion, the spread that the coupling adds:
where the prior says little, measured pixels have the variance sigma_y^2 + rho_min^2.

One grid of `grid` levels serves all sweeps: evenly spaced times t from 1 to 0.001 of a variance-
preserving diffusion, sigma(t)^2 = exp(b t^2 / 2 + a t) - 1, from the largest level that the network
knows to 0.01. A sweep takes u for the state at the largest
level below rho_k and from there one Euler step of the reverse SDE to each next level and to 0, in
the coordinates s(t) x with s = 1 / sqrt(1 + sigma^2), the last without noise: a call for each level
below rho_k. As many sweeps are made as the calls allow. The draw of u is exact for a linear A and
100 Metropolis-adjusted Langevin steps for others.

Source:
    Wu et al., arXiv 2405.18782; rho, alpha and the 100 levels from the authors' commands (rho_min
    is 0.3 for linear operators, 0.1 for phase retrieval). The grid is the one they call VP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from baselines.interface import Ladder, Method, Models, Problem, Settings
from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.protocols import Denoiser, Generators
from ncvsd_inverse.sampling.likelihood import likelihood_step

__all__ = ["METHOD", "Diffusion", "annealed", "plan", "run"]

_ANNEALED = 1 / 3
"""Share of the sweeps in which rho falls."""

_LEAST = (1e-3, 0.01049)
"""Time of the least level, and that level: the published diffusion's there."""


@torch.no_grad()
def run(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one sample an image; at most `nfe` calls of the teacher.

    ValueError if they do not suffice for a sweep.
    """
    diffusion = Diffusion.up_to(models.sigma_max)
    times = diffusion.times(int(settings["grid"]))
    sigmas = [diffusion.sigma(t) for t in times]
    largest = min(settings["rho_max"], models.sigma_max)
    schedule = plan(nfe, sigmas, largest, settings["rho_min"])
    generators = problem.generators()
    likelihood = likelihood_step(problem.operator, problem.y, problem.sigma_y)
    x = problem.y.new_zeros(problem.shape)
    for sweep, rho in enumerate(schedule, start=1):
        u = likelihood.sample(x, rho, generator=generators)
        below = times[-sum(sigma < rho for sigma in sigmas) :]
        x = diffusion.reverse(models.teacher, u, below, generators)
        check_stays_finite("x", x, f"sweep {sweep} of {len(schedule)} at rho = {rho:.4g}")
    return x


def plan(nfe: int, sigmas: Sequence[float], largest: float, smallest: float) -> list[float]:
    """Return rho of as many sweeps as `nfe` calls allow; ValueError if they allow none."""
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


@dataclass(frozen=True)
class Diffusion:
    """A variance-preserving diffusion with the rate a + b t of noise at time t in [0, 1].

    Attributes:
        start: a.
        slope: b.
    """

    start: float
    slope: float

    @classmethod
    def up_to(cls, largest: float) -> "Diffusion":
        """Return the one that ends with noise of std `largest` and has the least level in time."""
        time, least = _LEAST
        end, begin = math.log1p(largest**2), math.log1p(least**2)
        slope = 2 * (end - begin / time) / (1 - time)
        return cls(end - slope / 2, slope)

    def times(self, num: int) -> list[float]:
        """Return `num` times, falling from 1 to that of the least level."""
        if num < 2:
            raise ValueError(f"grid must be at least 2 levels, got {num}")
        return [1 + i / (num - 1) * (_LEAST[0] - 1) for i in range(num)]

    def sigma(self, t: float) -> float:
        """Return the std of the noise at time t, image units."""
        return math.sqrt(math.expm1(self.slope / 2 * t**2 + self.start * t))

    def reverse(
        self, teacher: Denoiser, u: Tensor, times: Sequence[float], generators: Generators
    ) -> Tensor:
        """Return the end of the reverse SDE from u, one call at each of the falling times."""
        x = u / math.sqrt(1 + self.sigma(times[0]) ** 2)
        for t, following in pairwise((*times, 0.0)):
            sigma, noise = self.sigma(t), (self.start + self.slope * t) * (t - following)
            scale = 1 / math.sqrt(1 + sigma**2)
            score = (scale * teacher.denoise(x / scale, sigma) - x) / (scale * sigma) ** 2
            x = x + noise * (x / 2 + score)
            if following > 0:
                x = x + math.sqrt(noise) * draw_normal(x, generators)
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
