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

"Any" kernels of 5x5 weights are drawn from the law of smooth kernels that `BlindBlur` takes by
default, and restored with it. A stationary law tells nothing of the phase of a kernel, so these
images have a mean, a known texture. Their exact posterior is that of a long Metropolis chain on the
exact density of y, which moves weight between two places.
"""

import argparse
import itertools
import math
import warnings

import torch
from torch import Tensor

from ncvsd_inverse import solve
from ncvsd_inverse.operators import BlindBlur, Blur
from ncvsd_inverse.operators.blind import FAMILIES
from ncvsd_inverse.priors import GaussianPrior
from ncvsd_inverse.sampling.kernels import SMOOTHNESS

SIDE, SIZE, NOISE = 16, 9, 0.05
RANGES = {
    "gaussian": ((0.5, 2.0),),
    "motion": ((4.0, 9.0), (0.0, 180.0)),
}
STEPS = {"gaussian": (200,), "motion": (24, 60)}
INTERVAL = 1.645
"""Stds from the mean to the end of an interval of 90%."""

ANY_SIZE = 5
"""Side of a kernel of any form."""

STEP = 0.03
"""Most weight that a step of the Metropolis chain moves."""

BURN_IN, MOVES = 10_000, 60_000
"""Its steps that are dropped, and those that are kept."""


def image_spectrum() -> Tensor:
    """Return the variance of each frequency of smooth images, shape (SIDE, SIDE)."""
    axis = torch.fft.fftfreq(SIDE, dtype=torch.float64)
    spectrum: Tensor = 0.3 / (1 + 100 * (axis[:, None] ** 2 + axis**2))
    return spectrum


def gaussian_prior(texture: Tensor | None = None) -> GaussianPrior:
    """Return a law of smooth images, with mean 0 or with a mean (1, SIDE, SIDE)."""
    mean = torch.zeros(1, SIDE, SIDE, dtype=torch.float64) if texture is None else texture
    return GaussianPrior.stationary(mean, image_spectrum()[None])


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


def metropolis(kernels: Tensor, ys: Tensor | None, mean: Tensor, source: torch.Generator) -> Tensor:
    """Return draws of kernels given y, shape (draws, trials, n, n); without y, of their law.

    Args:
        kernels: where the chains begin, shape (trials, n, n).
        ys: measurements, shape (trials, 1, SIDE, SIDE).
        mean: mean image, shape (1, SIDE, SIDE).
        source: where randomness comes from.
    """
    trials, size = kernels.shape[:2]
    rows = torch.arange(trials)
    target = mean.new_zeros(1) if ys is None else torch.fft.fft2(ys[:, 0])
    image, spectrum = torch.fft.fft2(mean[0]), image_spectrum()

    def log_density(kernels: Tensor) -> Tensor:
        flat = kernels.square().sum((1, 2))
        right = (kernels[:, :, 1:] - kernels[:, :, :-1]).square().sum((1, 2))
        down = (kernels[:, 1:] - kernels[:, :-1]).square().sum((1, 2))
        edges = [kernels[:, 0], kernels[:, -1], kernels[:, :, 0], kernels[:, :, -1]]
        rim = sum((edge.square().sum(1) for edge in edges), torch.zeros(()))
        logs = -SMOOTHNESS * (right + down + rim) / flat
        if ys is not None:
            padded = torch.zeros(trials, SIDE, SIDE, dtype=torch.float64)
            padded[:, :size, :size] = kernels
            gains = torch.fft.fft2(padded.roll((-(size // 2), -(size // 2)), dims=(1, 2)))
            spread = gains.abs().square() * spectrum + NOISE**2
            power = (target - gains * image).abs().square() / SIDE**2
            logs = logs - 0.5 * (power / spread + spread.log()).sum((1, 2))
        return torch.where((kernels < 0).any(2).any(1), -math.inf, logs)

    now, kept = log_density(kernels), []
    for number in range(BURN_IN + MOVES):
        moved = kernels.flatten(1).clone()
        places = torch.randint(size * size, (2, trials), generator=source)
        amount = STEP * torch.rand(trials, generator=source, dtype=torch.float64)
        moved[rows, places[0]] -= amount
        moved[rows, places[1]] += amount
        moved = moved.view_as(kernels)
        then = log_density(moved)
        taken = torch.rand(trials, generator=source, dtype=torch.float64).log() < then - now
        kernels = torch.where(taken[:, None, None], moved, kernels)
        now = torch.where(taken, then, now)
        if number >= BURN_IN and number % 20 == 0:
            kept.append(kernels)
    return torch.stack(kept)


def compare_any(trials: int, calls: list[int]) -> None:
    """Print the rows of kernels of any form."""
    source = torch.Generator().manual_seed(0)
    texture = 0.5 * torch.randn(1, SIDE, SIDE, generator=source, dtype=torch.float64)
    prior = gaussian_prior(texture)
    assert prior.statistics is not None
    even = torch.full((trials, ANY_SIZE, ANY_SIZE), 1 / ANY_SIZE**2, dtype=torch.float64)
    truth = metropolis(even, None, texture, source)[-1]
    noise = torch.randn(trials, 1, SIDE, SIDE, generator=source, dtype=torch.float64)
    x = texture + prior.statistics.covariance(math.inf, noise).colour(noise)
    ys = torch.cat([Blur(k).measure(x[i][None], NOISE) for i, k in enumerate(truth)])
    draws = metropolis(truth, ys, texture, source)
    exact, spread = draws.mean(0), draws.std(0)
    low, high = draws.quantile(0.05, 0), draws.quantile(0.95, 0)
    exactly = ((truth >= low) & (truth <= high)).double().mean()
    for number in calls:
        result = solve(
            ys,
            operator=BlindBlur(ANY_SIZE),
            prior=prior,
            nfe=number,
            sigma_y=NOISE,
            estimate="sample",
        )
        assert result.kernel is not None
        assert result.kernel_std is not None
        found, sure = (kernel.view_as(truth) for kernel in (result.kernel, result.kernel_std))
        inside = ((found - truth).abs() < INTERVAL * sure).double().mean()
        off = ((found - exact) / spread).square().mean().sqrt()
        errors = [(k - truth).square().sum((1, 2)).sqrt().median() for k in (found, exact, even)]
        print(
            f"any, {number} calls: weights off by {off:.2f} stds, "
            f"std over exact {(sure / spread).median():.2f}, in its 90% {inside:.0%}, "
            f"exact {exactly:.0%}; error {errors[0]:.3f}, of the exact mean {errors[1]:.3f}, "
            f"of an even kernel {errors[2]:.3f}"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help="images (%(default)s)")
    parser.add_argument("--calls", type=int, nargs="+", default=[10, 40], help="(10 40)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*lies on the rim")  # kernels fill their squares
    for family, calls in itertools.product(RANGES, args.calls):
        print(f"{args.trials} images, {calls} calls")
        compare(family, args.trials, calls)
    compare_any(args.trials, args.calls)


if __name__ == "__main__":
    main()
