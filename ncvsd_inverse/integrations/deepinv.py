"""Priors and solver as deepinv's denoisers and reconstructors.

deepinv's images are in [0, 1], ours in [-1, 1].
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_count
from ncvsd_inverse.numerics import expand_level, make_generators
from ncvsd_inverse.priors import NCVSDPrior, load_prior
from ncvsd_inverse.protocols import Denoiser, NetworkBacked, Prior
from ncvsd_inverse.sampling.solve import Estimate, Method, solve

if TYPE_CHECKING:
    from deepinv.physics import Physics

__all__ = ["as_deepinv_denoiser", "as_deepinv_reconstructor"]


def as_deepinv_denoiser(prior: Prior | str, *, draws: int = 1, seed: int = 0) -> nn.Module:
    """Return a prior as a deepinv denoiser: a module that maps (x, sigma) to clean images.

    x (B, C, H, W) is in [0, 1] up to noise of std sigma, a float or shape (B,), in those units.

    - Of a prior with `denoise` it is the posterior mean E[x0 | x], which most of deepinv's
      algorithms expect; gradients pass where it lets them, as a `DiffusionPrior` does.
    - Of any other, and of an `NCVSDPrior` that does not temper, it is the average of `draws` draws
      of x0 given x. One draw, the default, is sharper and noisier than the mean; more draws
      approach the mean, at a network call each. Their noise is the same at every call, so that the
      denoiser is a function of x; no gradients pass.

    Args:
        prior: a prior, or a name or path that `load_prior` accepts.
        draws: draws that are averaged where the prior has no mean, >= 1.
        seed: of those draws, >= 0; image i of a batch uses (seed, i).

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `prior` is none.
    """
    return _Denoiser(prior, check_count("draws", draws), check_count("seed", seed, least=0))


def as_deepinv_reconstructor(
    prior: Prior | str,
    *,
    nfe: int = 10,
    sigma_y: float | None = None,
    num_samples: int = 1,
    estimate: Estimate | None = None,
    method: Method | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return `solve` as a deepinv reconstructor: a module that maps (y, physics) to images.

    It runs in `deepinv.test`, in `run_benchmark` of deepinv's benchmarks and wherever else deepinv
    takes a reconstructor. Images come out as (B, C, H, W) in [0, 1] up to what the solver leaves
    outside, not clamped; no gradients pass.

    Args:
        prior: a prior, or a name or path that `load_prior` accepts.
        nfe: as for `solve`.
        sigma_y: noise std in units of the physics' y; None takes that of its noise model.
        num_samples: as for `solve`.
        estimate: as for `solve`.
        method: as for `solve`.
        seed: an integer >= 0; image i of every batch uses (seed, i).

    Raises:
        ValueError: if an argument is out of range, when the module is called.
        TypeError: if `prior` is none.
    """
    return _Reconstructor(prior, nfe, sigma_y, num_samples, estimate, method, seed)


class _PriorModule(nn.Module):
    """A module that holds a prior, whose network moves with it."""

    def __init__(self, prior: Prior | str) -> None:
        super().__init__()
        self.prior = load_prior(prior) if isinstance(prior, str) else prior
        if not hasattr(self.prior, "sample"):
            raise TypeError(f"prior must have a sample method, got {type(prior).__name__}")
        if isinstance(self.prior, NetworkBacked) and isinstance(self.prior.network, nn.Module):
            self.network = self.prior.network


class _Denoiser(_PriorModule):
    def __init__(self, prior: Prior | str, draws: int, seed: int) -> None:
        super().__init__(prior)
        self.draws = draws
        self.seed = seed

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Return clean images (B, C, H, W) for noisy ones and their noise std, in [0, 1] units."""
        u, level = 2 * x - 1, 2 * expand_level(sigma, x).flatten()
        draws_only = isinstance(self.prior, NCVSDPrior) and not self.prior.has_mean
        if isinstance(self.prior, Denoiser) and not draws_only:
            return (self.prior.denoise(u, level) + 1) / 2
        keys = [(self.seed, image) for image in range(len(x))]
        generators = make_generators(keys, x.device)
        total = torch.zeros_like(x)
        for _ in range(self.draws):
            total = total + self.prior.sample(u, level, generator=generators)
        return (total / self.draws + 1) / 2


class _Reconstructor(_PriorModule):
    def __init__(
        self,
        prior: Prior | str,
        nfe: int,
        sigma_y: float | None,
        num_samples: int,
        estimate: Estimate | None,
        method: Method | None,
        seed: int,
    ) -> None:
        super().__init__(prior)
        self.nfe = nfe
        self.sigma_y = sigma_y
        self.num_samples = num_samples
        self.estimate: Estimate | None = estimate
        self.method: Method | None = method
        self.seed = seed

    def forward(self, y: Tensor, physics: "Physics") -> Tensor:
        """Return images (B, C, H, W) in [0, 1] for measurements (B, ...) of `physics`."""
        result = solve(
            y,
            operator=physics,
            prior=self.prior,
            nfe=self.nfe,
            sigma_y=self.sigma_y,
            num_samples=self.num_samples,
            estimate=self.estimate,
            method=self.method,
            seed=self.seed,
        )
        return (result.x0 + 1) / 2

    def extra_repr(self) -> str:
        """Return the arguments, by which deepinv's benchmarks tell models apart."""
        names = ("nfe", "sigma_y", "num_samples", "estimate", "method", "seed")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
