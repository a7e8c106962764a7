r"""Kernels found in Gaussian images, beside their exact posterior.

    python experiments/blind/oracle.py
    python experiments/blind/oracle.py --trials 30

Images of 16x16 pixels are drawn from a stationary Gaussian law, blurred by a kernel drawn from a
family (Gaussians of uniform std; lines of uniform length and angle), and made noisy, std 0.05.
Given y, the law of the kernel's numbers is known: the image integrates out, and the density of y is
evaluated by dense matrices at every kernel of a fine grid. `solve` is told the family alone. A row
says how far its number lies from the exact mean, in exact stds (root mean square over trials); its
std over the exact one (median); and how often the truth lies in its interval of 90%, beside the
exact one's. The angle of a short line is left open, so lines are at least 4 pixels long.
"""

import argparse
import itertools
import math

import torch
from torch import Tensor

from ncvsd_inverse import solve
from ncvsd_inverse.operators import BlindBlur, Blur
from ncvsd_inverse.operators.blind import FAMILIES
from ncvsd_inverse.priors import GaussianPrior

SIDE, SIZE, NOISE = 16, 9, 0.05
RANGES = {
    "gaussian": ((0.5, 2.0),),
    "motion": ((4.0, 9.0), (0.0, 180.0)),
}
STEPS = {"gaussian": (200,), "motion": (24, 60)}
INTERVAL = 1.645
"""Stds from the mean to the end of an interval of 90%."""


def gaussian_prior() -> GaussianPrior:
    """Return a law of smooth images."""
    axis = torch.fft.fftfreq(SIDE, dtype=torch.float64)
    spectrum = 0.3 / (1 + 100 * (axis[:, None] ** 2 + axis**2))
    return GaussianPrior.stationary(torch.zeros(1, SIDE, SIDE, dtype=torch.float64), spectrum[None])


def exact_laws(family: str, ys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the grid of numbers, shape (G, P), and their posterior weights, (trials, G)."""
    axes = [
        torch.arange(steps, dtype=torch.float64).add(0.5).div(steps).mul(high - low).add(low)
        for (low, high), steps in zip(RANGES[family], STEPS[family], strict=True)
    ]
    grid = torch.cartesian_prod(*axes).view(-1, len(axes))
    units = torch.eye(SIDE * SIDE, dtype=torch.float64).view(-1, 1, SIDE, SIDE)
    law = gaussian_prior().statistics
    assert law is not None
    covariance = law.covariance(math.inf, units)
    images = covariance.images(covariance.variances * covariance.coordinates(units)).flatten(1)
    logs = []
    for numbers in grid.tolist():
        matrix = Blur(FAMILIES[family].draw(numbers, SIZE))(units).flatten(1)
        dense = matrix.T @ images @ matrix + NOISE**2 * torch.eye(len(images), dtype=torch.float64)
        root = torch.linalg.cholesky(dense)
        white = torch.linalg.solve_triangular(root, ys.flatten(1).T, upper=False)
        logs.append(-0.5 * white.square().sum(0) - root.diagonal().log().sum())
    return grid, torch.stack(logs, 1).softmax(1)


def wrapped(difference: Tensor, family: str) -> Tensor:
    """Return differences of numbers, shape (..., P), the nearest way round."""
    periods = torch.tensor(FAMILIES[family].periods, dtype=torch.float64)
    turns = torch.where(periods.isfinite(), (difference / periods).round() * periods, 0.0)
    return difference - turns.nan_to_num()


def compare(family: str, trials: int, calls: int) -> None:
    """Print the rows of a family."""
    source = torch.Generator().manual_seed(0)
    lows, highs = torch.tensor(RANGES[family], dtype=torch.float64).T
    shares = torch.rand(trials, len(lows), generator=source, dtype=torch.float64)
    truth = lows + shares * (highs - lows)
    prior = gaussian_prior()
    assert prior.statistics is not None
    noise = torch.randn(trials, 1, SIDE, SIDE, generator=source, dtype=torch.float64)
    x = prior.statistics.covariance(math.inf, noise).colour(noise)
    ys = torch.cat(
        [
            Blur(FAMILIES[family].draw(numbers, SIZE)).measure(x[place][None], NOISE)
            for place, numbers in enumerate(truth.tolist())
        ]
    )
    grid, weights = exact_laws(family, ys)
    best = grid[weights.argmax(1)]
    away = wrapped(grid - best[:, None], family)
    exact = best + (weights[..., None] * away).sum(1)
    spread = (weights[..., None] * wrapped(grid - exact[:, None], family).square()).sum(1).sqrt()
    result = solve(
        ys,
        operator=BlindBlur(SIZE, prior="gaussian" if family == "gaussian" else "motion"),
        prior=prior,
        nfe=calls,
        sigma_y=NOISE,
        estimate="sample",
    )
    assert result.kernel_numbers is not None
    found, sure = result.kernel_numbers.unbind(2)
    inside = wrapped(found - truth, family).abs() < INTERVAL * sure
    exactly = wrapped(exact - truth, family).abs() < INTERVAL * spread
    off = (wrapped(found - exact, family) / spread).square().mean(0).sqrt()
    for place, name in enumerate(FAMILIES[family].names):
        print(
            f"{family:9} {name:18} off by {off[place]:.2f} stds, "
            f"std over exact {(sure / spread)[:, place].median():.2f}, "
            f"in its 90% {inside[:, place].double().mean():.0%}, "
            f"exact {exactly[:, place].double().mean():.0%}"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help="images (%(default)s)")
    parser.add_argument("--calls", type=int, nargs="+", default=[10, 40], help="(10 40)")
    args = parser.parse_args()
    for family, calls in itertools.product(RANGES, args.calls):
        print(f"{args.trials} images, {calls} calls")
        compare(family, args.trials, calls)


if __name__ == "__main__":
    main()
