"""Run methods where the posterior is known exactly, and print what they reach beside the truth.

    python benchmarks/sanity.py [--methods daps ddnm] [--most-calls 1000]

The prior is a Gaussian with a power-law spectrum on small grey images; teacher and student are
exact. Each method restores many replicas of one measurement, each with its own random numbers:

- mean error: root mean square, over the pixels, of the distance from the replicas' mean to the
  posterior mean in posterior stds. Draws that are exact have 1 / sqrt(replicas).
- spread: root mean square, over the pixels, of the replicas' std in posterior stds. Draws that are
  exact have 1; point estimates are not asked for it.
- calls: forward passes of a network for each image, as counted.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines.interface import Method, Models, Problem, Settings
from ncvsd_inverse.checks import check_choice
from ncvsd_inverse.machine import count_passes
from ncvsd_inverse.operators import Blur, GaussianBlur, Inpaint, SuperResolution
from ncvsd_inverse.priors import DiffusionPrior, GaussianPrior
from ncvsd_inverse.protocols import SIGMA_Y, Generators

MEAN, VARIANCE = 0.2, 0.25
"""Mean and variance of every pixel of the prior, image units."""


@dataclass(frozen=True)
class Oracle:
    """A Gaussian prior, its covariance (D, D) in float64, and the models it makes."""

    prior: GaussianPrior
    covariance: Tensor
    models: Models


@dataclass(frozen=True)
class KnownPosterior:
    """One measurement, many times over, and its posterior.

    Attributes:
        name: of the operator.
        problem: the measurement B times, each with its own key.
        mean: of the posterior, shape (C, H, W), float64.
        std: likewise.
        exact: as many draws of the posterior, shape (B, C, H, W), float64.
    """

    name: str
    problem: Problem
    mean: Tensor
    std: Tensor
    exact: Tensor

    def mean_error(self, draws: Tensor) -> float:
        """Return how far the mean of draws (B, C, H, W) is from the truth, in posterior stds."""
        error = (draws.double().mean(0) - self.mean) / self.std
        return float(error.square().mean().sqrt())

    def spread(self, draws: Tensor) -> float:
        """Return the std of draws (B, C, H, W) in posterior stds."""
        return float((draws.double().var(0) / self.std**2).mean().sqrt())


@dataclass(frozen=True)
class Reading:
    """What a method reached of a posterior; distances in posterior stds."""

    mean_error: float
    spread: float
    calls: float
    seconds: float


class ExactStudent:
    """The exact sampler of a Gaussian prior, whose draws a module makes so that they count."""

    def __init__(self, prior: GaussianPrior) -> None:
        self.network: nn.Module = _Draw(prior)
        self.nfe_per_sample = 1
        self.image_shape = prior.image_shape
        self.statistics = prior.statistics
        self.temperature = 1.0

    def tempered(self, temperature: float) -> "ExactStudent":
        """Return this prior with the spread of its draws made smaller."""
        twin = copy.copy(self)
        twin.temperature = temperature
        return twin

    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Draw x0 ~ p(x0 | u), shape (B, C, H, W)."""
        x0: Tensor = self.network(u, sigma, generator, self.temperature)
        return x0


class _Draw(nn.Module):
    def __init__(self, prior: GaussianPrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(
        self, u: Tensor, sigma: float | Tensor, generator: Generators, temperature: float
    ) -> Tensor:
        return self.prior.tempered(temperature).sample(u, sigma, generator=generator)


def make_oracle(size: int) -> Oracle:
    """Return a prior of grey images whose spectrum falls with the square of the frequency."""
    frequency = torch.fft.fftfreq(size, dtype=torch.float64) * size
    spectrum = 1 / (1 + frequency[:, None] ** 2 + frequency**2)
    spectrum *= VARIANCE / spectrum.mean()
    mean = torch.full((1, size, size), MEAN, dtype=torch.float64)
    prior = GaussianPrior.stationary(mean, spectrum[None])
    units = torch.eye(size**2, dtype=torch.float64).reshape(-1, size, size)
    covariance = torch.fft.ifft2(spectrum * torch.fft.fft2(units)).real.flatten(1)
    teacher = DiffusionPrior(prior.denoise, image_shape=prior.image_shape)
    return Oracle(prior, covariance, Models(teacher, ExactStudent(prior)))


def make_posterior(
    name: str,
    oracle: Oracle,
    operator: Blur | Inpaint | SuperResolution,
    *,
    replicas: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> KnownPosterior:
    """Measure an image drawn from the prior and work out its posterior by linear algebra."""
    generator = torch.Generator().manual_seed(seed)
    truth = oracle.prior.draw(1, generator=generator)
    y = operator.measure(truth, SIGMA_Y, generator=generator)
    shape = oracle.prior.image_shape
    units = torch.eye(len(oracle.covariance), dtype=torch.float64).reshape(-1, *shape)
    matrix = operator(units).flatten(1).T
    cross = oracle.covariance @ matrix.T
    noisy = matrix @ cross + SIGMA_Y**2 * torch.eye(len(matrix), dtype=torch.float64)
    gain = torch.linalg.solve(noisy, cross.T).T
    mean = MEAN + gain @ (y.flatten() - matrix.sum(1) * MEAN)
    std = (oracle.covariance - gain @ cross.T).diagonal().sqrt()
    x = oracle.prior.draw(replicas, generator=generator).flatten(1)
    eps = torch.randn(replicas, len(matrix), generator=generator, dtype=torch.float64)
    exact = x + (y.flatten() + SIGMA_Y * eps - x @ matrix.T) @ gain.T
    keys = tuple((seed, replica) for replica in range(replicas))
    problem = Problem(y.to(dtype).repeat(replicas, 1, 1, 1), operator, SIGMA_Y, keys)
    return KnownPosterior(
        name, problem, mean.reshape(shape), std.reshape(shape), exact.reshape(-1, *shape)
    )


def make_posteriors(oracle: Oracle, *, replicas: int, seed: int = 0) -> list[KnownPosterior]:
    """Return the posteriors of box inpainting, super-resolution and deblurring."""
    _, size, _ = oracle.prior.image_shape
    operators: dict[str, Blur | Inpaint | SuperResolution] = {
        "inpaint_box": Inpaint.box((size, size), size // 2),
        "sr4x": SuperResolution(4),
        "deblur": GaussianBlur(1.5, 2 * ((size - 1) // 2) + 1),
    }
    return [
        make_posterior(name, oracle, operator, replicas=replicas, seed=seed)
        for name, operator in operators.items()
    ]


def read(
    method: Method,
    posterior: KnownPosterior,
    models: Models,
    nfe: int,
    settings: Settings | None = None,
) -> Reading:
    """Run a method on a measurement with its own settings or others in their place."""
    started = time.perf_counter()
    with count_passes(models.networks) as passes:
        draws = method.run(posterior.problem, models, nfe, {**method.settings, **(settings or {})})
    return Reading(
        mean_error=posterior.mean_error(draws),
        spread=posterior.spread(draws),
        calls=passes.forward / len(draws),
        seconds=time.perf_counter() - started,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    from baselines.registry import METHODS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME")
    parser.add_argument("--most-calls", type=int, default=100, help="skip runs above these calls")
    parser.add_argument("--size", type=int, default=16, help="side of the images, pixels")
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    methods = [METHODS[check_choice("--methods", name, METHODS)] for name in options.methods]
    oracle = make_oracle(options.size)
    print(f"{options.size} x {options.size} pixels, {options.replicas} replicas, stds of posterior")
    print(f"{'task':12} {'method':20} {'calls':>6} {'counted':>8} {'mean error':>11} {'spread':>7}")
    for posterior in make_posteriors(oracle, replicas=options.replicas, seed=options.seed):
        name, draws = posterior.name, posterior.exact
        exact = f"{posterior.mean_error(draws):11.2f} {posterior.spread(draws):7.2f}"
        print(f"{name:12} {'exact draws':20} {'':6} {'':8} {exact}")
        for method in methods:
            for nfe in method.calls:
                if nfe > options.most_calls:
                    continue
                found = read(method, posterior, oracle.models, nfe)
                spread = f"{found.spread:7.2f}" if method.samples else f"{'-':>7}"
                print(
                    f"{name:12} {method.name:20} {nfe:6} {found.calls:8.0f} "
                    f"{found.mean_error:11.2f} {spread} {found.seconds:7.2f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
